"""Many processes of one run: one per host of a slice, or several on one machine.

All run the same program on the same rows, in step: what one decides, all decide. Arrays lie across all of them; of
small files the first process writes those of the workdir, and each of the others keeps its own copy in a folder of its
own machine, so that nothing else in the package has to know how many there are.
"""

import atexit
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pit_jax import files

EXPLICIT = ("PIT_JAX_COORDINATOR", "PIT_JAX_NUM_PROCESSES", "PIT_JAX_PROCESS_ID")
"""Variables that say where the first process listens (HOST:PORT), how many there are, and which one this is."""

FOUND = "PIT_JAX_DISTRIBUTED"
"""1: JAX asks the machine (TPU VM, SLURM, GKE, Open MPI); 0: this process is alone, whatever the machine says."""

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life the others end: training cannot go on without a process."""

SHARED = ("models", "adapters", "checkpoints", "compilation_cache")
"""Folders of a workdir that all processes read and write together, and none copies."""


def start(environment: dict[str, str] | None = None) -> None:
    """Joins the other processes, if the environment names some. Before anything is computed.

    Raises:
      ValueError: where variables are missing or are no numbers, or the first process cannot be reached.
    """
    env = dict(os.environ if environment is None else environment)
    given = [name for name in EXPLICIT if env.get(name)]
    if env.get(FOUND, "") not in ("", "0", "1"):
        raise ValueError(f"{FOUND}={env[FOUND]}: use 1 (JAX asks the machine who the others are) or 0 (alone)")
    if env.get(FOUND) == "0":
        return
    arguments: dict[str, Any] = {}
    if given:
        lacking = [name for name in EXPLICIT if name not in given]
        if lacking:
            raise ValueError(f"{', '.join(given)} need {', '.join(lacking)} beside them")
        address, count, index = (env[name] for name in EXPLICIT)
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise ValueError(f"{EXPLICIT[2]}={index} of {EXPLICIT[1]}={count}: numbers from 0 to one less than all")
        if not address.rpartition(":")[2].isdecimal():
            raise ValueError(f"{EXPLICIT[0]}={address}: HOST:PORT of the first process")
        if int(count) == 1:
            return
        arguments = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    elif env.get(FOUND) != "1" and int(env.get("SLURM_STEP_NUM_TASKS") or 1) < 2:
        return
    try:
        jax.distributed.initialize(
            **arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes of this run did not find each other: {error}") from error
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def are_several() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes the workdir."""
    return not are_several() or jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when all processes are here."""
    if are_several():
        multihost_utils.sync_global_devices(name)


def leave(status: int) -> None:
    """Ends this process; where it has joined others at once, as the usual way out waits for them."""
    if not are_several():
        sys.exit(status)
    sys.stderr.flush()
    if is_first():
        time.sleep(2)  # with it go those that have not yet said why they end
    os._exit(status)


def on_first(function: Callable[[], Any]) -> Any:
    """What `function` gives in the first process, in all of them: plain JSON. The others do not call it.

    Raises:
      ValueError: in the others, where it raised in the first.
    """
    if not are_several():
        return function()
    said: dict[str, Any] = {}
    failed: Exception | None = None
    if is_first():
        try:
            said = {"value": function()}
        except Exception as error:  # the others must not wait for what never comes
            failed, said = error, {"error": f"{error}"}
    said = json.loads(_broadcast(json.dumps(said, default=lambda x: np.asarray(x).tolist()).encode()))
    if failed is not None:
        raise failed
    if "error" in said:
        raise ValueError(said["error"])
    return said["value"]


def where(is_so: bool) -> list[int]:
    """Numbers of the processes in which it is so, in all of them."""
    if not are_several():
        return [0] if is_so else []
    return np.flatnonzero(multihost_utils.process_allgather(np.int32(is_so))).tolist()


def _broadcast(message: bytes) -> bytes:
    """The bytes of the first process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.zeros(size, np.uint8)
    padded[: len(message)] = np.frombuffer(message[:size], np.uint8) if is_first() else 0
    return np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes()


def in_shares(count: int, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What `measure` says of each of `count` rows, of which every process asks it about a share.

    Args:
      count: of all rows, at least 1.
      measure: numbers [n] of rows -> [n, ...] int32.
    """
    if not are_several():
        return measure(np.arange(count))
    share = -(-count // jax.process_count())  # the last row is asked about again where the shares are not even
    found = measure(np.minimum(jax.process_index() * share + np.arange(share), count - 1))
    return multihost_utils.process_allgather(found).reshape(-1, *found.shape[1:])[:count]


def small_files_of(root: Path) -> Path:
    """The folder in which this process keeps the small files of a workdir: `root` itself, or a copy of them.

    Of a workdir in a bucket all processes have copies, and the first brings what it writes there (`push`).

    Raises:
      ValueError: where the others do not see the folder of the first.
    """
    if files.is_remote(root):
        copy = _own_folder()
        if root.exists():
            copy_small_files(root, copy)
        wait(f"copied {root}")
        return copy
    if not are_several():
        return root
    mark = root / ".shared"
    name = on_first(lambda: _make_mark(mark))
    seen = mark.is_file() and mark.read_text(encoding="utf-8") == name
    if blind := ", ".join(map(str, where(not seen))):
        raise ValueError(
            f"processes {blind} do not see the --workdir={root} of process 0: name a folder that all hosts share, such "
            "as one on NFS or a bucket that is mounted on all of them"
        )
    if is_first():
        copy = root
    else:
        copy = _own_folder()
        copy_small_files(root, copy)
    wait(f"copied {root}")
    if is_first():
        mark.unlink()
    return copy


def own_file(path: Path, *more: Path) -> Path:
    """`path`, which the first process will write; for the others one of their own, with copies of `more` beside it."""
    if not are_several():
        return path
    if not is_first():
        folder = _own_folder()
        for file in more:
            if file.exists():
                shutil.copyfile(file, folder / file.name)
        path = folder / path.name
    wait(f"copied {more}")
    return path


def _own_folder() -> Path:
    """On this machine, until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="pit_jax_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _make_mark(mark: Path) -> str:
    mark.parent.mkdir(parents=True, exist_ok=True)
    name = os.urandom(8).hex()
    mark.write_text(name, encoding="utf-8")
    return name


def copy_small_files(root: Path, copy: Path) -> None:
    """Everything of a workdir but arrays and programs; of candidates, what was measured."""
    for source in sorted(root.iterdir()):
        if source.name not in SHARED and not source.name.startswith("."):
            _copy(source, copy / source.name, within_candidates=source.name == "candidates")


def _copy(source: Path, target: Path, within_candidates: bool) -> None:
    if not source.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        return
    for entry in source.iterdir():
        if not (within_candidates and entry.name.isdecimal()):
            _copy(entry, target / entry.name, within_candidates)


Listing = dict[str, tuple[int, int]]
"""Path below a folder -> (nanoseconds of its last change, bytes)."""


def listing(root: Path) -> Listing:
    """All files below a folder but hidden ones."""
    files_ = (path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size) for path in files_}


def push(root: Path, bucket: Path, known: Listing) -> Listing:
    """Brings files that have changed since `known` was their listing into a bucket, and deletes there what is gone.

    The marks of stages that are done come last: after a kill in between, a stage runs again whose files are not there.

    Returns:
      The listing now.
    """
    found = listing(root)
    changed = (name for name in found if known.get(name) != found[name])
    for name in sorted(changed, key=lambda name: name.startswith("stages/")):
        target = bucket / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / name).read_bytes())
    for name in known.keys() - found.keys():
        (bucket / name).unlink(missing_ok=True)
    return found
