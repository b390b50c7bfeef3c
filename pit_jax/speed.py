"""Seconds of compiled programs, beside what the machine can do at best.

Medians, as one disturbance says nothing of a program. On a machine that others use too, what they took of it meanwhile
stands beside each number (`Timed.others`): numbers of different minutes compare badly, ratios of turns well.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pit_jax.works import Phase, Work


class Limits(NamedTuple):
    """What the devices of a process did at most.

    Attributes:
      flops: operations of matrix products per second.
      bandwidth: bytes per second, read or written.
    """

    flops: float
    bandwidth: float


class Busy(NamedTuple):
    """Seconds of processor time, of this process and of all."""

    clock: float
    own: float
    all: float

    @classmethod
    def now(cls) -> "Busy":
        """Those since the start of the machine; `all` is not a number where it is not told."""
        times, path = os.times(), Path("/proc/stat")
        if not path.exists():
            return cls(time.perf_counter(), times.user + times.system, float("nan"))
        ticks = [int(n) for n in path.read_text().partition("\n")[0].split()[1:9]]
        seconds = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for disks
        return cls(time.perf_counter(), times.user + times.system, seconds)


class Call(NamedTuple):
    """One call.

    Attributes:
      seconds: that it took.
      others: cores that were busy meanwhile with something else.
    """

    seconds: float
    others: float


def timed(function: Callable[[], Any]) -> Call:
    """Runs it; it gives back what is on the host, or arrays."""
    before = Busy.now()
    jax.block_until_ready(function())
    after = Busy.now()
    seconds = after.clock - before.clock
    others = (after.all - before.all - (after.own - before.own)) / seconds
    return Call(seconds, max(others, 0.0))


def median(calls: Sequence[Call]) -> float:
    """Seconds of the median call."""
    return statistics.median(call.seconds for call in calls)


# -------------------------------------------------------------------------------------------------------------- limits


def available_bytes() -> float:
    """What a device of this machine can still hold; the devices of a CPU share its memory. Infinite if nothing says."""
    statistics = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    free = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limits = [Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current")]
    if all(limit.exists() for limit in limits) and (most := limits[0].read_text().strip()) != "max":
        free.append(float(most) - float(limits[1].read_text()))
    return min(free, default=float("inf")) / len(jax.local_devices())


def measure_limits(size: int = 2048, megabytes: int = 256, repeats: int = 7, dtype: Any = jnp.float32) -> Limits:
    """Products of square matrices by XLA, and the negation of a long vector, which is read and written.

    Other libraries may multiply faster, and what only reads may read fewer bytes than that. One device is measured;
    others are taken for as fast, but for those of a CPU, which share its cores.

    Args:
      size: rows and columns.
      megabytes: of the vector: many times the caches.
      repeats: of each; the median counts.
      dtype: of the matrices.
    """
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    vector = jnp.ones(megabytes * 2**18, jnp.float32)
    copy = jax.jit(lambda x: -x, donate_argnums=0)  # in place: no pages are new

    def negate():
        nonlocal vector
        vector = copy(vector)
        return vector

    rates = []
    for run, work in ((lambda: product(matrix, matrix), 2 * size**3), (negate, 2 * megabytes * 2**20)):
        timed(run)
        rates.append(work / median([timed(run) for _ in range(repeats)]))
    devices = 1 if jax.default_backend() == "cpu" else len(jax.devices())
    return Limits(*(devices * rate for rate in rates))


def at_best(phases: Sequence[Phase], limits: Limits) -> float | None:
    """Seconds: each phase takes the longer of computing and of reading; None where the bytes of one are not known."""
    if any(phase.bytes is None for phase in phases):
        return None
    return sum(max(phase.flops / limits.flops, phase.bytes / limits.bandwidth) for phase in phases)


# --------------------------------------------------------------------------------------------------------- measurements


def peak_bytes(made: Any) -> tuple[int, int]:
    """(bytes on a device while a compiled program runs, those of them that are temporary); 0 where it is not told."""
    memory = made.memory_analysis()
    if memory is None:
        return 0, 0
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes, memory.temp_size_in_bytes


class Compiler:
    """Compiles programs one after the other, and keeps what that took.

    Attributes:
      seconds: of all.
      peak_bytes: that the largest holds on a device while it runs, by its compiler; 0 where that does not tell.
      temporary_bytes: of the same, what is neither given to it nor given back.
    """

    def __init__(self):
        self.seconds, self.peak_bytes, self.temporary_bytes = 0.0, 0, 0

    def __call__(self, function: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        made = function.lower(*arguments).compile()
        self.seconds += time.perf_counter() - started
        found = peak_bytes(made)
        self.peak_bytes, self.temporary_bytes = max((self.peak_bytes, self.temporary_bytes), found)
        return made


@dataclasses.dataclass(frozen=True)
class Timed:
    """What was measured of a work.

    Attributes:
      name: of the work.
      tokens, unit: that a call counts, and of which kind.
      seconds: of the median call.
      others: cores that were busy with something else, in the median over calls.
      runs: seconds of each call.
      flops: operations of a call.
      at_best: seconds of a call at the limits, if that is known.
      compile_seconds: of all programs of a call.
      peak_bytes, temporary_bytes: of the largest: see `Compiler`.
    """

    name: str
    tokens: int
    unit: str
    seconds: float
    others: float
    runs: tuple[float, ...]
    flops: float
    at_best: float | None
    compile_seconds: float
    peak_bytes: int
    temporary_bytes: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def share(self) -> float | None:
        """Of what the limits allow, if that is known."""
        return None if self.at_best is None else self.at_best / self.seconds


def measure(name: str, work: Work, limits: Limits, calls: int = 5, warmup: int = 1) -> Timed:
    """Compiles a work and calls it.

    Args:
      name: of the work.
      work: what is called.
      limits: of the devices.
      calls: that count.
      warmup: calls before them.
    """
    compiler = Compiler()
    call = work.start(compiler)
    for i in range(warmup):
        call(i)
    found = [timed(lambda i=i: call(i)) for i in range(warmup, warmup + calls)]
    return Timed(
        name, work.tokens, work.unit, median(found), statistics.median(c.others for c in found),
        tuple(c.seconds for c in found), sum(phase.flops for phase in work.phases), at_best(work.phases, limits),
        compiler.seconds, compiler.peak_bytes, compiler.temporary_bytes,
    )  # fmt: skip
