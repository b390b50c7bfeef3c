"""Judges what a finished run writes: python -m pit_jax.evaluate --workdir=runs/demo --tables=all

Writes results.json, tables.txt, tables/*.csv and report/ into the workdir. Answers and verdicts are kept below
evaluation/, so a second start, or one that asks for more, makes only what is missing.
"""

import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from pit_jax import sharding
from pit_jax.data.sources import DataError
from pit_jax.evaluation import pit as evaluation
from pit_jax.pipelines import pit

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a finished `python -m pit_jax.train`.")
_TABLES = flags.DEFINE_list("tables", ["all"], f"all, or some of {', '.join(evaluation.TABLES)}.")
_JUDGES = flags.DEFINE_list("judges", ["verifier", "evaluator"], f"Of {', '.join(evaluation.OWN_JUDGES)}.")
_ITERATIONS = flags.DEFINE_integer("iterations", 5, "K: iterations of each method.")
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0", "0.2", "0.4", "0.6", "0.8", "1"], "Of the temperature sweep.")
_SHUFFLES = flags.DEFINE_integer("shuffles", 100, "Orders of the comparisons for Elo.")


def options_of_flags() -> evaluation.Options:
    """The flags as options.

    Raises:
      ValueError: where a value is not one of the known ones.
    """
    try:
        temperatures = tuple(float(t) for t in _TEMPERATURES.value)
    except ValueError:
        raise ValueError(f"--temperatures={','.join(_TEMPERATURES.value)}: numbers with commas between them") from None
    names = tuple(_TABLES.value)
    return evaluation.Options(
        tables=evaluation.TABLES if names == ("all",) else names,
        judges=tuple(_JUDGES.value),
        num_iterations=_ITERATIONS.value,
        temperatures=temperatures,
        num_shuffles=_SHUFFLES.value,
    )


def main(argv: list[str]) -> None:
    """A user's mistake ends in one line on stderr and status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    workdir = Path(_WORKDIR.value)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(workdir.absolute() / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        options = options_of_flags()
        command = f"python -m pit_jax.train --config=... --workdir={workdir}"
        context = pit.open_finished(workdir, ["rl_policy", "final", "evaluator"], command)
        with jax.set_mesh(sharding.make_mesh(context.config.mesh.data, context.config.mesh.model)):
            pit.load_data(context)
            evaluation.evaluate(context, options)
    except (DataError, ValueError) as error:
        if flags.FLAGS["v"].value > 0:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is in evaluation/", file=sys.stderr)
        sys.exit(130)
    print((workdir / "tables.txt").read_text(encoding="utf-8"))
    print(f"Everything is in {workdir}: results.json, tables/, evaluation/, samples/test.jsonl.")


def run() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    flags.mark_flag_as_required("workdir")
    app.run(main)


if __name__ == "__main__":
    run()
