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
      flops: operations of float32 matrix products per second.
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


def measure_limits(size: int = 2048, megabytes: int = 256, repeats: int = 7) -> Limits:
    """Products of square matrices, and the negation of a long vector: no program here does better for long.

    Args:
      size: rows and columns.
      megabytes: of the vector: many times the caches.
      repeats: of each; the median counts.
    """
    matrix = jax.random.normal(jax.random.key(0), (size, size))
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
    return Limits(*rates)


def at_best(phases: Sequence[Phase], limits: Limits) -> float:
    """Seconds: each phase takes the longer of computing and of reading."""
    return sum(max(phase.flops / limits.flops, phase.bytes / limits.bandwidth) for phase in phases)


# --------------------------------------------------------------------------------------------------------- measurements


class Compiler:
    """Compiles programs one after the other, and keeps what that took.

    Attributes:
      seconds: of all.
      peak_bytes: that the largest holds on a device while it runs, by its compiler; 0 where that does not tell.
    """

    def __init__(self):
        self.seconds, self.peak_bytes = 0.0, 0

    def __call__(self, function: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        made = function.lower(*arguments).compile()
        self.seconds += time.perf_counter() - started
        if memory := made.memory_analysis():
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            self.peak_bytes = max(self.peak_bytes, held + memory.temp_size_in_bytes)
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
      at_best: seconds of a call at the limits.
      compile_seconds: of all programs of a call.
      peak_bytes: of the largest.
    """

    name: str
    tokens: int
    unit: str
    seconds: float
    others: float
    runs: tuple[float, ...]
    flops: float
    at_best: float
    compile_seconds: float
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def share(self) -> float:
        """Of what the limits allow."""
        return self.at_best / self.seconds


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
        compiler.seconds, compiler.peak_bytes,
    )  # fmt: skip
