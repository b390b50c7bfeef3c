"""What an evaluation has made, in files below WORKDIR/evaluation, so that nothing is generated or judged twice.

answers/SPLIT/NAME.jsonl          one line per prompt: text, ids, what it took
scores/SPLIT/JUDGE/NAME.json      one score per prompt
verdicts/SPLIT/JUDGE/A_vs_B.json  one outcome per prompt, with what the judge said
gaps/SPLIT/NAME.json              R_PIT's gap and gain of each answer over the one that it improves
agreement/NAME.json               scores of labelled pairs, and of pairs of a policy's own answers
human/                            keys of sheets and the verdicts of people
calls/                            what a language model has been asked, and its replies

Each file begins with its `spec`: what it was made from. Where that has changed (a stage was trained again, another
temperature, other prompts), the file is made anew. Models are in it by the checksums of their parameters.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pit_jax import interrupts
from pit_jax.files import read_json, write_json_atomic, write_text_atomic
from pit_jax.pipelines.improve import Step

Spec = dict[str, Any]
"""Plain JSON that says what something was made from."""


class AnswerSet(NamedTuple):
    """One answer per prompt.

    Attributes:
      name: such as "pit_iteration_2".
      spec: what it was made from.
      steps: ids and what they took.
      texts: of the ids.
      seconds: that it took, with compilation.
    """

    name: str
    spec: Spec
    steps: list[Step]
    texts: list[str]
    seconds: float

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """Without EOS."""
        return [step.ids for step in self.steps]


def digest(value: Any) -> str:
    """A short name of plain JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def line(value: Any) -> str:
    """Plain JSON on one line."""
    return json.dumps(value, ensure_ascii=False)


def answers(
    path: Path, name: str, spec: Spec, make: Callable[[], Sequence[Step]], text: Callable[[Sequence[int]], str]
) -> AnswerSet:
    """The answers of a file where it has this spec; else made and written.

    Args:
      path: of the file.
      name: of the set.
      spec: what the answers are made from.
      make: writes them.
      text: of ids.
    """
    if path.exists():
        found = read_answers(path, name)
        if found.spec == spec:
            return found
    interrupts.check()
    started = time.perf_counter()
    steps = list(make())
    seconds = time.perf_counter() - started
    lines = [json.dumps({"spec": spec, "seconds": seconds}, sort_keys=True, ensure_ascii=False) + "\n"]
    texts = [text(step.ids) for step in steps]
    for i, (step, answer) in enumerate(zip(steps, texts, strict=True)):
        line = {"row": i, "text": answer, "ids": list(step.ids), "read": step.read, "written": step.written}
        line |= {"scored": step.scored} if step.scored else {}
        line |= {} if step.parsed else {"parsed": False}
        line |= {"feedback": step.feedback} if step.feedback else {}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text_atomic(path, "".join(lines))
    return AnswerSet(name, spec, steps, texts, seconds)


def read_answers(path: Path, name: str) -> AnswerSet:
    """The answers of a file.

    Raises:
      ValueError: where it is no such file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            header, *lines = map(json.loads, file)
        steps = [
            Step(
                *(tuple(line["ids"]), line["read"], line["written"]),
                *(line.get("scored", 0), line.get("parsed", True)),
                feedback=line.get("feedback", ""),
            )
            for line in lines
        ]
        return AnswerSet(name, header["spec"], steps, [line["text"] for line in lines], header["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete it, and it is made again") from error


def values(path: Path, spec: Spec, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The values of a JSON file where it has this spec; else made and written.

    Values with "incomplete" above 0 (a server did not answer some requests) are used and written, and made anew the
    next time.
    """
    if path.exists():
        found = read_json(path)
        if found["spec"] == spec and not found["values"].get("incomplete"):
            return found["values"]
    made = make()
    write_json_atomic(path, {"spec": spec, "values": made})
    return read_json(path)["values"]
