"""Small files that are either whole or absent: a process killed while it writes leaves the earlier file as it was."""

import json
import os
from pathlib import Path

import numpy as np


def write_text_atomic(path: Path | str, text: str) -> None:
    """Writes beside `path`, then renames over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json_atomic(path: Path | str, obj) -> None:
    """Strict JSON with sorted keys, so that equal content gives equal bytes. NumPy and JAX numbers become plain ones.

    Raises:
      ValueError: where `obj` holds NaN or infinity, which JSON cannot say: write None instead.
    """
    try:
        text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        raise ValueError(f"{path} was not written: {error}. Replace NaN and infinity by None.") from error
    write_text_atomic(path, text + "\n")


def read_json(path: Path | str):
    """The content of a JSON file.

    Raises:
      ValueError: where the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not a JSON file ({error}): restore it from a copy or delete it.") from error


def sync_directory(directory: Path | str) -> None:
    """Makes renames in `directory` last through a power cut, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse it
    finally:
        os.close(descriptor)


def _plain(x):
    if isinstance(x, Path):
        return str(x)
    if isinstance(x, np.generic) or hasattr(x, "__array__"):
        return np.asarray(x).tolist()
    raise TypeError(f"a {type(x).__name__} has no JSON form")
