"""Plain text to pretrain on: text files, and JSON lines with a field "text"."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pit_jax.data import row_files
from pit_jax.data.row_files import DataError
from pit_jax.data.tokenizer import Tokenizer


def read(path: str | Path) -> list[str]:
    """The documents of a file, or of all files of a folder and its subfolders.

    A text file is one document; a line {"text": ...} of a .jsonl file is one. Both may be compressed (.gz, .xz). Lines
    end as on Unix; empty documents are left out.

    Raises:
      DataError: names file and line; for a file of another kind.
    """
    documents = [text.replace("\r\n", "\n") for file in _files(Path(path)) for text in _documents(file) if text.strip()]
    if not documents:
        raise DataError(f"{path}: there is no text in it")
    return documents


def in_order(documents: list[str], seed: int) -> list[str]:
    """Documents in the order of a hash: that of files and lines plays no part."""

    def key(text: str) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).digest()

    return sorted(documents, key=key)


def sequences(
    documents: list[str], tokenizer: Tokenizer, length: int, num_tokens: int = 0
) -> list[tuple[list[int], np.ndarray]]:
    """Documents cut into rows of one length: (BOS, ids), which language modelling learns from.

    Args:
      documents: text, taken in this order.
      tokenizer: ids.
      length: tokens of a row with its BOS; what a document ends with is a shorter row, with EOS.
      num_tokens: the row with which so many are reached is the last; 0: all are taken.

    Returns:
      Rows as `batches.packed_rows` takes them.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    rows, left = [], num_tokens or float("inf")
    for document in documents:
        ids = np.asarray([*tokenizer.encode(document), tokenizer.eos_id], np.int32)
        for start in range(0, len(ids), length - len(bos)):
            if left <= 0:
                return rows
            rows.append((bos, ids[start : start + length - len(bos)]))
            left -= len(rows[-1][1])
    return rows


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder (config.pretrain.text)")
    if not path.is_dir():
        if not _kind(path):
            raise DataError(f"{path}: text is read from .txt files and from .jsonl with a field 'text' (.gz, .xz)")
        return [path]
    inside = (f for f in path.rglob("*") if f.is_file() and _kind(f))
    files = sorted(f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts))
    if not files:
        raise DataError(f"{path}: no .txt or .jsonl file (.gz, .xz) in this folder or below it")
    return files


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in (".gz", ".xz")]
    return suffixes[-1] if suffixes and suffixes[-1] in (".txt", ".jsonl") else ""


def _documents(path: Path) -> Iterator[str]:
    if _kind(path) == ".jsonl":
        for line in row_files.raw_lines(path):
            where = f"{path}, line {line.number}"
            yield row_files.string_field(row_files.parse_object(line, where), "text", where)
        return
    try:
        with row_files.open_binary(path) as file:
            content = file.read()
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x})") from error
    except row_files.READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read ({error}). Is the file complete?") from error
