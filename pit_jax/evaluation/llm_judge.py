"""A language model as the judge of two answers, asked in both orders (PIT section 4.4 and appendix E.2).

The files in `prompts` beside this module are three judges in our own words: `helpful` (appendix E.2.1, HH-RLHF),
`summary` (E.2.2) and `instructions` (E.2.3, synthetic data). The headings and the marks [[A]], [[B]], [[C]] are the
paper's.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pit_jax import client, processes
from pit_jax.evaluation.win_rate import Verdicts

TEMPLATES = ("helpful", "summary", "instructions")
FIELDS = {"prompt", "first", "second"}

_FIELD = re.compile(r"\{([a-z_]+)\}")
_HEADING = re.compile(r"\s*--.*--\s*")
_MARK = re.compile(r"\\?\[[ \t]*\\?\[[ \t*_`]*([abc])[ \t*_`]*\\?\][ \t]*\\?\]", re.IGNORECASE)
_VALUES = {"a": 1, "b": -1, "c": 0}


class Detail(NamedTuple):
    """What the judge said of a pair. Index 0 of each: first was shown first; 1: second was.

    Attributes:
      replies: as they came; None where the request failed.
      verdicts: 1 for first, -1 for second, 0 for a tie, None where there is none.
      errors: why the request failed; empty where it did not.
    """

    replies: tuple[str | None, str | None]
    verdicts: tuple[int | None, int | None]
    errors: tuple[str, str]


class Judgement(NamedTuple):
    """See `judge`."""

    verdicts: Verdicts
    counts: dict[str, int | float | None]
    details: list[Detail]


def load_template(name: str, folder: str | Path = "") -> str:
    """The text of a judge prompt with the fields {prompt}, {first} and {second}.

    Args:
      name: one of TEMPLATES, or the path of a file of your own (it ends in .txt).
      folder: where `NAME.txt` is read instead of the package's own.

    Raises:
      ValueError: where the file cannot be read, lacks a field or a mark, or names an unknown field.
    """
    if name.endswith(".txt"):
        path = Path(folder) / name
    elif folder or name in TEMPLATES:
        path = Path(folder or Path(__file__).parent / "prompts") / f"{name}.txt"
    else:
        raise ValueError(f"judge prompt {name!r} is none of {', '.join(TEMPLATES)}, and no file that ends in .txt.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"judge prompt {path} cannot be read: {error}") from error
    check_template(text, str(path))
    return text


def check_template(text: str, name: str = "template") -> None:
    """Raises ValueError where a judge prompt lacks a field or a mark, or names an unknown field."""
    found = set(_FIELD.findall(text))
    if found != FIELDS:
        raise ValueError(f"judge prompt {name} has the fields {sorted(found)}, but needs {sorted(FIELDS)}.")
    missing = [mark for mark in ("[[A]]", "[[B]]", "[[C]]") if mark not in text]
    if missing:
        raise ValueError(
            f"judge prompt {name} does not ask for {', '.join(missing)}: the verdict is read from the mark."
        )


def fill(template: str, *, prompt: str, first: str, second: str) -> str:
    """A judge prompt with its fields.

    Fields are filled in one pass, so a field name in a text stays text. A line of a text that reads like a heading of
    the template ("--User Question--") gets "> " before it: else an answer could end its section and write the other's.
    """
    headings = {_letters(line) for line in template.splitlines() if _HEADING.fullmatch(line)}
    quote = lambda line: "> " + line if line.lstrip().startswith("-") and _letters(line) in headings else line  # noqa: E731
    texts = {
        name: "".join(map(quote, text.splitlines(keepends=True)))
        for name, text in {"prompt": prompt, "first": first, "second": second}.items()
    }
    return _FIELD.sub(lambda match: texts[match[1]], template)


def parse_verdict(reply: str) -> int | None:
    """1 for [[A]], -1 for [[B]], 0 for [[C]], None where the reply has no verdict.

    The last mark counts, as the verdict comes after the explanation; spaces, letter case, bold and backslashes do not
    matter. Where the line of the last mark holds different marks (a judge that repeats its instructions) there is no
    verdict. Thoughts between <think> and </think> are not part of the reply.
    """
    before, end, after = reply.rpartition("</think>")
    if not end and reply.lstrip().startswith("<think>"):
        return None  # cut off while it was thinking
    for line in reversed(after.splitlines()):
        marks = {mark.lower() for mark in _MARK.findall(line)}
        if marks:
            return _VALUES[marks.pop()] if len(marks) == 1 else None
    return None


def judge(
    config: client.ClientConfig,
    template: str,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    description: str = "judge",
) -> Judgement:
    """Asks which of two answers to each prompt is better, in both orders.

    A pair is won only where both orders say so. A win in one order and a tie in the other are a tie, and so are wins of
    different answers, which are counted as inconsistent. Where a reply has no verdict or a request failed, in either
    order, the pair has no verdict.

    Args:
      config: the judge, see `client.ClientConfig`.
      template: text with {prompt}, {first} and {second}, see `load_template`.
      prompts: [n].
      first: [n], answers to them.
      second: [n], other answers to them.
      description: the name beside the progress bar.

    Returns:
      verdicts: outcome and mask.
      counts: n: pairs; parse_failures and failed_requests: of 2n replies; cut_off: replies that ended at max_tokens;
        no_verdict: pairs without one; inconsistent: pairs whose orders name different winners; first_position_rate:
        share of the replies for the answer shown first, among those for either (0.5 without position bias; None where
        there are none); prompt_tokens and completion_tokens: of all replies, cached or not; calls and cached_calls:
        requests that the server or the cache answered.
      details: [n], the replies.

    Raises:
      ValueError: where the lengths differ, or the template is none.
      client.ApiError: where the server refuses the requests for a reason that does not pass.
    """
    check_template(template)
    if not len(prompts) == len(first) == len(second):
        raise ValueError(f"there are {len(prompts)} prompts, {len(first)} first and {len(second)} second answers.")
    requests = [
        [{"role": "user", "content": fill(template, prompt=x, first=a, second=b)}]
        for x, y1, y2 in zip(prompts, first, second, strict=True)
        for a, b in ((y1, y2), (y2, y1))
    ]
    said = processes.on_first(lambda: client.complete(config, requests, description=description))
    completions, usage = [client.Completion(*c) for c in said[0]], client.Usage(*said[1])
    shown = [None if c.text is None else parse_verdict(c.text) for c in completions]  # 1: for the answer shown first
    details, outcome, mask = [], np.zeros(len(prompts), np.int8), np.zeros(len(prompts), bool)
    inconsistent = 0
    for i in range(len(prompts)):
        pair = completions[2 * i : 2 * i + 2]
        forward, backward = shown[2 * i], None if shown[2 * i + 1] is None else -shown[2 * i + 1]
        details.append(Detail(tuple(c.text for c in pair), (forward, backward), tuple(c.error for c in pair)))
        if forward is None or backward is None:
            continue
        mask[i] = True
        outcome[i] = forward if forward == backward else 0
        inconsistent += forward * backward == -1
    decided = [v for v in shown if v]
    counts = {
        "n": len(prompts),
        "parse_failures": sum(v is None and c.text is not None for v, c in zip(shown, completions, strict=True)),
        "failed_requests": sum(c.text is None for c in completions),
        "cut_off": sum(c.finish_reason == "length" for c in completions),
        "no_verdict": int(np.count_nonzero(~mask)),
        "inconsistent": inconsistent,
        "first_position_rate": decided.count(1) / len(decided) if decided else None,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "calls": usage.calls,
        "cached_calls": usage.cached,
    }
    return Judgement(Verdicts(outcome, mask, np.ones(len(mask), np.bool_)), counts, details)


def _letters(line: str) -> str:
    return re.sub(r"[^a-z]", "", line.lower())
