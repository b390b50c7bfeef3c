"""How fast training, sampling and PPO are on this machine, and how close to what it can do.

python -m pit_jax.bench
python -m pit_jax.bench --works=sft_small,gen_small_b64 --calls=9 --json=bench.jsonl
python -m pit_jax.bench --config=configs/pit_synthetic.py --stages=r_pit,rl_policy
python -m pit_jax.bench --grow=length,vocabulary

`pit_jax/works.py` says what the works are. With --config it is the programs of a config's stages, with random weights
and tokens, for rows as long as the windows allow; one that the devices cannot hold is named, and left out. With --grow
it is a small decoder whose length of rows, vocabulary, rows per batch or layers grow (`pit_jax/growth.py`).

Columns: tokens (or answers) per second, seconds of the median call, operations per second (of attention those of the
causal half), the share of what XLA's matrix products and copies of this machine reach, seconds of compiling, memory of
the largest program on a device, what of it is temporary, and cores that were busy with something else.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import dataclasses
import json
import platform
from collections.abc import Callable, Iterable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from pit_jax import cli, config as config_lib, growth, planner, sharding, speed, stand_ins, works
from pit_jax.pipelines import common

_WORKS = flags.DEFINE_list("works", None, "Works to measure; all by default.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Measures the programs of a config instead of the works.")
_STAGES = flags.DEFINE_list("stages", None, "Of --config: stages to measure; all by default.")
_GROW = flags.DEFINE_list("grow", None, f"What grows instead: some of {', '.join(growth.VALUES)}.")
_CALLS = flags.DEFINE_integer("calls", 5, "Calls of each that count.", lower_bound=1)
_LIST = flags.DEFINE_bool("list", False, "Only prints the names of all works, or writes to --json what they are.")
_JSON = flags.DEFINE_string("json", None, "File to which a JSON object per measurement (--list: per work) is added.")

HEAD = (
    f"{'work':<26}{'tokens/s':>10}{'seconds':>9}{'GFLOP/s':>9}{'of limit':>9}{'compile':>9}{'GiB':>9}"
    f"{'temporary':>11}{'others':>8}"
)


def line(found: speed.Timed) -> str:
    """A line of the table."""
    share = "-" if found.share is None else f"{found.share:.0%}"
    return (
        f"{found.name:<26}{found.rate:>10,.0f}{found.seconds:>9.3f}{found.flops / found.seconds / 1e9:>9.1f}"
        f"{share:>9}{found.compile_seconds:>8.1f}s{found.peak_bytes / 2**30:>9.3f}"
        f"{found.temporary_bytes / 2**30:>11.3f}{found.others:>8.2f}"
    )


def add(rows: Iterable[dict]) -> None:
    """To the file of --json, a line each."""
    with open(_JSON.value, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def measure(name: str, make: Callable[[], works.Work], dtype: Any = "float32", **more: Any) -> None:
    """Measures a work, prints its line and keeps it; `more` is kept beside it."""
    limits = speed.measure_limits(dtype=dtype)  # which move with the clock and the neighbours
    found = speed.measure(name, make(), limits, _CALLS.value)
    print(line(found), flush=True)
    if _JSON.value:
        row = dataclasses.asdict(found) | {
            "rate": found.rate, "share": found.share, "limits": limits._asdict(), "jax": jax.__version__,
            "python": platform.python_version(),
        }  # fmt: skip
        add([row | more])


def head() -> None:
    """What stands above the lines."""
    limits = speed.measure_limits()
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    print(f"{limits.flops / 1e9:,.0f} GFLOP/s in products, {limits.bandwidth / 1e9:,.1f} GB/s in copies")
    print(HEAD, flush=True)


def chosen_works() -> list[str]:
    """Names of --works.

    Raises:
      ValueError: for one that there is not.
    """
    known = works.works()
    names = _WORKS.value or list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"there is no work {name!r}: use some of {', '.join(known)}")
    return names


def measure_works() -> None:
    """Of --works."""
    known, names = works.works(), chosen_works()
    with jax.set_mesh(sharding.make_mesh()):
        head()
        for name in names:
            measure(name, known[name])


def measure_config(config: Any) -> None:
    """The programs of its stages; those that the devices cannot hold are an error at the end."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    common.check_layout(config, dict(mesh.shape))
    with jax.set_mesh(mesh):
        makers = planner.makers_of(config, mesh, _STAGES.value)
        found = [program for make in makers.values() for program in make()]
        head()
        too_large = []
        for program in found:
            sizes = getattr(config, program.model)
            more = {"config": config.name, "batch": program.batch, "length": program.length}
            make = lambda program=program: stand_ins.work(program, config, speed.available_bytes())  # noqa: E731
            try:
                measure(program.stage, make, sizes.dtype, **more)
            except stand_ins.TooLargeError as error:
                print(error, flush=True)
                too_large.append(program.stage)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"{program.stage}: {planner.first_line(error)}", flush=True)
                too_large.append(program.stage)
        if too_large:
            raise ValueError(
                f"not measured, as the devices cannot hold it: {', '.join(too_large)}. `python -m pit_jax.plan "
                "--topology=local` with the same --config says what takes how much, and which flags make it fit; "
                "--topology=v4-64 does so for a slice"
            )


def measure_growth(names: list[str]) -> None:
    """A table for each."""
    if unknown := [name for name in names or [""] if name not in growth.VALUES]:
        raise ValueError(f"--grow={unknown[0]}: use some of {', '.join(growth.VALUES)}")
    with jax.set_mesh(sharding.make_mesh()):
        head()
        for name in names:
            for point in growth.points(name):
                more = {"grows": name, **point._asdict()}
                work = more.pop("work")
                measure(f"{point.program} {name} {point.value}", work, **more)


def main(argv: list[str]) -> None:
    """Prints the table."""
    logging.set_verbosity(logging.ERROR)
    with cli.one_line_errors():
        if argv[1:]:
            raise ValueError(f"unknown arguments {' '.join(argv[1:])}; fields are set as --config.FIELD=VALUE")
        given = {"--works": _WORKS.value, "--config": _CONFIG.value, "--grow": _GROW.value}
        given = [name for name, value in given.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are different measurements: give one of them")
        if _LIST.value and given not in ([], ["--works"]):
            raise ValueError(f"--list is of the works, and not of {given[0]}: give one of them")
        if _STAGES.value and _CONFIG.value is None:
            raise ValueError(f"--stages={','.join(_STAGES.value)} are those of a config: give --config=FILE too")
        if _JSON.value:
            add([])  # a file that cannot be written is an error before anything is measured
        if _LIST.value:
            if _JSON.value:
                add(works.describe(name) for name in chosen_works())
            else:
                print(",".join(chosen_works()))
        elif _GROW.value is not None:
            measure_growth(_GROW.value)
        elif _CONFIG.value is not None:
            measure_config(config_lib.from_config_dict(config_lib.class_of(_CONFIG.value), _CONFIG.value))
        else:
            measure_works()


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
