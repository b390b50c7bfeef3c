"""Checkpoints of trees of arrays: one folder per step, whole or absent.

    directory/
      200/                  a checkpoint
        arrays/             Orbax: one entry per leaf under its path, "params/layers/mlp", "opt_state/0/mu/layers/mlp"
        manifest.json       shape, dtype and CRC-32 of every leaf
      300.partial/          a save that was killed: ignored, and removed by the next one

A tree is stored flat, by the paths of its leaves, so that what a checkpoint holds does not depend on the Python
classes of the states that were saved. The manifest is compared with what the caller asks for before an array is read.
Everything is read and written by Orbax and as JSON; nothing is pickled.
"""

import concurrent.futures
import contextlib
import dataclasses
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from pit_jax import files, processes

MANIFEST = "manifest.json"
ARRAYS = "arrays"


class SaveError(OSError):
    """A checkpoint that could not be written."""


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or whose bytes are not those that were saved."""


def save(directory: Path, step: int, tree, *, keep: int | None = None) -> None:
    """Writes `directory`/`step`; returns when it is on disk.

    The folder gets its name by a rename, after all is written. An earlier checkpoint of the same step is replaced.
    With many processes all of them call this.

    Args:
      directory: the folder of the checkpoints of one run; made where it does not exist.
      step: a number >= 0.
      tree: a pytree of arrays and Python numbers.
      keep: after the save, only the newest `keep` of the steps up to `step` stay; None keeps all.

    Raises:
      ValueError: for a leaf that is not a plain array, and where `keep` < 1.
      SaveError: where it cannot be written; earlier checkpoints stay.
    """
    with Saver(directory, keep=keep) as saver:
        saver.save(step, tree)


class Saver:
    """Writes checkpoints beside the training, one at a time: a context manager, at whose end all are on disk."""

    def __init__(self, directory: Path, *, keep: int | None = None):
        """`directory` and `keep` as in `save`."""
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: at least the checkpoint that was just written has to stay; None keeps all.")
        self._directory, self._keep = _absolute(directory), keep
        self._pending: concurrent.futures.Future | None = None

    def save(self, step: int, tree) -> None:
        """Begins to write `step`, when the one before is written; returns when the arrays may be changed or donated.

        Raises:
          ValueError, SaveError: as `save`, also for the checkpoint before.
        """
        if step < 0:
            raise ValueError(f"step={step}: checkpoints are named by a number of steps >= 0.")
        leaves = {path: _storable(path, x) for path, x in _flatten(tree).items()}
        self.wait()
        partial = self._begun(step)
        with self._explained(step):
            if processes.is_first():
                _clean(self._directory)
                if files.is_remote(partial):
                    delete(self._directory, step)
                partial.mkdir(parents=True)
            processes.wait(f"saving {partial}")
            with _context():
                response = ocp.save_async(partial / ARRAYS, leaves)
        manifest = {path: _plain(_describe(x)) for path, x in leaves.items()}
        self._pending = _start(lambda: self._finish(step, response, manifest))

    def wait(self) -> None:
        """Returns when what was begun is on disk.

        Raises:
          SaveError: where it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
            processes.wait(f"saved in {self._directory}")

    def _begun(self, step: int) -> Path:
        """The folder that is written to. In a bucket no folder can be renamed: the manifest makes it a checkpoint."""
        return self._directory / (f"{step}" if files.is_remote(self._directory) else f"{step}.partial")

    def _finish(self, step: int, response, manifest: dict) -> None:
        partial, final, old = self._begun(step), self._directory / f"{step}", self._directory / f"{step}.old"
        with self._explained(step):
            response.result()
            if not processes.is_first():
                return
            files.write_json_atomic(partial / MANIFEST, manifest)
            if partial != final:
                if final.exists():
                    final.rename(old)
                partial.rename(final)
                files.sync_directory(self._directory)
                files.remove_tree(old)
        if self._keep is not None:
            self._delete_before(step, self._keep)

    def _delete_before(self, step: int, keep: int) -> None:
        """What this checkpoint replaces. It is written by now, whatever becomes of them."""
        try:
            for earlier in [s for s in all_steps(self._directory) if s <= step][:-keep]:
                delete(self._directory, earlier)
        except Exception as error:  # a bucket raises types of its own
            warnings.warn(
                f"the checkpoint of step {step} in {self._directory} is written, but one before it cannot be deleted, "
                f"and takes space ({type(error).__name__}: {error})",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Whatever the file system or Orbax raises becomes a SaveError; the space of what was begun is given back."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # of a device
        except Exception as error:
            files.remove_tree(self._begun(step))
            last = latest_step(self._directory)
            kept = "there is none before it" if last is None else f"that of step {last} is kept"
            advice = "Is the disk full, or a quota reached? Make room, and go on"
            if processes.are_several() and _tells_of_a_lost_process(error):
                advice = "Another process is gone: look at what it printed. The same command goes on, for all of them"
            raise SaveError(
                f"the checkpoint of step {step} could not be written to {self._directory} ({_first_line(error)}); "
                f"{kept}. {advice}"
            ) from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()
        elif self._pending is not None:  # another error is on its way
            concurrent.futures.wait([self._pending])


def _tells_of_a_lost_process(error: BaseException | None) -> bool:
    """Also where Orbax has made another error of it."""
    while error is not None:
        if re.search("heartbeat|barrier|UNAVAILABLE|coordination service", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    """Of what a library says, which may be as long as a page."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else repr(error)


def _start(function: Callable[[], None]) -> concurrent.futures.Future:
    """Runs a function in a thread of its own."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint").start()
    return future


def delete(directory: Path, step: int) -> None:
    """Deletes a checkpoint; one that is half deleted does not look like one."""
    folder = files.place(directory) / f"{step}"
    if files.is_remote(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
    elif folder.exists():
        folder = folder.rename(folder.with_name(f"{step}.deleted"))
    files.remove_tree(folder)


def all_steps(directory: Path) -> list[int]:
    """The steps whose checkpoints were written to the end, in ascending order."""
    directory = files.place(directory)
    if not directory.is_dir():
        return []
    is_whole = lambda entry: not files.is_remote(entry) or (entry / MANIFEST).exists()  # noqa: E731
    names = [entry.name for entry in directory.iterdir() if entry.is_dir() and is_whole(entry)]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def latest_step(directory: Path) -> int | None:
    """The newest of `all_steps`, or None."""
    steps = all_steps(directory)
    return steps[-1] if steps else None


def restore(directory: Path, step: int, like, *, at: str = ""):
    """Reads `directory`/`step` into a tree like `like`, bitwise what was saved.

    Args:
      directory: as in `save`.
      step: one of `all_steps`.
      like: a pytree. An array or a `jax.ShapeDtypeStruct` comes back as a jax.Array with its sharding (of the mesh
        that is set, where the sharding names an abstract mesh; uncommitted, where it has none); a NumPy array comes
        back as one; a Python number as a Python number.
      at: the path of the subtree that `like` stands for, such as "params"; empty for all.

    Raises:
      ValueError: where leaves of `like` are missing on disk, leaves on disk are unknown to `like`, or a shape or dtype
        differs; it lists their paths.
      DamagedError: a ValueError too: where the checkpoint cannot be read or its bytes have changed.
    """
    folder = _absolute(directory) / f"{step}"
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; the steps that can be restored there are {all_steps(directory)}.")
    with _agreed(folder):
        try:
            manifest = {path: _Leaf(**leaf) for path, leaf in files.read_json(folder / MANIFEST).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DamagedError(f"checkpoint {folder} is damaged: {error}") from error
    prefix = f"{at}/" if at else ""
    wanted = {(prefix + path).rstrip("/"): x for path, x in _flatten(like).items()}
    _compare(folder, {k: v for k, v in manifest.items() if k == at or k.startswith(prefix)}, wanted)
    abstract = {path: _abstract(path, x) for path, x in wanted.items()}
    with _agreed(folder):
        try:
            with _context(alone=True):
                arrays = ocp.load(folder / ARRAYS, abstract)
        except jax.errors.JaxRuntimeError:
            raise  # such as a device that is out of memory
        except Exception as error:
            raise DamagedError(f"checkpoint {folder} is damaged: {_first_line(error)}") from error
    with _agreed(folder):
        changed = [path for path, x in arrays.items() if _has_changed(x, manifest[path])]
        if changed:
            raise DamagedError(
                f"checkpoint {folder} is damaged: the bytes of these leaves have changed: {_lines(changed)}"
            )
    leaves = [_like(arrays[path], x) for path, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


@contextlib.contextmanager
def _agreed(folder: Path) -> Iterator[None]:
    """What one process finds damaged, which alone reads a part of it, is so for all: they go on from the same step."""
    problem = None
    try:
        yield
    except DamagedError as error:
        problem = error
    found = processes.where(problem is not None)
    if problem is not None:
        raise problem
    if found:
        raise DamagedError(f"checkpoint {folder} is damaged: see what process {found[0]} says")


def restore_latest(directory: Path, like, *, donate: bool = False) -> tuple[int, object] | None:
    """`restore` of the newest checkpoint that is not damaged; warns about the damaged ones on the way.

    Args:
      directory: as in `save`.
      like: as in `restore`.
      donate: where there is a checkpoint, gives the memory of `like`'s arrays back before it is read: with both at once
        a state might not go on where it was trained.

    Returns:
      (step, tree), or None where there is no checkpoint at all.

    Raises:
      ValueError: where the newest checkpoint is whole but holds other leaves than `like` (see `restore`), and where
        there are checkpoints and all are damaged: to start anew in silence would overwrite them.
    """
    steps = processes.on_first(lambda: all_steps(directory))
    like = _freed(like) if donate and steps else like
    for step in reversed(steps):
        try:
            return step, restore(directory, step, like)
        except DamagedError as error:
            before = "" if step == steps[0] else "\nThe checkpoint before it is taken."
            warnings.warn(f"{error}{before}", stacklevel=2)
    if steps:
        raise ValueError(
            f"all checkpoints in {_absolute(directory)} are damaged (steps {steps}): "
            "move them away to start from step 0."
        )
    return None


@dataclasses.dataclass(frozen=True)
class _Leaf:
    shape: list[int]
    dtype: str
    crc32: int | None
    """None for an array of which no single host holds all, and in checkpoints that have `sum32` instead."""
    sum32: int | None = None
    """Of an array that lies on several hosts: `_sum32`."""


def _plain(leaf: _Leaf) -> dict:
    return {name: value for name, value in dataclasses.asdict(leaf).items() if name != "sum32" or value is not None}


def _context(alone: bool = False) -> ocp.Context:
    """`alone`: a process reads its part without waiting for others, who might have failed."""
    context = ocp.Context()
    if alone and processes.are_several():
        context.multiprocessing_options.primary_host = jax.process_index()
        context.multiprocessing_options.active_processes = {jax.process_index()}
    context.array_options.saving.use_compression = False  # weights hardly shrink, and zstd costs a third of a save
    context.pytree_options.loading.partial_load = True  # the manifest was compared before
    return context


def _flatten(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _storable(path: str, x) -> jax.Array | np.ndarray:
    if not (isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)):
        array = x if isinstance(x, jax.Array) else np.asarray(x)
        if array.dtype.kind not in "OSUMm" and array.size:  # Orbax has no form for an array without entries
            return array
    kind = f"{getattr(x, 'dtype', type(x).__name__)} of shape {np.shape(x)}"
    raise ValueError(
        f"{path} is a {kind}: a checkpoint holds arrays of numbers with at least one entry; "
        "store jax.random.key_data of a key, and leave empty arrays and text out of the tree."
    )


def _describe(x) -> _Leaf:
    here = _is_here(x)
    return _Leaf(list(np.shape(x)), np.dtype(x.dtype).name, *((_crc32(x), None) if here else (None, _sum32(x))))


def _is_here(x) -> bool:
    """Whether this host holds all of an array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _crc32(x) -> int:
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    size = x.dtype.itemsize
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis, length in enumerate(x.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _sum32(x) -> int:
    """Sum of (2 i + 1) times the bits of entry i, modulo 2^32: alike on every mesh, as integers are added exactly."""
    return int(_sum_of_bits(x))


def _has_changed(x, leaf: "_Leaf") -> bool:
    """Whether the bytes are not those that were saved; what another number of hosts has saved is read with its sum."""
    if leaf.sum32 is not None:
        return _sum32(x) != leaf.sum32
    return leaf.crc32 is not None and _is_here(x) and _crc32(x) != leaf.crc32


def _compare(folder: Path, stored: dict[str, _Leaf], wanted: dict) -> None:
    missing = [path for path in wanted if path not in stored]
    unknown = [path for path in stored if path not in wanted]
    differ = []
    for path, leaf in stored.items():
        if path not in wanted:
            continue
        x = wanted[path]
        shape, dtype = list(np.shape(x)), np.dtype(x.dtype if hasattr(x, "dtype") else type(x)).name
        if (leaf.shape, leaf.dtype) != (shape, dtype):
            differ.append(f"{path}: {leaf.dtype}{leaf.shape} on disk, {dtype}{shape} asked for")
    problems = [
        f"{words}: {_lines(paths)}"
        for words, paths in [
            ("asked for, but not on disk", missing),
            ("on disk, but not asked for", unknown),
            ("of another shape or dtype", differ),
        ]
        if paths
    ]
    if problems:
        raise ValueError(
            f"checkpoint {folder} does not hold the leaves that are asked for.\n" + "\n".join(problems) + "\n"
            "Restore with the config that wrote it, or start this run in another directory."
        )


def _lines(paths: list[str], most: int = 20) -> str:
    shown = paths[:most] + [f"... and {len(paths) - most} more"] * (len(paths) > most)
    return "".join(f"\n  {path}" for path in shown)


def _abstract(path: str, x):
    """What Orbax is asked for in the place of x: an array on devices, or in host memory."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.Array) and not x.committed:
        sharding = None
    if sharding is None:
        dtype = x.dtype if hasattr(x, "dtype") else type(x)
        return np.broadcast_to(np.zeros((), dtype), np.shape(x))
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(f"{path} has a sharding on an abstract mesh and no mesh is set: call jax.set_mesh(mesh).")
        sharding = jax.sharding.NamedSharding(mesh, sharding.spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _freed(tree):
    """What is asked for in the place of a tree whose arrays are deleted."""

    def one(x):
        if not isinstance(x, jax.Array):
            return x
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)
        x.delete()
        return shape

    return jax.tree.map(one, tree)


def _like(array, x):
    if isinstance(x, bool | int | float):
        return type(x)(array)
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(array)
    return array if isinstance(array, jax.Array) else jnp.array(array)


def _clean(directory: Path) -> None:
    """Removes what killed saves and deletions left, and puts back a checkpoint that was about to be replaced."""
    if files.is_remote(directory):
        return  # a folder without a manifest is replaced by the next save of its step
    for old in directory.glob("*.old"):
        if not (directory / old.stem).exists():
            old.rename(directory / old.stem)
    for suffix in ("partial", "old", "deleted"):
        for leftover in directory.glob(f"*.{suffix}"):
            if leftover.stem.isdecimal():
                files.remove_tree(leftover)


def _absolute(directory: Path | str) -> Path:
    directory = files.place(directory)
    return directory if files.is_remote(directory) else directory.absolute()
