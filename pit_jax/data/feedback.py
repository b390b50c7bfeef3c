"""Language feedback (SRT section 3.1): what a critic is asked, what it says, and the sequence that a model learns.

The headings and the form of the score are those of the paper's Table 1; all other words are ours. Two files can be
replaced: `templates/critic.txt`, what a language model is asked, and `templates/srt.txt`, the sequence of Equation 1.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pit_jax.data import templates
from pit_jax.data.chat import Chat
from pit_jax.data.tokenizer import Tokenizer

PARTS = ("weaknesses", "suggestions", "score", "refinement")
"""Of a critique, in the order of the template."""

WITHOUT = {
    "": (),
    "score": ("score",),
    "suggestions": ("suggestions",),
    "weaknesses": ("weaknesses",),
    "feedback": ("weaknesses", "suggestions", "score"),
    "all_but_refinement": ("response", "weaknesses", "suggestions", "score"),
}
"""Rows of the paper's Table 6 -> what is left out of the sequence."""

MIN_SCORE, MAX_SCORE = 1, 10


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What a critic says of a response; None where a part could not be found.

    Attributes:
      weaknesses: where the response falls short.
      suggestions: what to do about it.
      score: from 1 to 10.
      refinement: a better response.
    """

    weaknesses: str | None = None
    suggestions: str | None = None
    score: float | None = None
    refinement: str | None = None

    @property
    def lacking(self) -> tuple[str, ...]:
        """Parts that are not there, or are empty."""
        return tuple(part for part in PARTS if getattr(self, part) in (None, ""))


# -------------------------------------------------------------------------------------------------------------- parsing

_NAMES = {
    "feedback": r"feedback",
    "weaknesses": r"(?:identif\w+ )?(?:the )?(?:main )?weakness(?:es)?",
    "suggestions": r"(?:offer\w* )?(?:actionable )?(?:advice|suggestions?)(?: for improve\w+)?",
    "score": r"(?:conclude with an? )?(?:overall )?(?:score|rating)",
    "refinement": r"(?:show\w* (?:an? )?)?(?:the )?(?:improved|refined|revised) (?:response|answer|version)",
}
# Possessive repetitions (*+), so that a hostile line takes linear time.
_GAP = r"[ \t]*+"
_STEP = rf"(?:\(?\d{{1,2}}+[.):])?+{_GAP}"
_BULLET = r"(?P<bullet>[-*\u2022][ \t]++(?=[*_]{2}))?+"  # before what is bold: a plain item of a list is no heading
_LEAD = rf"{_GAP}{_BULLET}(?P<hashes>#{{1,6}}+)?+{_GAP}{_STEP}(?P<bold>[*_]{{1,3}}+)?+{_GAP}{_STEP}"
_NAME = "|".join(f"(?P<{part}>{name})" for part, name in _NAMES.items())
_REMARK = rf"(?(weaknesses)|(?(suggestions)|(?:{_GAP}\([^()\n]{{0,40}}+\))?+))"  # "Overall Score (1-10):"
_END = rf"(?:[:\uff1a](?(bold)[*_]{{0,3}}+)|(?=\\?\[)|{_GAP}$)"
_HEADING = re.compile(
    rf"{_LEAD}(?:{_NAME}){_REMARK}{_GAP}(?(bold)[*_]{{0,3}}+){_REMARK}{_GAP}{_END}{_GAP}", re.IGNORECASE
)
_NUMBER = r"(\d{1,3}(?:\.\d{1,3})?)"
_OUT_OF = r"(?:[ \t]*/[ \t]*10|[ \t]+out[ \t]+of[ \t]+10)?"
_MARKED = re.compile(rf"\\?\[[ \t]*\\?\[[ \t*_`]*{_NUMBER}{_OUT_OF}[ \t*_`]*\\?\][ \t]*\\?\]")
_PLAIN = re.compile(rf"[ \t*_`\[]*{_NUMBER}{_OUT_OF}[ \t*_`\].]*(?:\n|$)")
_IN_REMARK = re.compile(rf"\([ \t]*{_NUMBER}{_OUT_OF}[ \t]*\)")


class _Heading(NamedTuple):
    part: str
    start: int
    body: int
    line: str
    hashes: bool
    bullet: bool
    strong: bool


def _headings(text: str) -> list[_Heading]:
    found = []
    at = 0
    for line in text.split("\n"):
        match = _HEADING.match(line)
        if match and line.strip():
            part = next(name for name in _NAMES if match[name])
            strong = bool(match["hashes"] or match["bold"] or "overall" in match[0].lower())
            kinds = bool(match["hashes"]), bool(match["bullet"]), strong
            found.append(_Heading(part, at, at + match.end(), match[0], *kinds))
        at += len(line) + 1
    # Points of a list may be named as parts are: they head a part only where nothing else does.
    plain = {heading.part for heading in found if not heading.bullet}
    return [heading for heading in found if not heading.bullet or heading.part not in plain]


def parse(text: str) -> Feedback:
    """A critique, in any of the spellings that models use for the headings.

    A heading stands at the start of a line: "### Improved Response", "###Improved Response", "**Weaknesses:**",
    "2. Offer Actionable Advice:". A score is "Overall Score: [[7]]", also with the number on the next line, without
    brackets or out of 10; of several the last before the refinement counts, a marked one before one that is not. What
    follows the heading of the refinement is the refinement as it is, whatever it says; where the score comes last, up
    to that: a line that has [[7]], or that ends the text and is no plain line such as "Score: 3". Thoughts between
    <think> and </think> are not part of the critique.

    Args:
      text: what the critic wrote; any text.

    Returns:
      The parts that were found.
    """
    if text.lstrip().startswith("<think>"):
        _, end, text = text.partition("</think>")
        if not end:
            return Feedback()  # cut off while it was thinking
    text = text.replace("\r\n", "\n")
    headings = _headings(text)
    end_of = lambda i: headings[i + 1].start if i + 1 < len(headings) else len(text)  # noqa: E731

    def score_of(heading: _Heading, body: str) -> tuple[float | None, bool]:
        """(score, whether it is marked)."""
        marked, plain = _MARKED.findall(body), _PLAIN.match(body.lstrip("\n"))
        beside = _IN_REMARK.search(heading.line)
        number = marked[-1] if marked else plain[1] if plain else beside[1] if beside else None
        value = float(number) if number is not None else None
        return (value if value is not None and MIN_SCORE <= value <= MAX_SCORE else None), bool(marked)

    def is_last(i: int) -> bool:
        """Whether a score behind the refinement is the critique's: answers have lines such as "Score: 3" too."""
        body = text[headings[i].body : end_of(i)]
        first, _, rest = body.lstrip("\n").partition("\n")
        value, marked = score_of(headings[i], first)
        return value is not None and (marked or (headings[i].strong and not rest.strip()))

    final = max((i for i, heading in enumerate(headings) if heading.part == "refinement"), default=len(headings))
    headings = [h for i, h in enumerate(headings) if h.part != "score" or i < final or is_last(i)]
    # The refinement is behind the score; one heading with hashes wins over others, such as a step that is named first.
    scored = [i for i, heading in enumerate(headings) if heading.part == "score"]
    ends = [i for i, h in enumerate(headings) if h.part == "refinement" and (not scored or i > scored[0])]
    empty = lambda i: i + 1 < len(headings) and not text[headings[i].body : headings[i + 1].start].strip()  # noqa: E731
    hashed, full = [i for i in ends if headings[i].hashes], [i for i in ends if not empty(i)]
    last = next(iter([*hashed, *full, *ends]), len(headings))
    found: dict[str, str | float | None] = {}
    is_marked = False
    for i, heading in enumerate(headings[:last]):
        body = text[heading.body : end_of(i)]
        if heading.part == "score":
            value, marked = score_of(heading, body)
            if value is not None and marked >= is_marked:
                found["score"], is_marked = value, marked
        elif heading.part in PARTS and body.strip():
            found.setdefault(heading.part, body.strip())
    if last < len(headings):
        found["refinement"] = text[headings[last].body :].strip()
    return Feedback(**found)


def render(feedback: Feedback) -> str:
    """A critique as `parse` reads it."""
    lines = [
        f"Weaknesses: {feedback.weaknesses}" if feedback.weaknesses else "",
        f"Suggestions: {feedback.suggestions}" if feedback.suggestions else "",
        f"Overall Score: [[{number(feedback.score)}]]" if feedback.score is not None else "",
        f"### Improved Response\n{feedback.refinement}" if feedback.refinement is not None else "",
    ]
    return "\n".join(filter(None, lines))


def number(score: float) -> str:
    """A score as it is written: 7, or 7.5."""
    return f"{score:g}"


# --------------------------------------------------------------------------------------------------------------- asking


def critic_prompt(template: str, prompt: str, response: str) -> str:
    """The text that a language model is asked with, see `fill_quoted`."""
    return fill_quoted(template, prompt=prompt.strip(), response=response)


def fill_quoted(template: str, **fields: str) -> str:
    """A template for a language model with its fields.

    Fields are filled in one pass, so a field name in a text stays text. A line of a text that reads like a heading of
    the template gets "> " before it, so that no answer can end its section and write the next.
    """
    headings = {_letters(line) for line in template.splitlines() if line.startswith("#")}
    quote = lambda line: f"> {line}" if line.lstrip().startswith("#") and _letters(line) in headings else line  # noqa: E731
    texts = {name: "".join(map(quote, text.splitlines(keepends=True))) for name, text in fields.items()}
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda match: texts[match[1]], template)


def load_template(name: str, folder: str | Path = "") -> str:
    """`critic` or `srt`: the text of a file of `templates`, or of a folder that replaces it.

    Raises:
      ValueError: where it cannot be read, lacks a field or names an unknown one.
    """
    return templates.load(name, folder)


def _letters(line: str) -> str:
    return re.sub(r"[^a-z]", "", line.lower())


# ------------------------------------------------------------------------------------------------------------- sequence


@dataclasses.dataclass(frozen=True)
class Form:
    """The sequence of Equation 1, (y, f, r) behind x, in one row of ids.

    A literal of the template belongs to the field behind it: where the score is not learnt, "Overall Score:" is not.

    Attributes:
      tokenizer: ids.
      template: text of srt.txt; it begins as policy.txt does.
      without: a key of WITHOUT: what the sequence leaves out.
      chat: the chat template of its turns, whose tokenizer is then `tokenizer`.
    """

    tokenizer: Tokenizer
    template: str
    without: str = ""
    chat: Chat | None = None

    def __post_init__(self):
        if self.without not in WITHOUT:
            raise ValueError(f"without is {self.without!r}: use one of {', '.join(filter(None, WITHOUT))}, or leave it")
        gone = WITHOUT[self.without]
        text = self.template.replace("{response}", "", 1) if "response" in gone else self.template
        lines = [line for line in text.split("\n") if not any(f"{{{field}}}" in line for field in gone)]
        is_heading = lambda i: i + 1 < len(lines) and lines[i].startswith("#")  # noqa: E731
        if "response" in gone:  # x -> r, as plain SFT
            lines = ["".join(line for i, line in enumerate(lines) if not is_heading(i))]
        else:
            lines = [line for i, line in enumerate(lines) if not (is_heading(i) and lines[i + 1].startswith("#"))]
        text = "\n".join(lines)
        parts = self.chat.parse(text) if self.chat else templates.parse(self.tokenizer, text)
        fields = [value for kind, value in parts if kind == "field"]
        if fields != [f for f in ("prompt", "response", *PARTS) if f not in gone]:
            raise ValueError(f"srt.txt must name prompt, response, {', '.join(PARTS)} in this order, but has {fields}")
        object.__setattr__(self, "_parts", parts)

    def prompt(self, prompt: str) -> list[int]:
        """x: all up to the response."""
        return self._before("response" if "response" not in WITHOUT[self.without] else "refinement", prompt=prompt)

    def feedback_prompt(self, prompt: str, response: str | Sequence[int]) -> list[int]:
        """x and y, and the words that stand before the critique."""
        return self._before(self._after_response(), prompt=prompt, response=response)

    @property
    def feedback_begins(self) -> tuple[int, ...]:
        """The ids behind a response: where a model that writes the whole sequence has ended its answer."""
        return self._literal_before(self._after_response())

    @property
    def refinement_begins(self) -> tuple[int, ...]:
        """The ids before the refinement: where a critique is whole."""
        return self._literal_before("refinement")

    def critique(self, feedback: Feedback) -> list[int]:
        """What stands between `feedback_begins` and the refinement, with the words that announce it."""
        fields = self._values("", "", feedback)
        start = len(self.feedback_prompt("", ""))
        return templates.fill(self.tokenizer, self._parts[: self._parts.index(("field", "refinement"))], **fields)[
            start:
        ]

    @property
    def feedback_begins_text(self) -> str:
        """The same as `feedback_begins` in words, so that a critique is parsed with its first heading."""
        return self.tokenizer.decode(self.feedback_begins)

    def turns(
        self,
        prompt: str,
        response: str | Sequence[int],
        feedback: Feedback,
        learn: Sequence[str] = ("response", *PARTS),
    ) -> list[list[int]]:
        """The row as turns that are read and learnt in alternation, see `batches.token_rows`.

        Args:
          prompt: x, which is never learnt.
          response: y.
          feedback: f and r; all parts that the form has must be there.
          learn: fields with loss.
        """
        values = self._values(prompt, response, feedback)
        turns: list[list[int]] = [[]]
        pending: list[int] = []
        learnt = False
        for kind, part in self._parts:
            if kind == "ids":
                pending += part
                continue
            learnt = part != "prompt" and part in learn
            # "Assistant:" is of the prompt, all other literals of what stands behind them.
            self._add(turns, pending, learnt and part != self._first_answer())
            value = values[part]
            self._add(turns, self._ids(part, value), learnt)
            pending = []
        self._add(turns, pending, learnt)  # EOS
        return turns

    @staticmethod
    def _values(prompt: str, response: str | Sequence[int], feedback: Feedback) -> dict:
        score = "" if feedback.score is None else number(feedback.score)
        return {"prompt": prompt, "response": response} | dataclasses.asdict(feedback) | {"score": score}

    @staticmethod
    def _add(turns: list[list[int]], ids: Sequence[int], learnt: bool) -> None:
        if ids and (len(turns) % 2 == 0) != learnt:
            turns.append([])
        turns[-1] += ids

    def _first_answer(self) -> str:
        return "refinement" if "response" in WITHOUT[self.without] else "response"

    def _after_response(self) -> str:
        fields = [value for kind, value in self._parts if kind == "field"]
        return fields[fields.index("response") + 1]

    def _before(self, field: str, **values: str | Sequence[int]) -> list[int]:
        index = self._parts.index(("field", field))
        ids = {name: self._ids(name, value) for name, value in values.items()}
        return templates.fill(self.tokenizer, self._parts[:index], **ids)

    def _ids(self, field: str, value: str | Sequence[int]) -> list[int]:
        if not isinstance(value, str):
            return list(value)
        return self.chat.prompt(value) if self.chat and field == "prompt" else self.tokenizer.encode(value)

    def _literal_before(self, field: str) -> tuple[int, ...]:
        """All ids between a field and the one before it: words, and EOS where the template ends a turn there."""
        end = start = self._parts.index(("field", field))
        while self._parts[start - 1][0] == "ids":
            start -= 1
        return tuple(i for _, ids in self._parts[start:end] for i in ids)
