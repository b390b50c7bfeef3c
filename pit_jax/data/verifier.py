"""The ground truth of the synthetic task: does an answer do what its prompt asks?

PIT's synthetic data test whether an answer follows every instruction of its prompt (PIT appendix D). There a large
model judges that; here each instruction is a kind with a value, and a few lines of code read the answer's text. The
verifier never sees how an answer was made, so it judges a written answer and a sampled one alike, and any string is
an answer: empty, huge or broken ones fail, they do not raise. All checks take time linear in the answer.

How an answer is read:

- tags are `<name>` and `</name>`, letter case and attributes ignored; `<strong>` is bold, `<em>` is italic. An HTML
  check holds only if all tags of the answer are well formed: opened, closed, properly nested.
- tokens are found after tags, the marker at the start of a line ("- ", "* ", "2. ", "# ") and a line's leading "P.S."
  are removed. A token is a run of letters and digits, in which an apostrophe or a hyphen may join two runs
  ("thank-you" is one word), or a hashtag, which is "#" and such a run.
- words are the tokens that are not hashtags. So a hashtag counts neither as a word nor as a mention of one, but an
  answer that ends with a hashtag does not end with the word before it. Words compare without regard to case.
"""

import json
import re
from collections.abc import Callable, Iterable

from pit_jax.types import Requirement

_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)(?:\s[^<>]*)?>")
_VOID_TAGS = {"br", "hr", "img"}  # need no closing tag
_MARKER = re.compile(r"^(?:[-*] |[0-9]{1,9}\. |#{1,6} )", re.MULTILINE)
_POSTSCRIPT = re.compile(r"^p\. ?s\.", re.MULTILINE | re.IGNORECASE)
_TOKEN = re.compile(r"#?[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+(?=[\s\"”')*\]}]|$)")  # looks back, or "!!!!x" would take quadratic time
_NUMBERED = re.compile(r"([0-9]{1,9})\. +\S")
_CLOSERS = " \t\r\n\"”'’*_)]}"


def _tokens(response: str) -> list[str]:
    """Lower-cased words and hashtags in order."""
    text = _POSTSCRIPT.sub("", _MARKER.sub("", _TAG.sub("", response)))
    return _TOKEN.findall(text.lower())


def words(response: str) -> list[str]:
    """The lower-cased words of an answer, by the definition above."""
    return [token for token in _tokens(response) if token[0] != "#"]


def hashtags(response: str) -> list[str]:
    """The lower-cased hashtags of an answer, without "#"."""
    return [token[1:] for token in _tokens(response) if token[0] == "#"]


def _topic(value, response):
    wanted, found = value.lower().split(), words(response)
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))


def _contains(value, response):
    return value.lower() in words(response)


def _avoids(value, response):
    tokens = _tokens(response)
    return bool(tokens) and value.lower() not in tokens and f"#{value.lower()}" not in tokens


def _starts_with(value, response):
    return _tokens(response)[:1] == [value.lower()]


def _ends_with(value, response):
    return _tokens(response)[-1:] == [value.lower()]


def _hashtag(value, response):
    return value.lower() in hashtags(response)


def _hashtags(value, response):
    return len(hashtags(response)) == int(value)


def _upper_case(value, response):
    text = _TAG.sub("", response)
    return any(c.isupper() for c in text) and not any(c.islower() for c in text)


def _lower_case(value, response):
    text = _TAG.sub("", response)
    return any(c.islower() for c in text) and not any(c.isupper() for c in text)


def _elements(response: str) -> list[tuple[str, int, int, int, int]] | None:
    """(tag name, start, end of the opening tag, start of the closing tag, end) of each element; None if malformed."""
    open_tags, found = [], []
    for match in _TAG.finditer(response):
        name = match[2].lower()
        if name in _VOID_TAGS:
            continue
        if not match[1]:
            open_tags.append((name, match.start(), match.end()))
        elif open_tags and open_tags[-1][0] == name:
            found.append((*open_tags.pop(), match.start(), match.end()))
        else:
            return None
    return None if open_tags else found


def _has_words(text: str) -> bool:
    return _TOKEN.search(_TAG.sub("", text)) is not None


def _html(names, response):
    named = [e for e in _elements(response) or [] if e[0] in names]
    # Elements inside one another share their text; reading the first hundred keeps a hostile answer linear.
    return bool(named) and all(_has_words(response[e[2] : e[3]]) for e in named[:100])


def _html_bold(value, response):
    return _html(("b", "strong"), response)


def _html_italic(value, response):
    return _html(("i", "em"), response)


def _html_paragraph(value, response):
    text = response.strip()
    return any(
        name == "p" and start == 0 and stop == len(text) and _has_words(text[inner:outer])
        for name, start, inner, outer, stop in _elements(text) or []
    )


def _markdown_bold(value, response):
    parts = response.split("**")  # odd entries lie inside a pair of marks
    inside = parts[1::2]
    return len(parts) % 2 == 1 and bool(inside) and all(p == p.strip() and _has_words(p) for p in inside)


def _markdown_heading(value, response):
    return response.startswith("# ") and _has_words(response.partition("\n")[0])


def _quotes(value, response):
    text = response.strip()
    inner = text[1:-1]
    return text[:1] + text[-1:] in ('""', "“”") and not any(q in inner for q in '"“”') and _has_words(inner)


def _json(value, response):
    try:
        parsed = json.loads(response)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and isinstance(parsed.get(value), str) and _has_words(parsed[value])


def _parentheses(value, response):
    start, found = None, False
    for i, character in enumerate(response):
        if character == "(":
            if start is not None:
                return False
            start = i
        elif character == ")":
            if start is None:
                return False
            found = found or _has_words(response[start:i])
            start = None
    return found and start is None


def _exactly_words(value, response):
    return len(words(response)) == int(value)


def _at_most_words(value, response):
    return 0 < len(words(response)) <= int(value)


def _sentences(value, response):
    text = _POSTSCRIPT.sub("", _MARKER.sub("", _TAG.sub("", response)))
    # What stands after the last mark counts too, so a missing last full stop takes no sentence away; hashtags alone
    # are no sentence.
    return sum(bool(words(part)) for part in _SENTENCE_END.split(text)) == int(value)


def _bullets(value, response):
    return sum(line.startswith("- ") and _has_words(line) for line in response.splitlines()) == int(value)


def _numbered(value, response):
    numbers = [match[1] for line in response.splitlines() if (match := _NUMBERED.match(line))]
    return len(numbers) == int(value) and all(n == str(i) for i, n in enumerate(numbers, 1))


def _exclamation(value, response):
    return _TAG.sub("", response).rstrip(_CLOSERS).endswith("!") and _has_words(response)


def _question(value, response):
    return _TAG.sub("", response).rstrip(_CLOSERS).endswith("?") and _has_words(response)


def _postscript(value, response):
    lines = (line.strip() for line in response.splitlines())
    return any(match and _has_words(line[match.end() :]) for line in lines for match in [_POSTSCRIPT.match(line)])


def _no_commas(value, response):
    return "," not in response and _has_words(response)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "topic": _topic,  # the words of the value stand in the answer, one after the other
    "contains": _contains,  # the word is a word of the answer
    "avoids": _avoids,  # the answer has words, and the word is neither one of them nor a hashtag
    "starts_with": _starts_with,  # the first token is the word
    "ends_with": _ends_with,  # the last token is the word
    "hashtag": _hashtag,  # "#" and the word
    "hashtags": _hashtags,  # exactly this many hashtags
    "upper_case": _upper_case,  # no lower-case letter outside tags
    "lower_case": _lower_case,  # no upper-case letter outside tags
    "html_bold": _html_bold,
    "html_italic": _html_italic,
    "html_paragraph": _html_paragraph,  # one <p> element is the whole answer
    "markdown_bold": _markdown_bold,  # **text**
    "markdown_heading": _markdown_heading,  # begins with "# "
    "quotes": _quotes,  # one pair of double quotes encloses the whole answer
    "json": _json,  # an object in which the value is a key with a string
    "parentheses": _parentheses,  # a parenthesised remark; no bracket left open, none inside another
    "exactly_words": _exactly_words,
    "at_most_words": _at_most_words,
    "sentences": _sentences,  # runs of words, each up to a closing ".", "!" or "?"
    "bullets": _bullets,  # exactly this many lines that begin with "- "
    "numbered": _numbered,  # exactly the lines "1. ", "2. ", ...
    "exclamation": _exclamation,  # last character, after tags, quotes and brackets
    "question": _question,
    "postscript": _postscript,  # a line that begins with "P.S."
    "no_commas": _no_commas,
}
"""kind -> check(value, response)."""


def check_requirement(requirement: Requirement) -> None:
    """Raises ValueError for an unknown kind, or a count whose value is no number."""
    verify([requirement], "Some words.")


def verify(requirements: Iterable[Requirement], response: str) -> tuple[bool, ...]:
    """Which requirements an answer meets (stands in for the judging model of PIT appendix D).

    Args:
      requirements: what the prompt asks for.
      response: the answer, any string.

    Returns:
      One bool per requirement, in order.

    Raises:
      ValueError: where a requirement has an unknown kind, or a count whose value is no number.
    """
    requirements = tuple(requirements)
    unknown = {r.kind for r in requirements} - CHECKS.keys()
    if unknown:
        raise ValueError(f"unknown requirement kinds {sorted(unknown)}: use {sorted(CHECKS)}")
    return tuple(CHECKS[r.kind](r.value, response) for r in requirements)


def share_met(requirements: Iterable[Requirement], response: str) -> float:
    """The share of requirements that an answer meets, 1.0 where nothing is asked.

    Args:
      requirements: what the prompt asks for.
      response: the answer, any string.
    """
    met = verify(requirements, response)
    return sum(met) / len(met) if met else 1.0
