"""A workdir: what is done, what is next, and where everything lies.

config.json                 the resolved config
data/                       rows, tokenizer (tokenizer.model, or a folder tokenizer), chat_template.json if one is used
checkpoints/STAGE/          states of a stage that is running or done
candidates/STAGE/           parameters among which a stage chooses
models/STAGE/               the parameters that a stage leaves behind
adapters/STAGE/             with config.lora: what was trained; it is merged into the above
feedback/STAGE.jsonl        what critics have said (SRT); feedback/calls: all replies of a server
stages/STAGE.json           written last: the stage is done, and what it measured
metrics.jsonl, tensorboard/ training metrics
samples/                    what the models write
results.json                every number of the tables
"""

import contextlib
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pit_jax import checkpoint, config as config_lib, files, interrupts, processes
from pit_jax.files import read_json, write_json_atomic
from pit_jax.types import Params

STAGE_FOLDERS = ("models", "adapters", "candidates", "checkpoints", "samples")
"""Folders in which each stage has a folder of its own."""

ADAPTERS = "adapters.json"
"""In a folder of adapters, what they are."""

DISCARDING = "discarding.json"
"""Stages whose deletion has begun."""

PUSH_SECONDS = 60

_OPTIONAL = re.compile(r"(?:rl_pit|self_feedback|dpo)_\d+|arm_[a-z_]+")
"""Stages that one config has and another of the same system has not."""

FREE_FIELDS = ("arms", "mesh", "profile")
"""Top-level fields that may change on a workdir: they add something, or alter nothing that was trained. A run may go on
on another mesh: its numbers are then those of another order of sums."""


class Workdir:
    """Paths and done-markers of a run.

    Attributes:
      shared: the folder, where arrays are.
      root: where the small files are: the same, but for processes other than the first (`processes.small_files_of`).
      config: of the run.
    """

    def __init__(self, root: str | Path, config: Any, free_fields: Sequence[str] = FREE_FIELDS, claim: bool = True):
        """Opens or creates a workdir.

        Args:
          root: the folder.
          config: of the run.
          free_fields: top-level fields that may differ from those it was made with.
          claim: writes the config at once; else `claim` does.

        Raises:
          ValueError: where something was trained in it with another config; the fields that differ are named.
        """
        self.shared, self.config = files.place(root), config
        if self.shared.exists() and not self.shared.is_dir():
            raise ValueError(f"--workdir={root} is a file, but must be a folder")
        if processes.is_first() and not files.is_remote(self.shared):
            self.root = self.shared
            self._finish_discarding()
        self._open()
        if files.is_remote(self.shared):
            self._finish_discarding()
        path = self.root / "config.json"
        ours = json.loads(config_lib.to_json(config))
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(config, config_lib.class_of(theirs)):
                theirs = config_lib.complete(theirs)
            same = lambda c: {k: v for k, v in c.items() if k not in free_fields}  # noqa: E731
            lines = config_lib.differing_fields(same(ours), same(theirs))
            if lines and self._holds_work():
                raise ValueError(
                    f"workdir {self.root} was made with another config:\n  "
                    + "\n  ".join(lines)
                    + "\nUse another --workdir, or set these fields back. Fields that only STAGE and those after it "
                    "read may change with --redo=STAGE."
                )
        elif self.root.exists() and any(entry.name != "compilation_cache" for entry in self.root.iterdir()):
            raise ValueError(f"workdir {self.root} is not empty and has no config.json: use another --workdir")
        if claim:
            self.claim()

    def claim(self) -> None:
        """Writes the config: from now on it is that of this workdir."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.root / "config.json", json.loads(config_lib.to_json(self.config)))
        self.push()

    def push(self) -> None:
        """Brings small files that have changed to where others find them, if that is not where they are."""
        if files.is_remote(self.shared) and processes.is_first():
            with self._pushing:
                self._pushed = processes.push(self.root, self.shared, self._pushed)

    @contextlib.contextmanager
    def pushed_now_and_then(self) -> Iterator[None]:
        """Within it `push` also runs once a minute: answers and replies that were paid for outlive this machine."""
        if not files.is_remote(self.shared):
            yield
            return
        over = threading.Event()

        def push():
            while not over.wait(PUSH_SECONDS):
                with contextlib.suppress(Exception):  # a file is gone by now, or the next push says what is wrong
                    self.push()

        thread = threading.Thread(target=push, name="push", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @classmethod
    def of(cls, root: str | Path, writes: bool = False) -> "Workdir":
        """A workdir as it is; nothing is checked. `writes`: whether small files will be written into it."""
        workdir = cls.__new__(cls)
        workdir.shared = workdir.root = files.place(root)
        if writes or files.is_remote(workdir.shared):
            workdir._open()
        return workdir

    def _open(self) -> None:
        self.root = processes.small_files_of(self.shared)
        self._pushed = processes.listing(self.root) if files.is_remote(self.shared) else {}
        self._pushing = threading.Lock()

    def _holds_work(self) -> bool:
        """Whether a stage is done or has saved a state: a start that failed before that binds nobody."""
        records = (path for path in self.root.glob("stages/*.json") if not path.name.endswith(".seconds.json"))
        return any(records) or any(self.shared.glob("checkpoints/*"))

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's training states."""
        return self.shared / "checkpoints" / stage

    def candidates(self, stage: str) -> "Candidates":
        """The parameters among which a stage chooses."""
        return Candidates(self.shared / "candidates" / stage, self.root / "candidates" / stage)

    def model(self, stage: str) -> Path:
        """Folder of the parameters that a stage leaves behind."""
        return self.shared / "models" / stage

    def fetch(self, folder: str) -> None:
        """Copies a folder that the first process has written alone."""
        self.push()
        processes.wait(f"wrote {folder}")
        if not processes.is_first():
            shutil.rmtree(self.root / folder, ignore_errors=True)
            processes.copy_small_files(self.shared / folder, self.root / folder)
        processes.wait(f"fetched {folder}")

    def unfinished_feedback(self, stage: str) -> Path:
        """What a stage that asks critics has so far; gone when it is done."""
        return self.root / "feedback" / f"{stage}.unfinished.jsonl"

    def done(self, stage: str) -> dict | None:
        """What a finished stage has measured, or None."""
        path = self.root / "stages" / f"{stage}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def finish(self, stage: str, record: dict) -> None:
        """Marks a stage as done."""
        write_json_atomic(self.root / "stages" / f"{stage}.json", record)
        self.push()

    def forget(self, stage: str) -> None:
        """Takes the mark of a stage away, so that it runs again."""
        (self.root / "stages" / f"{stage}.json").unlink()
        self.push()

    def discard(self, *stages: str) -> None:
        """Deletes what stages have left; what a kill leaves of it is deleted when the workdir is opened again."""
        if stages:
            write_json_atomic(self.root / DISCARDING, list(stages))
            self.push()
            self._finish_discarding()
            processes.wait("discarded")

    def _finish_discarding(self) -> None:
        path = self.root / DISCARDING
        if not path.exists():
            return
        stages = read_json(path)
        for stage in reversed(stages):  # the marks first, that of the last stage before those of earlier ones
            (self.root / "stages" / f"{stage}.json").unlink(missing_ok=True)
        for stage in stages:
            (self.root / "stages" / f"{stage}.seconds.json").unlink(missing_ok=True)
            self.unfinished_feedback(stage).unlink(missing_ok=True)
            (self.root / "feedback" / f"{stage}.jsonl").unlink(missing_ok=True)
            for folder in STAGE_FOLDERS:
                shutil.rmtree(self.root / folder / stage, ignore_errors=True)
                if processes.is_first():
                    files.remove_tree(self.shared / folder / stage)
        path.unlink()
        self.push()

    def left_by_others(self, names: Sequence[str]) -> list[str]:
        """Rounds and arms, done or not, that have left something and are not among these stages."""
        paths = [*self.root.glob("stages/*.json"), *self.root.glob("feedback/*.jsonl")]
        paths += [path for folder in STAGE_FOLDERS for path in self.shared.glob(f"{folder}/*") if path.is_dir()]
        found = {path.name.partition(".")[0] for path in paths}
        return sorted(name for name in found - set(names) if _OPTIONAL.fullmatch(name))

    def save_model(self, stage: str, params: Params) -> None:
        """Leaves the parameters of a stage behind."""
        checkpoint.save(self.model(stage), 0, params, keep=1)

    def adapters(self, stage: str) -> Path:
        """Folder of a stage's adapters."""
        return self.shared / "adapters" / stage

    def save_adapters(self, stage: str, trained: Params, description: dict) -> None:
        """Leaves what was trained beside frozen weights, and what it is: rank, alpha, targets and the base."""
        checkpoint.save(self.adapters(stage), 0, trained, keep=1)
        if processes.is_first():
            write_json_atomic(self.adapters(stage) / ADAPTERS, description)

    def model_digest(self, stage: str) -> str:
        """Names the parameters that a stage has left, by their checksums."""
        manifest = self.model(stage) / "0" / "manifest.json"
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]

    def load_model(self, stage: str, like: Params) -> Params:
        """Parameters of a finished stage, in the shapes and shardings of `like`."""
        return checkpoint.restore(self.model(stage), 0, like)


class Candidates:
    """Parameters saved during a stage, one of which is chosen at its end.

    The list of what was measured is a file that is written after the parameters, so a stage that is killed goes on
    with the candidates up to its checkpoint.
    """

    def __init__(self, directory: Path, measured: Path | None = None):
        """Opens or begins a list.

        Args:
          directory: of the parameters.
          measured: folder of what was measured; by default the same.
        """
        self.directory = directory
        self._path = (measured or directory) / "candidates.json"

    def all(self) -> dict[int, dict]:
        """Step -> what was measured there."""
        if not self._path.exists():
            return {}
        return {int(step): m for step, m in json.loads(self._path.read_text(encoding="utf-8")).items()}

    def add(self, step: int, params: Params, measured: dict) -> None:
        """Saves a candidate; one of the same or a later step (left by a killed run) is replaced."""
        earlier = {s: m for s, m in self.all().items() if s < step}
        processes.wait("measured")  # by all, with what is about to be deleted
        for stale in checkpoint.all_steps(self.directory) if processes.is_first() else ():
            if stale >= step:
                checkpoint.delete(self.directory, stale)
        checkpoint.save(self.directory, step, params, keep=None)
        write_json_atomic(self._path, {str(s): m for s, m in (earlier | {step: measured}).items()})

    def clear(self) -> None:
        """Deletes the parameters, once one was chosen; nothing where there are none."""
        processes.wait("chosen")
        if processes.is_first():
            files.remove_tree(self.directory)
        shutil.rmtree(self._path.parent, ignore_errors=True)

    def load(self, step: int, like: Params) -> Params:
        """The parameters of a candidate."""
        return checkpoint.restore(self.directory, step, like)


def choose_by_kl_bin(measured: dict[int, dict], num_bins: int, max_kl: float = 0.0) -> tuple[int, list[dict]]:
    """Appendix F: group checkpoints by their KL to the SFT model, keep the best validation score of each group.

    The paper then picks among the groups' winners by reading 10 to 20 of their answers, which is how it leaves out
    those that have learnt to please the reward model alone. Here the highest validation score under `max_kl` is taken,
    and all winners, also those above it, are returned so that a reader can take another.

    Args:
      measured: step -> {"kl", "score", ...} on the selection rows.
      num_bins: groups of equal width between the lowest and the highest KL.
      max_kl: nats per response; 0 for no limit. Where all are above it, the lowest KL is taken.

    Returns:
      (chosen step, one {"step", "kl", "score", "low", "high"} per non-empty bin).
    """
    low = min(m["kl"] for m in measured.values())
    width = (max(m["kl"] for m in measured.values()) - low) / num_bins
    bins: dict[int, int] = {}
    for step, m in sorted(measured.items()):
        i = min(int((m["kl"] - low) / width), num_bins - 1) if width > 0 else 0
        if i not in bins or m["score"] > measured[bins[i]]["score"]:
            bins[i] = step
    winners = [
        {"step": step, "low": low + i * width, "high": low + (i + 1) * width, **measured[step]}
        for i, step in sorted(bins.items())
    ]
    near = [step for step, m in measured.items() if not max_kl or m["kl"] <= max_kl]
    near = near or [min(measured, key=lambda step: measured[step]["kl"])]
    return max(near, key=lambda step: (measured[step]["score"], -step)), winners


def run_stage(workdir: Workdir, stage: str, function: Callable[[], dict]) -> dict:
    """Runs a stage unless it is done; records what it returns and its seconds.

    They are summed over all starts, but for the time before a kill -9, which leaves no chance to write it down.
    """
    record = workdir.done(stage)
    if record is not None:
        print(f"{stage}: done", flush=True)
        return record
    interrupts.check()
    print(f"{stage}:", flush=True)
    clock_path = workdir.root / "stages" / f"{stage}.seconds.json"
    before = json.loads(clock_path.read_text()) if clock_path.exists() else 0.0
    started = time.perf_counter()
    try:
        with workdir.pushed_now_and_then():
            record = function()
    finally:
        write_json_atomic(clock_path, before + time.perf_counter() - started)
    record = {**record, "seconds": before + time.perf_counter() - started}
    workdir.finish(stage, record)
    clock_path.unlink()
    workdir.push()
    return record
