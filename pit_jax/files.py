"""Small files that are either whole or absent: a process killed while it writes leaves the earlier file as it was."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from pit_jax import config


def place(name: Path | str) -> Path:
    """A folder or file by its name: of this machine and its network file systems, or of a bucket (gs://BUCKET/...).

    Raises:
      ValueError: for another kind of bucket.
    """
    scheme, found, _ = str(name).partition("://")
    if not found:
        return Path(name)
    if scheme != "gs":
        raise ValueError(
            f"{name}: the buckets of Google Cloud are known, gs://BUCKET/FOLDER; mount what lies in others"
        )
    return epath.Path(name)


def is_remote(path: Path) -> bool:
    """Whether it is in a bucket: nothing can be renamed there, and a file is whole or absent by itself."""
    return str(path).startswith("gs://")


def changed_at(path: Path) -> float:
    """When a file was last written, to compare with; 0 where there is none."""
    if not path.exists():
        return 0
    stat = path.stat()
    return stat.st_mtime_ns if hasattr(stat, "st_mtime_ns") else stat.mtime


def remove_tree(path: Path) -> None:
    """Deletes a folder with all that is in it; nothing where there is none."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()


def write_text_atomic(path: Path | str, text: str) -> None:
    """Writes beside `path`, then renames over it."""
    path = place(path)
    if is_remote(path):
        path.write_text(text, encoding="utf-8")
        return
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
        return json.loads(place(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not a JSON file ({error}): restore it from a copy or delete it.") from error


class Journal:
    """JSON lines that are on disk as soon as they are added, behind a header that says what they are made from.

    A process that is killed leaves all lines but the one that it was writing, which is cut off by the next start.

    Attributes:
      path: of the file.
      lines: all of them, without the header.
    """

    def __init__(self, path: Path | str, header: dict, remedy: str = "delete it, and its lines are made again"):
        """Opens or begins a file.

        Args:
          path: of the file; its folder is made where there is none.
          header: plain JSON.
          remedy: what a user can do about a file with another header.

        Raises:
          ValueError: where the file has another header, or is no such file.
        """
        self.path, self.lines = Path(path), []
        header = json.loads(json.dumps(header))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            try:
                found, *self.lines = [*map(json.loads, whole.decode("utf-8").split("\n")[:-1])] or [header]
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
            if not all(isinstance(line, dict) for line in (found, *self.lines)):
                raise ValueError(f"{path} is damaged (a line is no JSON object): {remedy}")
            if found != header:
                differing = config.differing_fields(header, found, "")
                fields = ", ".join(line.partition(":")[0].lstrip(".") for line in differing)
                raise ValueError(f"{path} is of a run with other {fields}: {remedy}")
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115
        if not self.path.stat().st_size:
            self._write([header])

    def add(self, *lines: dict) -> None:
        """Appends lines."""
        self.lines += lines
        self._write(lines)

    def delete(self) -> None:
        """Takes the file away: its lines are somewhere else now."""
        self._file.close()
        self.path.unlink()

    def _write(self, lines: Sequence[dict]) -> None:
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self._file.flush()


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
