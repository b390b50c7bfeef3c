"""What the scripts here share: the works, the clock, and the row that each writes.

python launch/peers/with_trl.py --works=FILE --work=dpo_small --variant=stored --calls=5 --out=ROW

`--works` is what `python -m pit_jax.bench --list --json=FILE` has written. Only numpy: each library has an environment
of its own.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

UNCOUNTED = 2
"""The first call compiles, the second may find other memory than those behind it."""

PAD, BOS, EOS = 0, 1, 2
"""Random tokens are from 3 on, and sampling is told of no end."""


class Busy(NamedTuple):
    """Seconds: of the clock, and of processors by this process and by all; the latter no number outside Linux."""

    clock: float
    own: float
    all: float


def busy() -> Busy:
    """Now; children count where they have ended."""
    times, path = os.times(), Path("/proc/stat")
    own = times.user + times.system + times.children_user + times.children_system
    everyone = float("nan")
    if path.exists():
        ticks = [int(n) for n in path.read_text().partition("\n")[0].split()[1:9]]
        everyone = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for disks
    return Busy(time.perf_counter(), own, everyone)


class Ends:
    """`mark` is called when training or sampling starts, and at the end of each call."""

    def __init__(self):
        self.found: list[Busy] = []

    def mark(self, *_: Any) -> None:
        """Now."""
        self.found.append(busy())

    def row(self, calls: int) -> dict[str, Any]:
        """Seconds of the first call, and seconds and cores busy with something else of those that count."""
        needed = 1 + UNCOUNTED + calls
        if len(self.found) < needed:
            raise RuntimeError(f"{len(self.found)} ends of calls were marked, but {needed} should have been")
        pairs = list(zip(self.found, self.found[1:needed], strict=False))
        seconds = [b.clock - a.clock for a, b in pairs]
        others = [(b.all - a.all - (b.own - a.own)) / (b.clock - a.clock) for a, b in pairs]
        return {
            "first_seconds": seconds[0],
            "seconds": seconds[UNCOUNTED:],
            "others": [max(n, 0.0) if n == n else None for n in others[UNCOUNTED:]],
        }


def random_tokens(work: dict, seed: int, *shape: int) -> np.ndarray:
    """As in pit_jax.works: int32, without the ids that are usually special."""
    return np.random.default_rng(seed).integers(3, work["sizes"]["vocab_size"], shape, dtype=np.int32)


def pairs(work: dict, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y_w and y_l of a batch, [rows, prompt] and twice [rows, answer]."""
    prompt, answer = work["prompt"], work["answer"]
    x, chosen, rejected = np.split(
        random_tokens(work, seed, work["rows"], prompt + 2 * answer), [prompt, prompt + answer], axis=1
    )
    return x, chosen, rejected


def limit(multiply: Callable[[np.ndarray], Callable[[], Any]], size: int = 2048, repeats: int = 7) -> float:
    """Operations per second of products of float32 matrices, the median; `multiply(a)()` waits for a @ a."""
    product = multiply(np.random.default_rng(0).standard_normal((size, size), np.float32))
    product()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)


def main(
    multiply: Callable[[np.ndarray], Callable[[], Any]],
    kinds: dict[str, Callable[[dict, str, int, Ends], None]],
    packages: Sequence[str],
) -> None:
    """Runs a work and writes its row.

    Args:
      multiply: see `limit`.
      kinds: beginning of a work's name -> `run(work, variant, calls, ends)`, which marks `calls + 1` times.
      packages: whose versions are told.
    """
    parser = argparse.ArgumentParser()
    for name in ("works", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument("--calls", type=int, default=5)
    args = parser.parse_args()
    works = {row["work"]: row for row in map(json.loads, Path(args.works).read_text("utf-8").splitlines())}
    ends, flops = Ends(), limit(multiply)
    kinds[args.work.partition("_")[0]](works[args.work], args.variant, UNCOUNTED + args.calls, ends)
    versions = {name: importlib.metadata.version(name) for name in packages}
    row = ends.row(args.calls) | {"limit_flops": flops, "versions": versions}
    Path(args.out).write_text(json.dumps(row), "utf-8")
