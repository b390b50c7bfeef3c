"""Rows of a file as plain dicts, each with where it stands: JSON lines, a JSON array, or Parquet.

What cannot be read is a DataError that names file and line, or row where a file has no lines.
"""

import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple


class DataError(ValueError):
    """A file or a set of rows that cannot be used as it is."""


class Row(NamedTuple):
    """One row of a file and where it stands."""

    where: str
    fields: dict[str, Any]


_COMPRESSED = r"(\.gz|\.xz)?$"
_LINES, _JSON, _PARQUET = (
    re.compile(ending, re.IGNORECASE) for ending in (rf"\.jsonl{_COMPRESSED}", rf"\.json{_COMPRESSED}", r"\.parquet$")
)


def files_of(path: str | Path) -> list[Path]:
    """A file, or the files of rows in a folder and below it, in the order of their names.

    A folder is read as .jsonl files or as .parquet files; as .json files only where it has neither, since these are
    often descriptions that lie beside the rows.

    Raises:
      DataError: where there are none; where there are both .jsonl and .parquet files, or a file with and without
        compression, which may be the same rows twice.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    # HH-RLHF comes as folders with a train.jsonl.gz and a test.jsonl.gz each, beside a README and a licence.
    inside = sorted(f.relative_to(path) for f in path.rglob("*") if f.is_file())
    inside = [f for f in inside if not any(part.startswith(".") for part in f.parts)]
    lines, parquet, json_files = ([f for f in inside if kind.search(f.name)] for kind in (_LINES, _PARQUET, _JSON))
    if lines and parquet:
        raise DataError(
            f"{path}: has {len(lines)} .jsonl and {len(parquet)} .parquet files, which may be the same rows twice: "
            "name one of the files, or a folder that holds one kind"
        )
    found = lines or parquet or json_files
    if not found:
        raise DataError(
            f"{path}: no files of rows in this folder or below it (.jsonl or .json, also .gz or .xz; .parquet)"
        )
    names = {}
    for f in found:
        other = names.setdefault(re.sub(_COMPRESSED, "", str(f), flags=re.IGNORECASE), f)
        if other != f:
            raise DataError(f"{path}: has {other} and {f}, which may be the same rows twice: remove one of them")
    return [path / f for f in found]


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


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file, or of all files of a folder (see `files_of`), one by one.

    A .parquet file has its own; a .json file may be one array of objects; every other file has a JSON object per line.
    .gz and .xz are decompressed. A byte-order mark, carriage returns at line ends and blank lines mean nothing.

    Raises:
      DataError: names file and line or row.
      ImportError: for Parquet, where pyarrow is not installed.
    """
    for file in files_of(path):
        found = False
        kind = _parquet_rows if _PARQUET.search(file.name) else _json_rows if _JSON.search(file.name) else _line_rows
        for row in kind(file):
            found = True
            yield row
        if not found:
            raise DataError(f"{file}: the file has no rows")


def _line_rows(file: Path) -> Iterator[Row]:
    for line in raw_lines(file):
        where = f"{file}, line {line.number}"
        yield Row(where, parse_object(line, where))


def _json_rows(file: Path) -> Iterator[Row]:
    first = b""
    for line in raw_lines(file):  # to the end: a file that is not complete is found here
        first = first or line.content.lstrip()[:1]
    if first != b"[":
        yield from _line_rows(file)  # many .json files hold an object per line
        return
    with open_binary(file) as opened:  # what could be read above can be read again
        content = opened.read()
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    text = _decoded(content[start:], start, str(file))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error}); the file begins as one array of objects") from error
    for number, value in enumerate(values, 1):
        where = f"{file}, row {number}"
        yield Row(where, _object(value, where, "every row must be"))


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{file}: Parquet files are read by pyarrow: pip install -e '.[parquet]'") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}, row {number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: cannot be read after row {number} ({error}). Is the file complete, and of the kind that its name "
            "says?"
        ) from error


def parse_object(line: RawLine, where: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
      DataError: where it is none.
    """
    text = _decoded(line.content, line.offset, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); every line must hold one JSON object") from error
    return _object(row, where, "every line must hold")


def _decoded(content: bytes, offset: int, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 at byte {offset + error.start} of the file (0x{content[error.start]:02x}). Save the "
            "file as UTF-8; a compressed file needs a name that ends in .gz or .xz"
        ) from error


def _object(value: Any, where: str, rule: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is a JSON {json_type(value)}, but {rule} one JSON object")
    return value


def json_type(value: Any) -> str:
    """What a value is called in an error."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)  # Parquet has bytes and dates


def string_field(row: dict[str, Any], field: str, where: str, default: str | None = None) -> str:
    """A field that must be text."""
    name = field.rsplit(".", 1)[-1]
    if name not in row:
        if default is None:
            raise DataError(f"{where}: field {field!r} is missing; the row has {sorted(row)}")
        return default
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is a JSON {json_type(value)}, but must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} has half a surrogate pair (U+{ord(value[error.start]):04X}) at character "
            f"{error.start}: the text was cut inside a character"
        ) from error
    return value
