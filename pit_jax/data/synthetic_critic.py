"""The verifier as a critic: feedback, a score and a better answer for any answer to a synthetic prompt.

SRT asks a stronger model for weaknesses, suggestions, a score and a refinement of what a small model wrote. On the
synthetic task code knows what an answer lacks, so this critic is never wrong: its judgements are the verifier's, and
the refinement meets every requirement.

A refinement is the answer with a few small edits, so that a model can learn to edit. `repair` searches for them: each
kind has some edits that could mend it, with a cost (roughly the words that change, more where the result reads less
well), and the cheapest way to an answer that meets everything is followed first. New words stand where the generator
of the data puts them: an ending before the full stop, hashtags after it, marks around a whole phrase.
"""

import heapq
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from pit_jax.data import synthetic_text as text_of
from pit_jax.data.verifier import hashtags, verify, words
from pit_jax.types import Requirement

# Feedback -------------------------------------------------------------------------------------------------------------

NUM_WAYS = 3
"""Ways of speaking: each of the lists below has one entry for each of them."""

MET, NOT_MET = ("yes", "holds", "right"), ("no", "fails", "wrong")
"""What is said of a requirement, right behind its name, in one word as in a reflection. With "is there" and "is not
there", of which only the second word judges, a model of four layers learnt little more than how often each kind fails:
probably since no layer is left to pass on what it found at the name."""

JOINS = ((", ", ", "), ("; ", "; "), (", ", " and "))
"""(between two judgements, before the last one). None may say which way the next judgement goes, such as "but"."""

SUGGESTIONS = {
    "topic": ("Mention {v}.", "Bring in {v}.", "Let it mention {v}."),
    "contains": ("Use the word {v}.", "Put in the word {v}.", "Work in the word {v}."),
    "avoids": ("Leave out {v}.", "Write it without {v}.", "Do without {v}."),
    "starts_with": ("Let it begin with {v}.", "Put {v} first.", "Start with {v}."),
    "ends_with": ("Let it end with {v}.", "Put {v} last.", "Finish with {v}."),
    "hashtag": ("Add #{v}.", "Tag it with #{v}.", "Put in #{v}."),
    "hashtags": ("Use exactly {v} hashtags.", "Make it exactly {v} hashtags.", "Write exactly {v} hashtags."),
    "upper_case": ("Write all of it in upper case.", "Make all letters upper case.", "Use upper case only."),
    "lower_case": ("Write all of it in lower case.", "Make all letters lower case.", "Use lower case only."),
    "html_bold": ("Put a part in HTML bold.", "Put <b> and </b> around a part.", "Open and close HTML bold."),
    "html_italic": ("Put a part in HTML italics.", "Put <i> and </i> around a part.", "Open and close HTML italics."),
    "html_paragraph": (
        "Make it an HTML paragraph.",
        "Put <p> and </p> around it.",
        "Use HTML paragraph tags around it.",
    ),
    "markdown_bold": ("Put a part in Markdown bold.", "Put ** and ** around a part.", "Open and close Markdown bold."),
    "markdown_heading": ("Make it a Markdown heading.", "Start it as a Markdown heading.", "Put # and a space first."),
    "quotes": ("Put all of it in double quotes.", "Put double quotes around it.", "Open and close double quotes."),
    "json": ('Make it JSON with the key "{v}".', 'Use JSON with the key "{v}".', 'Put it in JSON under "{v}".'),
    "parentheses": ("Put a part in parentheses.", "Put ( and ) around a part.", "Open and close parentheses."),
    "exactly_words": ("Make it exactly {v} words.", "Use exactly {v} words.", "Write exactly {v} words."),
    "at_most_words": ("Make it at most {v} words.", "Use at most {v} words.", "Use no more than {v} words."),
    "sentences": ("Make it exactly {v} sentences.", "Use exactly {v} sentences.", "Write exactly {v} sentences."),
    "bullets": ("Make it {v} bullet points.", "Use exactly {v} bullet points.", "Write {v} bullet points."),
    "numbered": ("Make it a numbered list of {v}.", "Number the lines 1 to {v}.", "Use a numbered list of {v}."),
    "exclamation": (
        *("End with an exclamation mark.", "Put an exclamation mark last."),
        *("Finish with an exclamation mark.",),
    ),
    "question": ("End with a question mark.", "Put a question mark last.", "Finish with a question mark."),
    "postscript": ("Add a P.S. line.", "Put in a P.S. line.", "Let a line begin with P.S."),
    "no_commas": ("Leave out all commas.", "Write it without commas.", "Use no commas."),
}
"""kind -> ways to say what would mend it."""

NOTHING_TO_CHANGE = ("Nothing to change.", "Change nothing.", "It is fine as it is.")


class Critique(NamedTuple):
    """Language feedback on an answer, as a critic of SRT writes it.

    Attributes:
      weaknesses: one line: each requirement, and then whether the answer meets it.
      suggestions: one line: what would mend each requirement that is not met.
      score: 1 .. 10, 10 where all are met.
      refinement: a better answer, which meets all.
    """

    weaknesses: str
    suggestions: str
    score: int
    refinement: str


def score(requirements: Sequence[Requirement], response: str) -> int:
    """1 where nothing is met, 10 only where everything is, and in proportion between."""
    return score_of(verify(requirements, response))


def score_of(met: Sequence[bool]) -> int:
    """The same, of verdicts."""
    return 10 if all(met) else min(9, round(1 + 9 * sum(met) / len(met)))


def criticize(
    requirements: Sequence[Requirement],
    response: str,
    chosen: str,
    rng: np.random.Generator,
    believed: Sequence[bool] | None = None,
) -> Critique:
    """What is right and wrong with an answer, how to mend it, and the answer mended.

    As in `synthetic.reflect`, a requirement is named before it is judged, so that a model which writes this looks for
    it in the answer.

    Args:
      requirements: of the prompt, in its order; at least one.
      response: the answer, any string.
      chosen: an answer that meets all, for where no small edit does.
      rng: chooses among wordings; what is said does not depend on it, nor does the refinement.
      believed: what a critic who errs takes for met; None: the truth. It mends what it finds missing, and nothing that
        is there already.

    Returns:
      For "Tea now." with the topic tea and the hashtag silver: ("topic tea yes, #silver no.", "Add #silver.", 6,
      "Tea now. #silver").

    Raises:
      ValueError: where nothing is required, or `chosen` is needed and does not meet all.
    """
    met = verify(requirements, response)
    if not met:
        raise ValueError("there is nothing to judge: a synthetic row has requirements")
    believed = met if believed is None else believed
    # One way of speaking for a whole critique: each further choice of words would be noise to a model that learns it.
    way, (between, before_last) = int(rng.integers(NUM_WAYS)), JOINS[rng.integers(len(JOINS))]
    judged, suggested = [], []
    for r, ok in zip(requirements, believed, strict=True):
        judged.append(f"{text_of.CLAUSES[r.kind].format(v=r.value)} {(MET if ok else NOT_MET)[way]}")
        if not ok:
            suggested.append(SUGGESTIONS[r.kind][way].format(v=r.value))
    weaknesses = before_last.join([between.join(judged[:-1]), judged[-1]] if len(judged) > 1 else judged) + "."
    seen = [r for r, ok, taken in zip(requirements, met, believed, strict=True) if ok or not taken]
    refinement = repair(seen, response) if seen and not all(believed) else response
    if refinement is None:
        if not all(verify(requirements, chosen)):
            raise ValueError(f"the chosen answer {chosen!r} does not meet {requirements}")
        refinement = chosen
    suggestions = " ".join(suggested) or NOTHING_TO_CHANGE[way]
    return Critique(weaknesses, suggestions, score_of(believed), refinement)


def wordings() -> list[str]:
    """All literal texts that feedback is written with, for training a vocabulary; values are left out."""
    texts = [*text_of.CLAUSES.values(), *NOTHING_TO_CHANGE, *(text for pair in JOINS for text in pair)]
    texts += [*MET, *NOT_MET, *(text for ways in SUGGESTIONS.values() for text in ways)]
    return list(dict.fromkeys(text.replace("{v}", "").strip() for text in texts))


# Reading an answer ----------------------------------------------------------------------------------------------------


def _any(texts) -> str:
    """A pattern for one of some texts, the longest that fits."""
    return "(?:" + "|".join(re.escape(t).replace(r"\ ", " +") for t in sorted(texts, key=lambda t: (-len(t), t))) + ")"


_BANK = frozenset(text_of.BANK)
_TAILS = [tail for tails in text_of.TAILS.values() for tail in tails]
_CORES = [core for _, cores in text_of.TASKS.values() for core in cores] + list(text_of.ITEM_CORES)
_TEXTS = [*text_of.BANK, *text_of.TOPICS, *text_of.JSON_KEYS, *text_of.SENTENCES, *text_of.ITEMS, *text_of.STARTERS]
_TEXTS += [*_TAILS, *(core.replace("{t}", "") for core in _CORES), "and i it like our some this with"]
_LEXICON = frozenset(re.findall(r"[a-z]+", " ".join(_TEXTS)))  # words of answers

_TAG = re.compile(r"(</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?>)")
_HIDDEN = re.compile(  # not words: tags, list markers, "P.S.", a JSON key
    _TAG.pattern + r'|^(?:[-*] |[0-9]{1,9}\. |#{1,6} )|^p\. ?s\.|\A\s*\{\s*"\w*"\s*:', re.MULTILINE | re.IGNORECASE
)
_TOKEN = re.compile(r"#?[^\W_]+(?:['’-][^\W_]+)*")
_BREAK = re.compile(r"\n|[.!?][\"”')*\]}]*\s")  # between the last word of a sentence and the first of the next
_BEGINNING = re.compile(  # what may stand before the first word of a sentence
    r'(?:\A|\n|[.!?]["”\')*\]}]*\s)(?:[-*] |[0-9]+\. |# |\{"\w*": )?["“]?(?:<\w+>|\*\*|\()*\s*\Z'
)
_OPENING = re.compile(r"(?:<(?!p\b)\w+>|\*\*|[(\[])+\Z")
_CLOSING = re.compile(r"(?:</(?!p\b)\w+>|[)\]])*")
_ENCLOSING = (("<b>", "</b>"), ("<i>", "</i>"), ("**", "**"), ("(", ")"))
_LINKS = ("with", "and", "like")
_STARTER = _any(text_of.STARTERS)
_PHRASE = re.compile(rf"(?<![#\w])(?:{_any(_TAILS)}|(?:with +more|with|and|like) +(?P<word>{_any(_BANK)}))\b")
_TOPIC = re.compile(rf"(?<![#\w]){_any({*text_of.TOPICS, *(w for t in text_of.TOPICS for w in t.split())})}\b")
_SENTENCE_STARTS = [*text_of.SENTENCES, *(c.partition(" {t}")[0] for c in _CORES if c.find("{t}") > 8)]
_RUN_ON = re.compile(rf"(?<=[^\W_])(?: and)? (?={_any(_SENTENCE_STARTS)}\b)")


def _topic_slots(core: str) -> list[tuple[re.Pattern, str]]:
    """Where a sentence has another word for its topic, or none: what group t finds becomes a topic in this form."""
    before, after = (part.strip() for part in core.split("{t}"))
    word = r"[^\W_]+" if before and after else "(?:it|this|fun|all)"  # what the data have where a topic is missing
    slots = [(rf"\b{before}{' +' * bool(before)}(?P<t>{word}){' +' * bool(after)}{after}\b", "{}")]
    if before and after:
        slots.append((rf"\b{before} (?P<t>){after}\b", "{} "))
    elif " " in before or before == "remember":  # "great" alone stands in other sentences as well
        slots.append((rf"\b{before}(?P<t>)\b", " {}"))
    return [(re.compile(pattern), form) for pattern, form in slots]


_TOPIC_SLOTS = [slot for core in _CORES for slot in _topic_slots(core)]


class _Answer(NamedTuple):
    """An answer, read for editing. Positions are offsets in `text`."""

    text: str
    plain: str  # text in lower case, with what is no word blanked out, of the same length
    words: list[tuple[int, int]]
    hashtags: list[tuple[int, int]]
    parts: list[tuple[int, int]]  # first and last + 1 of the words of each sentence or line
    loud: bool  # upper case throughout
    needs: dict[str, str]  # kind -> value
    named: frozenset[str]  # words that the requirements ask for

    def word(self, i: int) -> str:
        return self.plain[slice(*self.words[i])]

    def holds_named(self, first: int, last: int) -> bool:
        return any(self.word(i) in self.named for i in range(first, last))


def _read(text: str, needs: dict[str, str], named: frozenset[str]) -> _Answer:
    shown = _HIDDEN.sub(lambda m: " " * len(m[0]), text)
    plain = shown.lower()
    if len(plain) != len(text):
        plain = "".join(c.lower() if len(c.lower()) == 1 else c for c in shown)
    found, tags = [], []
    for match in _TOKEN.finditer(plain):
        (tags if match[0][0] == "#" else found).append(match.span())
    starts = [0, *(i for i in range(1, len(found)) if _BREAK.search(plain, found[i - 1][1], found[i][0]))]
    parts = list(zip(starts, [*starts[1:], len(found)], strict=True)) if found else []
    return _Answer(text, plain, found, tags, parts, shown.isupper(), needs, named)


def _shuffled(answer: _Answer, options: Sequence[str]) -> list[str]:
    """Texts that could be put in, those first that the answer lacks; the same order for the same answer."""
    start = zlib.crc32(answer.text.encode(errors="replace")) % len(options)
    return sorted([*options[start:], *options[:start]], key=lambda o: o in answer.plain)


def _choose(answer: _Answer, options: Sequence[str]) -> str:
    return _shuffled(answer, options)[0]


def _strangers(answer: _Answer) -> list[str]:
    """Bank words that nobody asked for or forbade."""
    free = [w for w in text_of.BANK if w not in answer.named and w != answer.needs.get("avoids")]
    return _shuffled(answer, free)


def _phrases(answer: _Answer) -> list[tuple[int, int, int]]:
    """(start, end, number of words) of each ending that carries nothing asked for and follows other words."""
    found = [m for m in _PHRASE.finditer(answer.plain) if m["word"] not in answer.named]
    first = {answer.words[part[0]][0] for part in answer.parts}
    return [(*m.span(), len(m[0].split())) for m in found if m.start() not in first]


# Small changes of a text ----------------------------------------------------------------------------------------------


def _raise_first(text: str) -> str:
    """The first word capitalised. A bank word stays as the prompt writes it, as in the data."""
    at = re.match(r"(?:<[^<>]*>|[^\w<])*", text).end()
    word = _TOKEN.match(text, at)
    return text if word is None or word[0] in _BANK else text[:at] + text[at].upper() + text[at + 1 :]


def _cased(answer: _Answer, new: str, sentence: bool = False) -> str:
    """New words in the case of the answer."""
    if answer.loud:
        return new.upper()
    return new[:1].upper() + new[1:] if sentence and "lower_case" not in answer.needs else new


def _lower_at(answer: _Answer, at: int) -> str:
    """The answer with the word at some place no longer at the beginning of a sentence."""
    return answer.text if answer.loud else answer.text[:at] + answer.text[at].lower() + answer.text[at + 1 :]


def _swap(answer: _Answer, start: int, end: int, new: str) -> str:
    title = answer.text[start : start + 1].isupper() and new not in _BANK
    return answer.text[:start] + _cased(answer, new, sentence=title) + answer.text[end:]


def _insert(answer: _Answer, at: int, new: str) -> str:
    return f"{answer.text[:at]} {_cased(answer, new)}{answer.text[at:]}"


def _cut(text: str, start: int, end: int) -> str:
    """Without what stands from start to end, marks that would enclose nothing, and a space that would be double."""
    gone, left, right = text[start:end], text[:start], text[end:]
    while pair := next((p for p in _ENCLOSING if left.endswith(p[0]) and right.startswith(p[1])), None):
        left, right = left[: -len(pair[0])], right[len(pair[1]) :]
    if _BEGINNING.search(left):
        right = right.lstrip(" ,:;.!?")
        if (gone[:1].isupper() or gone.split(" ")[0] in _BANK) and not gone.isupper():
            right = _raise_first(right)
        if not right or right.startswith(('"', "”", "</")):
            left = left.rstrip(" ")
    elif left.endswith(" ") and (right[:1] in ' ,.;:!?)]}"”\n' or right.startswith(("</", "**"))):
        left = left.rstrip(" ")
    elif left.endswith(("(", "*", ">")):
        right = right.lstrip(" ")
    return left + right


def _cut_all(text: str, spans: Sequence[tuple[int, int]]) -> str:
    for start, end in sorted(spans, reverse=True):
        text = _cut(text, start, end)
    return text


def _behind(answer: _Answer, at: int) -> int:
    """Behind the marks that close where a word ends."""
    at = _CLOSING.match(answer.text, at).end()
    return at + 2 if answer.text.startswith("**", at) and answer.text.count("**", 0, at) % 2 else at


def _before(answer: _Answer, at: int) -> int:
    """Before the marks that open where a word starts."""
    match = _OPENING.search(answer.text, max(0, at - 12), at)
    return match.start() if match else at


def _end(answer: _Answer, part: int) -> int:
    """Behind the words of a part."""
    return _behind(answer, answer.words[answer.parts[part][1] - 1][1])


def _close(answer: _Answer, part: int) -> int:
    """Behind the marks that close a part."""
    return re.compile(r"[.!?]*").match(answer.text, _end(answer, part)).end()


def _start(answer: _Answer, part: int) -> int:
    return _before(answer, answer.words[answer.parts[part][0]][0])


def _slots(answer: _Answer) -> list[int]:
    """Where an ending fits: at the end of each part, but before the word that has to come last."""
    body, notes = [], []
    for part in reversed(range(len(answer.parts))):
        first, last = answer.parts[part]
        end = answer.words[last - 1][1]
        if last == len(answer.words) and answer.word(last - 1) == answer.needs.get("ends_with"):
            phrase = next((m for m in _PHRASE.finditer(answer.plain) if m.end() == end), None)
            start = phrase.start() if phrase else answer.words[last - 1][0]
            ends = [e for _, e in answer.words[first:last] if e <= start]
            if not ends:
                continue
            end = ends[-1]
        line = answer.text.rfind("\n", 0, answer.words[first][0]) + 1
        note = re.compile(r"\s*p\. ?s", re.IGNORECASE).match(answer.text, line)
        if answer.text[end : end + 1] != ":":
            (notes if note else body).append(_behind(answer, end))
    return body + notes


def _put_ending(answer: _Answer, word: str, last: bool = False) -> Iterator[tuple[float, str]]:
    """A word put in with an ending, in the place of another ending or behind it; at the very end if `last`."""
    short = f"{_choose(answer, _LINKS)} {word}"
    for start, end, length in _phrases(answer):
        if length > 1 and (end == answer.words[-1][1] or not last):
            yield length + 0.5, _swap(answer, start, end, short if length == 2 else f"with more {word}")
    for i, at in enumerate(_slots(answer)[: 1 if last else 2]):
        yield 2 + 0.1 * i, _insert(answer, at, short)


# Edits: kind -> edits(answer, value), each with its cost --------------------------------------------------------------

_Edits = Iterator[tuple[float, str]]


def _edit_topic(answer: _Answer, value: str) -> _Edits:
    others = list(_TOPIC.finditer(answer.plain))
    for match in others[:2]:
        yield 1.0, _swap(answer, *match.span(), value)
    for slot, form in () if others else _TOPIC_SLOTS:
        match = slot.search(answer.plain)
        if match and match["t"] not in answer.named:
            yield 1.2 if match["t"] else 1.4, _swap(answer, *match.span("t"), form.format(value))
    for i, at in enumerate(_slots(answer)[:2]):
        yield 2.5 + 0.1 * i, _insert(answer, at, f"with {value}")


def _edit_contains(answer: _Answer, value: str) -> _Edits:
    strange = [s for i, s in enumerate(answer.words) if answer.word(i) in _BANK - answer.named]
    for start, end in strange[:-3:-1]:
        yield 1.0, _swap(answer, start, end, value)
    yield from _put_ending(answer, value)


def _edit_avoids(answer: _Answer, value: str) -> _Edits:
    found = [s for s in answer.words if answer.plain[slice(*s)] == value]
    tags = [s for s in answer.hashtags if answer.plain[slice(*s)][1:] == value]
    whole = re.compile(rf"(?:(?:with +more|with|and|like) +)?\b{re.escape(value)}\b(?: +{_STARTER})?")
    spans = [m.span() for m in whole.finditer(answer.plain) if any(m.start() <= s < m.end() for s, _ in found)]
    yield 1.5, _cut_all(answer.text, [*spans, *tags])
    other, text = _strangers(answer)[0], answer.text
    for start, end in sorted([*found, *tags], reverse=True):
        new = "#" + other if (start, end) in tags else other
        text = text[:start] + _cased(answer, new) + text[end:]
    yield 1.9, text


def _edit_starts_with(answer: _Answer, value: str) -> _Edits:
    if _JSON_HEAD.match(answer.text.lstrip()):
        yield 2.0, _bare(answer.text)
    start, end = answer.words[0]
    ahead = [tag for tag in answer.hashtags if tag[0] < start]
    if ahead:
        yield 1.0 * len(ahead), _cut_all(answer.text, ahead)
        return
    if answer.word(0) in _BANK - answer.named or re.compile(rf" +{_STARTER}").match(answer.plain, end):
        yield 1.0, _swap(answer, start, end, value)
    for i in range(1, min(4, len(answer.words))):
        if answer.word(i) == value and not answer.holds_named(0, i):
            yield 0.8 * i, _cut(answer.text, start, answer.words[i][0])
    text, at = _lower_at(answer, start), _before(answer, start)
    if re.compile(_STARTER).match(answer.plain, start):
        yield 1.0, f"{text[:at]}{_cased(answer, value)} {text[at:]}"
    else:
        opening = _cased(answer, f"{value} {_choose(answer, text_of.STARTERS)}")
        yield 2.0, f"{text[:at]}{opening} {text[at:]}"


def _edit_ends_with(answer: _Answer, value: str) -> _Edits:
    start, end = answer.words[-1]
    after = [tag for tag in answer.hashtags if tag[0] > start]
    if after:
        yield 0.9 * len(after), _cut_all(answer.text, after)
        return
    last, count = answer.word(-1), len(answer.words)
    if last in _BANK - answer.named:
        yield 1.0, _swap(answer, start, end, value)
    elif count > 1 and answer.word(-2) in (*_LINKS, "more") and last not in answer.named:
        yield 1.2, _swap(answer, start, end, value)
    for i in range(max(0, count - 5), count - 1):
        if answer.word(i) == value and not answer.holds_named(i + 1, count):
            yield 0.8 * (count - 1 - i), _cut(answer.text, _behind(answer, answer.words[i][1]), end)
    yield from _put_ending(answer, value, last=True)


_OPTIONAL = frozenset(("more", "so", "new", "big", "great", "right"))  # before another word


def _drop_words(answer: _Answer, delta: int, exact: bool) -> _Edits:
    firsts = {first for first, _ in answer.parts}
    for i in range(1, len(answer.words)):
        if answer.word(i) == answer.word(i - 1):
            yield 0.5, _cut(answer.text, *answer.words[i])
        elif answer.word(i - 1) in _OPTIONAL - answer.named and i not in firsts:
            yield 1.2, _cut(answer.text, *answer.words[i - 1])
    for start, end, length in reversed(_phrases(answer)):
        if length <= delta or not exact:
            yield 0.8 * length, _cut(answer.text, start, end)
        if length - delta > 0:
            new = _choose(answer, text_of.TAILS[length - delta])
            yield length, _swap(answer, start, end, new)
    for part, (first, last) in enumerate(answer.parts):
        if len(answer.parts) > 1 and last - first <= delta and not answer.holds_named(first, last):
            yield 1 + 0.3 * (last - first), _without_part(answer, part)
    run = 0
    for i in range(len(answer.words) + 1):
        if i < len(answer.words) and answer.word(i) not in answer.named:
            run += 1
        elif run:
            size = min(run, delta)
            yield size + 1.5, _cut(answer.text, answer.words[i - size][0], answer.words[i - 1][1])
            run = 0


def _edit_exactly_words(answer: _Answer, value: str) -> _Edits:
    delta = len(words(answer.text)) - int(value)
    if delta > 0:
        yield from _drop_words(answer, delta, True)
    for length in range(min(-delta, 3), 0, -1):
        for i, at in enumerate(_slots(answer)[:2]):
            yield length + 0.1 * i, _insert(answer, at, _choose(answer, text_of.TAILS[length]))


def _edit_at_most_words(answer: _Answer, value: str) -> _Edits:
    yield from _drop_words(answer, len(words(answer.text)) - int(value), False)


def _without_part(answer: _Answer, part: int) -> str:
    text = answer.text
    if part:
        return text[: _close(answer, part - 1)] + text[_close(answer, part) :]
    return text[: _start(answer, 0)] + text[_start(answer, 1) :]


def _edit_sentences(answer: _Answer, value: str) -> _Edits:
    text, count = answer.text, len(answer.parts)
    line = _line(text)
    if line != text:  # lines of a list are no sentences
        yield 1.0, line
        return
    if count > int(value):
        for part, (first, last) in enumerate(answer.parts):
            if not answer.holds_named(first, last):
                yield 1 + 0.3 * (last - first), _without_part(answer, part)
            if part:
                rest = _lower_at(answer, answer.words[first][0])[_start(answer, part) :]
                yield 2.2, text[: _end(answer, part - 1)] + _cased(answer, " and ") + rest
        return
    for match in _RUN_ON.finditer(answer.plain):
        rest = text[match.end() :]
        rest = rest if "lower_case" in answer.needs else _raise_first(rest)
        yield 1.0, f"{text[: match.start()]}. {rest}"
    missing = _shuffled(answer, text_of.SENTENCES)[: max(1, int(value) - count)]
    new = ". ".join(_cased(answer, o, sentence=True) for o in missing)
    mark = "!" if "exclamation" in answer.needs else "?" if "question" in answer.needs else "."
    keep_last = "ends_with" in answer.needs or mark != "."
    end, close = _end(answer, count - 1), _close(answer, count - 1)
    cost = 1.3 * len(missing)
    yield cost + 0.3 * keep_last, f"{text[:end]}{text[end:close] or '.'} {new}{mark}{text[close:]}"
    at = _start(answer, count - 1)
    yield cost + 0.3 * (not keep_last), f"{text[:at]}{new}. {text[at:]}"


_LINE_MARKER = re.compile(r"\A\s*(?:[-*•]+\s*|[0-9]{1,2}[.)]?\s+|[0-9]{1,2}\.(?=\D)|#{1,6}\s|[Pp]\. ?[Ss]\.\s*)+")


def _items(text: str) -> list[str]:
    """Its lines without list markers."""
    lines = [_LINE_MARKER.sub("", line, count=1).strip() for line in text.splitlines()]
    return [line for line in lines if words(line)]


def _edit_list(kind: str, answer: _Answer, value: str) -> _Edits:
    count, text = int(value), answer.text
    if _framed(text):
        text = _bare(text)
    tags = re.search(r"(?:\s+#\w+)*\s*\Z", text)[0]
    text = text.removesuffix(tags)
    items = _items(text)
    if len(items) < count:
        items = [part for item in items for part in re.split(r"(?<=[.!?])\s+", item) if words(part)]

    def write(items):
        markers = ["- "] * count if kind == "bullets" else [f"{i}. " for i in range(1, count + 1)]
        return "\n".join(m + item for m, item in zip(markers, items, strict=True)) + tags.rstrip()

    if not items:
        return
    if len(items) == count:
        yield 1.0, write(items)
    elif len(items) < count:
        new = [_cased(answer, o, sentence=True) for o in _shuffled(answer, text_of.ITEMS)[: count - len(items)]]
        closed = bool({"ends_with", "exclamation", "question"} & answer.needs.keys()) or items[-1][-1] in ".!?"
        yield 1.5 + 0.3 * closed, write([*items, *new])
        yield 1.8 - 0.3 * closed, write([*items[:-1], *new, items[-1]])
    else:
        free = [i for i, item in enumerate(items) if not answer.named & set(words(item))]
        surplus = len(items) - count
        for gone in (free[:surplus], free[len(free) - surplus :]) if len(free) >= surplus else ():
            yield 1.0 + surplus, write([item for i, item in enumerate(items) if i not in gone])
        merged = [*items[: count - 1], " ".join(items[count - 1 :])]
        yield 1.5 + surplus, write(merged)


_JSON_HEAD = re.compile(r'\{\s*(?:"?\w*"?\s*:\s*"?|"?\w*"\s*"?)?|"?\w+"\s*:\s*"?')


def _framed(text: str) -> bool:
    text = text.strip()
    return text[:1] in '{"“' or text.startswith("<p>") or bool(_JSON_HEAD.match(text))


def _bare(text: str) -> str:
    """An answer without the double quotes, JSON or HTML paragraph around it, whole or broken."""
    text = text.strip()
    if head := _JSON_HEAD.match(text):
        text = re.sub(r'["\s]*\}?$', "", text[head.end() :])
    text = re.sub(r"</?p\b[^<>]*>", "", text, flags=re.IGNORECASE)
    return re.sub(r'["“”]', "", text).strip()


def _line(text: str) -> str:
    """The lines of a list as one: what encloses a whole answer in the data encloses one line."""
    items = _items(text)
    if len(items) < 2:
        return text
    return " ".join(item if item[-1] in ".!?" or i + 1 == len(items) else item + "." for i, item in enumerate(items))


def _edit_quotes(answer: _Answer, value: str) -> _Edits:
    text = _line(_bare(answer.text))
    if text[:1] + text[-1:] in ("()", "''", "[]"):
        yield 1.0, f'"{text[1:-1]}"'
    yield 1.1, f'"{text}"'


def _edit_json(answer: _Answer, value: str) -> _Edits:
    text = json.dumps(_line(_bare(answer.text)), ensure_ascii=False)
    yield 1.0, f'{{"{value}": {text}}}'


def _edit_markdown_heading(answer: _Answer, value: str) -> _Edits:
    text = _line(_bare(answer.text))
    text = re.sub(r"^(?:#{1,6}(?= )|#(?=[^\W_])|\*\*(?= )|[-*](?= )|[0-9]+\.(?= ))?\s*", "", text)
    yield 1.0, f"# {text}"


def _edit_html_paragraph(answer: _Answer, value: str) -> _Edits:
    text = _line(_bare(answer.text))
    no_head, no_foot = re.sub(r"^<[^<>]*>", "", text), re.sub(r"<[^<>]*>$", "", text)
    for i, inner in enumerate((re.sub(r"^<[^<>]*>", "", no_foot), text, no_head, no_foot)):
        yield 1 + 0.05 * i, f"<p>{inner.strip()}</p>"
    yield 1.5, f"<p>{_mended(_read(text, answer.needs, answer.named))}</p>"
    yield 2.0, f"<p>{_TAG.sub('', text)}</p>"


def _phrase_from(answer: _Answer, at: int) -> int:
    """Where the phrase ends that starts at or after a position."""
    start = next((s for s, _ in answer.words if s >= at), None)
    if start is None:
        return len(answer.text)
    ends = [m.end() for pattern in (_PHRASE, _TOPIC) if (m := pattern.match(answer.plain, start))]
    return max(ends) if ends else next(e for s, e in answer.words if s == start)


def _phrase_to(answer: _Answer, at: int) -> int:
    """Where the phrase starts that ends at or before a position."""
    start, end = next(((s, e) for s, e in reversed(answer.words) if e <= at), (0, 0))
    found = [m.start() for pattern in (_PHRASE, _TOPIC) for m in pattern.finditer(answer.plain) if m.end() == end]
    return min([*found, start])


def _mended(answer: _Answer) -> str:
    """The answer with each inline tag opened and closed."""
    edits, open_tag = [], None

    def complete(name, at):
        end = _phrase_from(answer, at)
        edits.append((end, end, f"</{name}>"))

    for match in _TAG.finditer(answer.text):
        name, closes = match[0].strip("</>").split()[0], match[0].startswith("</")
        if name.lower() == "p":
            edits.append((*match.span(), ""))
        elif open_tag and (closes or name == open_tag[0]):
            edits.append((*match.span(), f"</{open_tag[0]}>"))
            open_tag = None
        elif closes:
            start = _phrase_to(answer, match.start())
            edits.append((start, start, f"<{name}>"))
        else:
            if open_tag:
                complete(*open_tag)
            open_tag = (name, match.end())
    if open_tag:
        complete(*open_tag)
    text = answer.text
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _edit_mark(opening: str, closing: str, like: str, answer: _Answer, value: str) -> _Edits:
    """Marks around a phrase: wrong ones replaced, single ones completed, missing ones put in."""
    text = answer.text
    if opening.startswith("<") and _TAG.search(text):
        yield 1.0, _mended(answer)
        yield 2.5, _TAG.sub("", text)
    found = [m.span() for m in re.finditer(like, text)]
    if len(found) == 2:
        (a, b), (c, d) = found
        yield 1.0, f"{text[:a]}{opening}{text[b:c].strip()}{closing}{text[d:]}"
    elif len(found) == 1:
        a, b = found[0]
        mark, following = text[a:b], text[b : b + 1]
        if mark in "([" or (mark not in ")]" and not mark.startswith("</") and following.strip()):
            end = _phrase_from(answer, b)
            yield 1.0, f"{text[:a]}{opening}{text[b:end]}{closing}{text[end:]}"
        else:
            start = _phrase_to(answer, a)
            yield 1.0, f"{text[:start]}{opening}{text[start:a]}{closing}{text[b:]}"
    if found:
        yield 2.0, re.sub(like, "", text)
    patterns = (_PHRASE,) if opening == "(" else (_PHRASE, _TOPIC)
    spans = [m.span() for pattern in patterns for m in pattern.finditer(answer.plain)]
    spans = [s for s in spans if _before(answer, s[0]) == s[0] and _behind(answer, s[1]) == s[1]]
    turn = zlib.crc32(text.encode(errors="replace")) % max(len(spans), 1)
    for i, (start, end) in enumerate([*spans[turn:], *spans[:turn], answer.words[-1]][:3]):
        yield 1.2 + 0.1 * i, f"{text[:start]}{opening}{text[start:end]}{closing}{text[end:]}"


def _edit_hashtag(answer: _Answer, value: str) -> _Edits:
    text = answer.text
    apart = re.compile(rf"# +(?={re.escape(value)}\b)").search(answer.plain)
    if apart:
        yield 0.5, text[: apart.start() + 1] + text[apart.end() :]
    start = answer.words[-1][0]
    linked = len(answer.words) > 1 and answer.word(-2) in (*_LINKS, "more")
    if answer.word(-1) == value and not linked:
        yield 0.8, f"{text[:start]}#{text[start:]}"
    for start, end in answer.hashtags[:-3:-1]:
        yield 1.0, text[:start] + _cased(answer, f"#{value}") + text[end:]
    yield 1.3, _insert(answer, _tags_at(answer), f"#{value}")


def _tags_at(answer: _Answer) -> int:
    """Where hashtags go: behind the last mark, inside of what encloses the whole."""
    last = max(e for _, e in [*answer.words, *answer.hashtags])
    return re.compile(r"[.!?]*").match(answer.text, _behind(answer, last)).end()


def _edit_hashtags(answer: _Answer, value: str) -> _Edits:
    missing = int(value) - len(hashtags(answer.text))
    if missing > 0:
        new = " ".join(f"#{word}" for word in _strangers(answer)[:missing])
        yield 1.0 * missing, _insert(answer, _tags_at(answer), new)
    else:
        yield -0.9 * missing, _cut_all(answer.text, answer.hashtags[missing:])


def _edit_last_mark(mark: str, answer: _Answer, value: str) -> _Edits:
    after = [tag for tag in answer.hashtags if tag[0] > answer.words[-1][0]]
    if after:
        yield 0.9 * len(after), _cut_all(answer.text, after)
        return
    end = _end(answer, -1)
    rest = re.sub(r"^[.!?,;:…]+", "", answer.text[end:])
    yield 1.0, answer.text[:end] + mark + re.sub(r"[.!?]", "", rest)


def _edit_postscript(answer: _Answer, value: str) -> _Edits:
    text = answer.text.rstrip()
    sign = "p.s." if "lower_case" in answer.needs else "P.S."
    near = re.search(r"\s*(?<![^\W_])p\.? ?[ps]\b\.?:? *(?=\S)", text, re.IGNORECASE)
    if near and near.start():
        yield 1.0, f"{text[: near.start()]}\n{sign} {text[near.end() :]}"
    body, _, last = text.rpartition("\n")
    if words(body) and words(last):
        yield 1.2, f"{body}\n{sign} {last}"
    new = _cased(answer, _choose(answer, text_of.SENTENCES), sentence=True)
    yield 2.0, f"{text}\n{sign} {new}."


def _edit_case(change: Callable[[str], str], answer: _Answer, value: str) -> _Edits:
    parts = _TAG.split(answer.text)  # tags are the odd ones
    yield 1.0, "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def _edit_no_commas(answer: _Answer, value: str) -> _Edits:
    yield 1.0, re.sub(r",(?=[^\W_])", " ", answer.text).replace(",", "")


_STARS = r"(?<!^)\*\*?|^\*\*?(?! )"
_EDITS: dict[str, Callable[[_Answer, str], _Edits]] = {
    "bullets": partial(_edit_list, "bullets"),
    "numbered": partial(_edit_list, "numbered"),
    "json": _edit_json,
    "html_paragraph": _edit_html_paragraph,
    "quotes": _edit_quotes,
    "markdown_heading": _edit_markdown_heading,
    "postscript": _edit_postscript,
    "avoids": _edit_avoids,
    "topic": _edit_topic,
    "contains": _edit_contains,
    "starts_with": _edit_starts_with,
    "ends_with": _edit_ends_with,
    "sentences": _edit_sentences,
    "exactly_words": _edit_exactly_words,
    "at_most_words": _edit_at_most_words,
    "html_bold": partial(_edit_mark, "<b>", "</b>", _STARS),
    "html_italic": partial(_edit_mark, "<i>", "</i>", _STARS),
    "markdown_bold": partial(_edit_mark, "**", "**", rf"{_STARS}|</?(?:b|strong)>"),
    "parentheses": partial(_edit_mark, "(", ")", r"[()\[\]]"),
    "exclamation": partial(_edit_last_mark, "!"),
    "question": partial(_edit_last_mark, "?"),
    "hashtag": _edit_hashtag,
    "hashtags": _edit_hashtags,
    "no_commas": _edit_no_commas,
    "upper_case": partial(_edit_case, str.upper),
    "lower_case": partial(_edit_case, str.lower),
}
"""In the order in which they are mended: the form of the whole first, then words, then how many, then marks."""
_ORDER = {kind: i for i, kind in enumerate(_EDITS)}
_WORD_KINDS = ("contains", "starts_with", "ends_with", "hashtag")
_MAX_STEPS, _MAX_WORDS = 25, 50  # no answer of the data has more than 20 words


def _distance(r: Requirement, text: str) -> float:
    """About how much it will cost to mend a requirement."""
    if r.kind in ("exactly_words", "at_most_words"):
        return max(1.0, 0.9 * abs(len(words(text)) - int(r.value)))
    return 1.2 if r.kind in ("starts_with", "ends_with", "contains") else 1.0


def _is_edit(before: str, after: str, named: frozenset[str]) -> bool:
    """Whether an edited answer still is the old one, and reads like an answer.

    What loses more than half of the words, or adds twice what stays, is another answer. Where a quarter of
    the words are none that answers have, as a model writes them in its first steps, there is nothing to keep.
    """
    old, new = Counter(words(before)), Counter(words(after))
    kept = (old & new).total()
    known = sum(n for word, n in new.items() if word in _LEXICON or word in named)
    return 2 * kept >= old.total() and 3 * kept > new.total() and 4 * known >= 3 * new.total()


def repair(requirements: Sequence[Requirement], response: str) -> str | None:
    """The answer with the smallest edit found that makes it meet all requirements.

    Args:
      requirements: of the prompt.
      response: the answer, any string.

    Returns:
      The edited answer; the answer itself where it meets all; None where no edit was found, as for an answer without
      words, or none that keeps half of the words and reads like the data. The same arguments always give the same text.
    """
    needs = {r.kind: r.value for r in requirements}
    named = frozenset(w for r in requirements if r.kind in (*_WORD_KINDS, "topic") for w in r.value.lower().split())

    def failing(text):
        return [r for r, ok in zip(requirements, verify(requirements, text), strict=True) if not ok]

    if not failing(response):
        return response
    if not 0 < len(words(response)) <= _MAX_WORDS or len(response) > 10 * _MAX_WORDS:
        return None
    start = response.strip()
    count, seen, queue = 0, {start}, [(0.0, 0, 0.0, start, failing(start))]
    for _ in range(_MAX_STEPS):
        if not queue:
            return None
        _, _, cost, text, left = heapq.heappop(queue)
        if not left:
            return text if _is_edit(response, text, named) else None
        answer = _read(text, needs, named)
        if not answer.words:
            continue
        worst = min(left, key=lambda r: _ORDER[r.kind])
        for extra, edited in _EDITS[worst.kind](answer, worst.value):
            if edited not in seen:
                seen.add(edited)
                count += 1
                left = failing(edited)
                estimate = cost + extra + sum(_distance(r, edited) for r in left)
                heapq.heappush(queue, (estimate, count, cost + extra, edited, left))
    return None
