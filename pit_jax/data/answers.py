"""Answers to improve, from a file of JSON lines; of a broken line it is kept what is wrong with it."""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pit_jax.data import layouts, sources
from pit_jax.data.sources import DataError

ROLES = ("user", "assistant")
MISNAMED = ("answer", "completion", "output", "chosen", "rejected")
"""Fields that are a response under another name."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A line of the file.

    Attributes:
      number: of the line, from 1.
      prompt: x; empty where the line is broken.
      id: what the line calls itself, a string or a number; None where it says nothing.
      response: y_0, or None where the line has none.
      error: what is wrong with the line, or empty.
    """

    number: int
    prompt: str = ""
    response: str | None = None
    error: str = ""
    id: str | int | None = None


def read_answers(path: str | Path) -> Iterator[Answer]:
    """Lines {"prompt"[, "response"]} or {"messages": [{"role", "content"}, ...]} in their order, blank ones left out.

    An empty response is none. A field "id" is kept; other fields are not read, but for those that look like a response
    under another name: such a line is an error, as its answer would be lost.

    Messages are turns of user and assistant in alternation, the first by the user; a last turn by the assistant is the
    response. Earlier turns become part of the prompt as in HH-RLHF. A prompt, and the content of a message, is one
    turn whatever it quotes, see `layouts.one_turn`.

    Args:
      path: of the file; .gz and .xz are decompressed.

    Raises:
      DataError: where the file as a whole cannot be read or has no line.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    number = 0
    for line in sources.raw_lines(Path(path)):
        number, where = line.number, f"line {line.number}"
        try:
            row = sources.parse_object(line, where)
            name = row.get("id")
            yield Answer(number, *_prompt_and_response(row, where), id=name if isinstance(name, str | int) else None)
        except DataError as error:
            yield Answer(number, error=str(error))
    if not number:
        raise DataError(f"{path}: the file has no rows")


def _prompt_and_response(row: dict[str, Any], where: str) -> tuple[str, str | None]:
    if "messages" in row:
        for field in ("prompt", "response"):
            if row.get(field) is not None:
                raise DataError(f"{where}: 'messages' and {field!r} are both there: leave one out")
        prompt, response = _dialogue(row["messages"], where)
    else:
        prompt = sources.string_field(row, "prompt", where)
        response = None if row.get("response") is None else sources.string_field(row, "response", where)
        if "response" not in row:
            near = [
                *difflib.get_close_matches("response", row, cutoff=0.75),
                *(name for name in MISNAMED if name in row),
            ]
            if near:
                raise DataError(f"{where}: there is no field 'response', but {near[0]!r}: rename it, or leave it out")
    if not prompt.strip():
        raise DataError(f"{where}: the prompt is empty")
    return prompt if "messages" in row else layouts.one_turn(prompt), response or None


def _dialogue(messages: Any, where: str) -> tuple[str, str | None]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field 'messages' must be an array of at least one turn")
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: field 'messages[{i}]' must be an object")
        role = sources.string_field(message, f"messages[{i}].role", where)
        if role != ROLES[i % 2]:
            raise DataError(f"{where}: field 'messages[{i}].role' is {role!r}, but {ROLES[i % 2]!r} is next in turn")
        turns.append(sources.string_field(message, f"messages[{i}].content", where))
    response = turns.pop() if len(turns) % 2 == 0 else None
    names, turns = ("Human", "Assistant"), [layouts.one_turn(turn) for turn in turns]
    return turns[0] + "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns[1:], 1)), response
