"""Preference rows from files: JSONL of our own fields, and HH-RLHF dialogues.

Every reader returns (rows, counts). `counts` says how many rows were dropped, by cause; a row is never dropped without
being counted, and what cannot be read is a DataError that names file, line and field. Rows that are too long for the
windows are dropped later, by `encode.drop_over_length`.
"""

import codecs
import collections
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pit_jax.data import verifier
from pit_jax.types import PreferenceExample, Requirement

Rows = list[PreferenceExample]
Counts = dict[str, int]

PROMPTS_DIFFER = "prompts_differ"
"""The dialogues of a pair differ before the last answer."""
EMPTY_ANSWER = "empty_answer"
SAME_ANSWERS = "same_answers"
NOT_A_DIALOGUE = "not_a_dialogue"
"""A dialogue that does not open with a human turn, has an empty one there, or has no answer."""


class DataError(ValueError):
    """A file or a set of rows that cannot be used as it is."""


class _Line(NamedTuple):
    """One row of a file and where it stands."""

    where: str
    row: dict[str, Any]


_ROWS = re.compile(r"\.jsonl(\.gz|\.xz)?$", re.IGNORECASE)


def _files(path: str | Path) -> list[Path]:
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    # HH-RLHF comes as folders with a train.jsonl.gz and a test.jsonl.gz each, beside a README and a licence.
    inside = (f.relative_to(path) for f in path.rglob("*.jsonl*") if f.is_file())
    files = sorted(f for f in inside if _ROWS.search(f.name) and not any(part.startswith(".") for part in f.parts))
    if not files:
        raise DataError(f"{path}: no files of rows in this folder or below it (.jsonl, .jsonl.gz or .jsonl.xz)")
    return [path / f for f in files]


READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""Of files that are cut, damaged or of another kind than their name says."""


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file; .gz and .xz are decompressed."""
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)(path, "rb")


class RawLine(NamedTuple):
    """A line of a file: its number from 1, its bytes, and how many come before it in the file."""

    number: int
    content: bytes
    offset: int


def raw_lines(path: Path) -> Iterator[RawLine]:
    """The lines that are not blank.

    Lines end at a line feed only: JSON strings may hold the other line ends of Unicode as they are.
    """
    number, offset = 0, 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                start = offset
                offset += len(line)
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    line = line[len(codecs.BOM_UTF8) :]
                    start += len(codecs.BOM_UTF8)
                if line.strip():
                    yield RawLine(number, line, start)
    except READ_ERRORS as error:
        raise DataError(
            f"{path}: cannot be read after line {number} ({error}). Is the file complete, and of the kind that its "
            "name says?"
        ) from error


def _lines(path: str | Path) -> Iterator[_Line]:
    """The JSON objects of a file, or of all files of a folder."""
    for file in _files(path):
        found = False
        for line in raw_lines(file):
            where, found = f"{file}, line {line.number}", True
            yield _Line(where, parse_object(line, where))
        if not found:
            raise DataError(f"{file}: the file has no rows")


def parse_object(line: RawLine, where: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
      DataError: where it is none.
    """
    try:
        row = json.loads(line.content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 at byte {line.offset + error.start} of the file "
            f"(0x{line.content[error.start]:02x}). Save the file as UTF-8; a compressed file needs a name that ends in "
            ".gz or .xz"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); every line must hold one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: is a JSON {_json_type(row)}, but every line must hold one JSON object")
    return row


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def string_field(row: dict[str, Any], field: str, where: str, default: str | None = None) -> str:
    """A field that must be text."""
    name = field.rsplit(".", 1)[-1]
    if name not in row:
        if default is None:
            raise DataError(f"{where}: field {field!r} is missing; the row has {sorted(row)}")
        return default
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is a JSON {_json_type(value)}, but must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} has half a surrogate pair (U+{ord(value[error.start]):04X}) at character "
            f"{error.start}: the text was cut inside a character"
        ) from error
    return value


def _requirements(row: dict[str, Any], where: str) -> tuple[Requirement, ...]:
    values = row.get("requirements", [])
    if not isinstance(values, list):
        raise DataError(f"{where}: field 'requirements' is a JSON {_json_type(values)}, but must be an array")
    found = []
    for i, value in enumerate(values):
        field = f"requirements[{i}]"
        if not isinstance(value, dict):
            raise DataError(f"{where}: field {field!r} is a JSON {_json_type(value)}, but must be an object")
        kind, argument = string_field(value, f"{field}.kind", where), string_field(value, f"{field}.value", where, "")
        if not kind:
            raise DataError(f"{where}: field '{field}.kind' is empty")
        found.append(Requirement(kind, argument))
        try:
            verifier.check_requirement(found[-1])
        except ValueError as error:
            raise DataError(f"{where}: field {field!r}: {error}") from error
    return tuple(found)


def read_jsonl(path: str | Path, *, drop_empty: bool = False, answers: bool = True) -> tuple[Rows, Counts]:
    """Rows {"prompt", "chosen", "rejected"[, "reflection"][, "requirements": [{"kind"[, "value"]}, ...]]}.

    Texts stay as they are, other fields are not looked at. Requirements are in all rows or in none. Pairs of equal
    answers teach no preference: they are dropped and counted.

    Args:
      path: a file, or a folder whose files (also in subfolders) are read in the order of their names; .gz and .xz are
        decompressed.
      drop_empty: drops and counts rows with an empty answer, which are otherwise an error.
      answers: False: rows may be prompts without chosen and rejected, all of them or none; both are then empty.

    Returns:
      (rows, number of dropped rows by cause).

    Raises:
      DataError: names file, line and field.
    """
    rows, counts = [], collections.Counter()
    for where, row in _lines(path):
        bare = not answers and all(row.get(field, "") == "" for field in ("chosen", "rejected"))
        fields = ("prompt",) if bare else ("prompt", "chosen", "rejected")
        texts = {field: string_field(row, field, where) for field in fields}
        empty = [field for field, text in texts.items() if not text.strip()]
        if empty == ["prompt"] or (empty and not drop_empty):
            raise DataError(f"{where}: field {empty[0]!r} is empty")
        example = PreferenceExample(
            **{"chosen": "", "rejected": ""} | texts,
            reflection=string_field(row, "reflection", where, ""),
            requirements=_requirements(row, where),
        )
        if empty:
            counts[EMPTY_ANSWER] += 1
        elif example.chosen == example.rejected and not bare:
            counts[SAME_ANSWERS] += 1
        elif rows and bare != has_no_answers(rows[:1]):
            raise DataError(f"{where}: fields 'chosen' and 'rejected' must be in all rows or in none")
        elif rows and bool(example.requirements) != bool(rows[0].requirements):
            raise DataError(f"{where}: field 'requirements' must be in all rows or in none")
        else:
            rows.append(example)
    return _some(path, rows, counts)


def has_no_answers(rows: Sequence[PreferenceExample]) -> bool:
    """Whether rows are prompts alone."""
    return bool(rows) and not rows[0].chosen


_HUMAN = re.compile(r"\n*Human: ")
_ASSISTANT = re.compile(r"\n\nAssistant:(?=\s|$)")


def split_dialogue(dialogue: str) -> tuple[str, str] | None:
    """x and y of an HH-RLHF dialogue, split at its last assistant turn.

    x begins after the first `Human: ` and ends with the blank line before `Assistant:`, so that the template
    `Human: {x}Assistant:` gives back the dialogue, with all its earlier turns, as it was written. y has no outer
    whitespace. A human turn after the last assistant turn belongs to y: a model that went on for the human wrote it.

    Returns:
      (x, y), or None where the text is no such dialogue.
    """
    human = _HUMAN.match(dialogue)
    turns = list(_ASSISTANT.finditer(dialogue))
    if human is None or not turns:
        return None
    prompt = dialogue[human.end() : turns[-1].start()]
    return (f"{prompt}\n\n", dialogue[turns[-1].end() :].strip()) if prompt.strip() else None


def read_hh_rlhf(path: str | Path) -> tuple[Rows, Counts]:
    """Rows {"chosen": dialogue, "rejected": dialogue} of HH-RLHF, whose turns open with Human: and Assistant:.

    The published files hold pairs without use, which are dropped and counted: `prompts_differ`, `empty_answer`,
    `same_answers`, `not_a_dialogue`.

    Args:
      path: as for `read_jsonl`.

    Returns:
      (rows, number of dropped rows by cause).

    Raises:
      DataError: names file, line and field.
    """
    rows, counts = [], collections.Counter()
    for where, row in _lines(path):
        chosen, rejected = (split_dialogue(string_field(row, field, where)) for field in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            counts[NOT_A_DIALOGUE] += 1
        elif chosen[0] != rejected[0]:
            counts[PROMPTS_DIFFER] += 1
        elif not chosen[1] or not rejected[1]:
            counts[EMPTY_ANSWER] += 1
        elif chosen[1] == rejected[1]:
            counts[SAME_ANSWERS] += 1
        else:
            rows.append(PreferenceExample(prompt=chosen[0], chosen=chosen[1], rejected=rejected[1]))
    return _some(path, rows, counts)


def _some(path: str | Path, rows: Rows, counts: Counts) -> tuple[Rows, Counts]:
    if not rows:
        hint = "; for rows of prompt, chosen, rejected: --config.data.format=jsonl" if counts[NOT_A_DIALOGUE] else ""
        raise DataError(f"{path}: no row is left; all were dropped: {dict(counts)}{hint}")
    return rows, dict(counts)


FORMATS = {"jsonl": read_jsonl, "hh_rlhf": read_hh_rlhf}


def detect_format(path: str | Path) -> str:
    """A key of FORMATS, from the first row: HH-RLHF rows have both answers and no prompt."""
    where, row = next(_lines(path))
    if "prompt" in row:
        return "jsonl"
    if {"chosen", "rejected"} <= row.keys():
        return "hh_rlhf"
    raise DataError(
        f"{where}: neither the fields 'prompt', 'chosen', 'rejected' (jsonl) nor 'chosen', 'rejected' (hh_rlhf); the "
        f"row has {sorted(row)}"
    )


def read(path: str | Path, format: str = "auto", *, answers: bool = True) -> tuple[Rows, Counts]:
    """Reads preference rows.

    Args:
      path: a file, or a folder whose files (also in subfolders) are read in the order of their names; .gz and .xz are
        decompressed.
      format: jsonl, hh_rlhf, or auto, which looks at the first row.
      answers: False: prompts alone will do, see `read_jsonl`.

    Returns:
      (rows, number of dropped rows by cause).

    Raises:
      DataError: names file, line and field.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(f"format is {format!r}: use auto, {' or '.join(FORMATS)}")
    format = detect_format(path) if format == "auto" else format
    return read_jsonl(path, answers=answers) if format == "jsonl" else FORMATS[format](path)


def _prompt_groups(rows: Sequence[PreferenceExample], seed: int, purpose: str) -> list[list[int]]:
    """Row numbers by first turn of the prompt, in the order of its hash: order of rows and processes play no part.

    A dialogue and the same dialogue one turn later are two prompts, of which one is most of the other.
    """
    groups = collections.defaultdict(list)
    for i, row in enumerate(rows):
        groups[_ASSISTANT.split(row.prompt, maxsplit=1)[0].strip()].append(i)

    def key(turn: str) -> bytes:
        return hashlib.sha256(f"{purpose} {seed} {turn}".encode("utf-8", "surrogatepass")).digest()

    return [groups[turn] for turn in sorted(groups, key=key)]


def folds(rows: Sequence[PreferenceExample], seed: int, num_parts: int = 3) -> list[Rows]:
    """Equal parts, by default for SFT, reward models and RL (PIT section 4.1), that share no prompt and no first turn.

    First turns are dealt in the order of a hash, the most frequent first, each to the smallest part, so sizes differ by
    at most one row where first turns do not repeat, and by at most the rows of one first turn otherwise. Within a part
    rows keep their order.
    """
    groups = sorted(_prompt_groups(rows, seed, "folds"), key=len, reverse=True)  # stable: hash order within a size
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for group in groups:
        min(parts, key=len).extend(group)
    if not all(parts):
        raise DataError(
            f"{len(groups)} different prompts cannot be dealt into {num_parts} parts; at least {num_parts} are needed"
        )
    return [[rows[i] for i in sorted(part)] for part in parts]


def split_off(
    rows: Sequence[PreferenceExample], num_selection: int, num_test: int, seed: int
) -> tuple[Rows, Rows, Rows]:
    """Takes rows to select checkpoints with and rows to test with; no two parts share a prompt or a first turn.

    Args:
      rows: all rows.
      num_selection, num_test: rows of the two parts. A part falls short only where prompts repeat so often that they
        do not add up to the number.
      seed: of the hash that prompts are ordered by.

    Returns:
      (training rows, selection rows, test rows), each in the order of `rows`.

    Raises:
      DataError: where nothing would be left for training, or no prompt's rows fit a part.
    """
    if min(num_selection, num_test) < 0:
        raise DataError(f"num_selection={num_selection} and num_test={num_test} must not be negative")
    if num_selection + num_test >= len(rows):
        raise DataError(
            f"num_selection={num_selection} and num_test={num_test} leave nothing of {len(rows)} rows for training: "
            "lower --config.data.num_selection and --config.data.num_test, or give more rows"
        )
    selection, test, training = [], [], []
    for group in _prompt_groups(rows, seed, "split"):
        if len(test) + len(group) <= num_test:
            test += group
        elif len(selection) + len(group) <= num_selection:
            selection += group
        else:
            training += group
    for name, part, number in (("selection", selection, num_selection), ("test", test, num_test)):
        if number and not part:
            raise DataError(f"no prompt repeats so seldom that its rows fit num_{name}={number}")
    return tuple([rows[i] for i in sorted(part)] for part in (training, selection, test))
