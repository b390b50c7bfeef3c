"""How fast training, sampling and PPO are on this machine, and how close to what it can do.

python -m pit_jax.bench
python -m pit_jax.bench --works=sft_small,gen_small_b64 --calls=9 --json=bench.jsonl

`pit_jax/works.py` says what the works are. Columns: tokens (or answers) per second, seconds of the median call,
operations per second, the share of what matrix products and copies of this machine reach, seconds of compiling, memory
of the largest program, and cores that were busy with something else.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import dataclasses
import json
import platform
from collections.abc import Iterable

import jax
from absl import app, flags, logging

from pit_jax import cli, sharding, speed, works

_WORKS = flags.DEFINE_list("works", None, "Works to measure; all by default.")
_CALLS = flags.DEFINE_integer("calls", 5, "Calls of each that count.", lower_bound=1)
_LIST = flags.DEFINE_bool("list", False, "Only prints the names of all works, or writes to --json what they are.")
_JSON = flags.DEFINE_string("json", None, "File to which a JSON object per measurement (--list: per work) is added.")

HEAD = f"{'work':<20}{'tokens/s':>10}{'seconds':>9}{'GFLOP/s':>9}{'of limit':>9}{'compile':>9}{'GiB':>7}{'others':>8}"


def line(found: speed.Timed) -> str:
    """A line of the table."""
    return (
        f"{found.name:<20}{found.rate:>10,.0f}{found.seconds:>9.3f}{found.flops / found.seconds / 1e9:>9.0f}"
        f"{found.share:>9.0%}{found.compile_seconds:>8.1f}s{found.peak_bytes / 2**30:>7.2f}{found.others:>8.2f}"
    )


def add(rows: Iterable[dict]) -> None:
    """To the file of --json, a line each."""
    with open(_JSON.value, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    with cli.one_line_errors():
        known = works.works()
        names = _WORKS.value or list(known)
        for name in names:
            if name not in known:
                raise ValueError(f"there is no work {name!r}: use some of {', '.join(known)}")
        if _LIST.value:
            if _JSON.value:
                add(works.describe(name) for name in names)
            else:
                print(",".join(names))
            return
        with jax.set_mesh(sharding.make_mesh()):
            print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores", flush=True)
            for i, name in enumerate(names):
                limits = speed.measure_limits()  # which move with the clock and the neighbours
                if not i:
                    print(
                        f"{limits.flops / 1e9:,.0f} GFLOP/s in products, {limits.bandwidth / 1e9:,.1f} GB/s in copies",
                        HEAD, sep="\n", flush=True,
                    )  # fmt: skip
                found = speed.measure(name, known[name](), limits, _CALLS.value)
                print(line(found), flush=True)
                if _JSON.value:
                    row = dataclasses.asdict(found) | {
                        "rate": found.rate, "share": found.share, "limits": limits._asdict(), "jax": jax.__version__,
                        "python": platform.python_version(),
                    }  # fmt: skip
                    add([row])


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
