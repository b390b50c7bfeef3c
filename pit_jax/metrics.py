"""Training metrics: from (sum, weight) pairs to numbers, to metrics.jsonl, to TensorBoard and to the terminal."""

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from tqdm import tqdm

from pit_jax import files
from pit_jax.types import Metrics

_TORCH = sys.modules.get("torch")
sys.modules["torch"] = None  # which tensorboardX would import where it is installed, for more than a second
try:
    import tensorboardX
finally:
    sys.modules.pop("torch")
    if _TORCH is not None:
        sys.modules["torch"] = _TORCH

RESERVED = ("stage", "step", "time")
"""Keys of a line of metrics.jsonl that are not metrics."""

SHOWN = ("loss", "accuracy", "score", "kl")
"""Metrics that the progress line shows, where they exist."""


def reduce(metrics: Metrics) -> dict[str, float]:
    """sum / weight of each metric, in one transfer to the host; 0 where the weight is 0, as in `losses.masked`."""
    return {name: _mean(name, *pair) for name, pair in jax.device_get(metrics).items()}


def _mean(name: str, total, weight) -> float:
    if np.size(total) != 1 or np.size(weight) != 1:
        raise ValueError(
            f"metric {name!r} is not a pair of scalars: its shapes are {np.shape(total)} and {np.shape(weight)}; "
            "sum both over the batch."
        )
    total, weight = np.asarray(total).item(), np.asarray(weight).item()
    return float(total) / float(weight) if weight else float(total) * 0.0  # NaN stays NaN


def nonfinite(metrics: dict[str, float]) -> list[str]:
    """Names of the metrics that are NaN or infinite, in order."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


class MetricsWriter:
    """Appends to `directory`/metrics.jsonl and writes TensorBoard events under `directory`/tensorboard/STAGE.

    A line of metrics.jsonl is {"stage", "step", "time", metric: value, ...}, with null for NaN and infinity, and the
    time in seconds since 1970. The operating system has each line when `write` returns, so that a killed process loses
    none; a line that was cut short is dropped by the next writer.
    """

    def __init__(self, directory: Path | str, sync: Callable[[], None] = lambda: None):
        """Opens a folder; `sync` brings what is written to where it is kept, if that is not there."""
        self.sync = sync
        self.directory = Path(directory)
        self._path = self.directory / "metrics.jsonl"
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}
        self._purge: dict[str, int] = {}
        self._file: TextIO | None = None
        self._keep(lambda line: True)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Writes one line.

        Args:
          stage: of the pipeline, such as "sft_policy".
          step: after which the values hold.
          values: numbers, as `reduce` returns them.

        Raises:
          ValueError: where a metric has the name of one of the line's own keys.
        """
        taken = [name for name in RESERVED if name in values]
        if taken:
            raise ValueError(
                f"stage {stage}: {taken} cannot be names of metrics: metrics.jsonl uses them; rename them."
            )
        numbers = {name: float(value) for name, value in values.items()}
        line = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        line |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if stage not in self._boards:
            self._boards[stage] = tensorboardX.SummaryWriter(
                str(self.directory / "tensorboard" / stage), purge_step=self._purge.get(stage)
            )
        for name, x in numbers.items():
            if math.isfinite(x):
                self._boards[stage].add_scalar(name, x, step)

    def truncate(self, stage: str, step: int) -> None:
        """Drops the lines of `stage` from `step` on: those that a resumed run is about to write again.

        Args:
          stage: of the pipeline; lines of other stages stay.
          step: the first step that will be written again. A run that resumes from the checkpoint of step n, whose line
            was written before the checkpoint, passes n + 1; one that starts anew passes 0.
        """
        self._keep(lambda line: line["stage"] != stage or line["step"] < step)
        if stage in self._boards:
            self._boards.pop(stage).close()
        if (self.directory / "tensorboard" / stage).exists():
            self._purge[stage] = step

    def close(self) -> None:
        """Flushes and closes the files; a later `write` opens them again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for board in self._boards.values():
            board.close()
        self._boards = {}

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _keep(self, wanted) -> None:
        """Rewrites metrics.jsonl with the whole lines that `wanted` accepts."""
        if not self._path.exists():
            return
        if self._file is not None:
            self._file.close()
            self._file = None
        text = self._path.read_bytes().decode("utf-8", errors="replace")
        kept = []
        *lines, rest = text.split("\n")  # rest: after the last newline, so empty or cut short
        for number, raw in enumerate(lines, 1):
            try:
                if wanted(_parse(raw)):
                    kept.append(raw + "\n")
            except (ValueError, KeyError, TypeError):
                warnings.warn(
                    f"{self._path}:{number} is not a metrics line and was dropped: {raw[:80]!r}", stacklevel=3
                )
        if rest or len(kept) < len(lines):
            files.write_text_atomic(self._path, "".join(kept))


def _parse(raw: str) -> dict:
    line = json.loads(raw)
    return {"stage": str(line["stage"]), "step": int(line["step"])} | line


class Progress:
    """What `progress` returns: a context manager with `update`."""

    def __init__(self, total: int, initial: int, description: str, file: TextIO | None, interval: float):
        self._file = sys.stderr if file is None else file
        self._total, self._initial, self._count, self._description = total, initial, initial, description
        self._interval = interval
        self._start = self._printed_at = time.monotonic()
        self._printed_count = initial
        self._shown: dict[str, float] = {}
        self._active = jax.process_index() == 0 and initial < total
        self._bar = None
        if self._active and self._file.isatty():
            self._bar = tqdm(
                total=total, initial=initial, desc=description, unit="step", dynamic_ncols=True, file=self._file
            )

    def update(self, count: int = 1, values: dict[str, float] | None = None) -> None:
        """Counts `count` more steps; of `values` the metrics in `SHOWN` are displayed."""
        self._count += count
        self._shown = {name: values[name] for name in SHOWN if name in values} if values else self._shown
        if not self._active:
            return
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in self._shown.items()}, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed_at >= self._interval:
            now = time.monotonic()
            # The rate since the last line: the first steps, which compile, do not weigh on the time left.
            rate = (self._count - self._printed_count) / max(now - self._printed_at, 1e-9)
            left = (self._total - self._count) / rate if rate else math.inf
            self._print(rate, f"{_duration(left)} left")
            self._printed_at, self._printed_count = now, self._count

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._active and kind is None:
            seconds = time.monotonic() - self._start
            self._print((self._count - self._initial) / max(seconds, 1e-9), f"in {_duration(seconds)}")

    def _print(self, rate: float, when: str) -> None:
        speed = f"{rate:.2f} steps/s" if rate >= 1 or not rate else f"{1 / rate:.2f} s/step"
        shown = "".join(f", {name}={value:.4g}" for name, value in self._shown.items())
        share = 100 * self._count // self._total
        print(
            f"{self._description}: {self._count}/{self._total} ({share}%), {speed}, {when}{shown}",
            file=self._file,
            flush=True,
        )


def progress(
    total: int, initial: int, description: str, *, file: TextIO | None = None, interval: float = 10.0
) -> Progress:
    """A progress display for a `with` statement: rate, time left and a few metrics.

    On a terminal it is a tqdm bar; elsewhere (a log file, a notebook run as a batch) it is a plain line at most every
    `interval` seconds and one at the end.

    Args:
      total: steps in all.
      initial: steps that were done before; nothing is shown where all are done.
      description: the name of the stage.
      file: where to; sys.stderr by default.
      interval: seconds between plain lines.
    """
    return Progress(total, initial, description, file, interval)


def _duration(seconds: float) -> str:
    return tqdm.format_interval(seconds) if math.isfinite(seconds) else "?"
