"""Trains a system: `python -m pit_jax.train --config=configs/pit_synthetic.py --workdir=runs/demo`.

A second start with the same --workdir goes on where the first stopped, or shows the tables again. `--stage=NAME` runs
one stage, `--config.ppo.kl_coef=0.02` changes a number, `--config=configs/pit_synthetic.py:smoke` takes a variant.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pit_jax import cli, config as config_lib, files, processes
from pit_jax.evaluation import pit as pit_evaluation, srt as srt_evaluation
from pit_jax.pipelines import common, pit, srt

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :VARIANT where it has some.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run leaves behind.")
_STAGE = flags.DEFINE_string("stage", None, "Run this stage only; the ones before it must be done.")
_REDO = flags.DEFINE_string("redo", None, "Run this stage and all after it again; fields of these may then be changed.")


SYSTEMS = {
    config_lib.PitConfig: (pit.SYSTEM, pit_evaluation.evaluate),
    config_lib.SrtConfig: (srt.SYSTEM, srt_evaluation.evaluate),
}
"""Config -> its stages, and the last of them."""


def main(argv: list[str]) -> None:
    """Runs the config; a user's mistake ends in one line on stderr and status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; fields are set as --config.FIELD=VALUE")
    again = ", without --redo," if _REDO.value else ""  # which would delete what was just trained
    with cli.one_line_errors(f"the same command{again} goes on from the last checkpoint in {_WORKDIR.value}"):
        processes.start()
        workdir = files.place(_WORKDIR.value)
        cli.keep_programs(workdir)
        config = config_lib.from_config_dict(config_lib.class_of(_CONFIG.value), _CONFIG.value)
        config = common.of_checkpoint(config)
        system, evaluate = SYSTEMS[type(config)]
        tables = workdir / "tables.txt"
        written = files.changed_at(tables)
        typed = (a for a in sys.argv[1:] if not a.startswith(("--stage", "--redo")))
        command = " ".join(["python -m pit_jax.train", *typed])
        common.run(system, config, workdir, evaluate, _STAGE.value, command, _REDO.value)
    if tables.exists() and _STAGE.value in (None, "evaluate"):
        finished = files.changed_at(tables) == written
        print(("All stages were done before.\n" if finished else "") + "\n" + tables.read_text(encoding="utf-8"))
        print(f"Everything is in {workdir}: report/index.html, results.json, metrics.jsonl, samples/, models/.")
        print(f"Every table and figure of the paper: python -m pit_jax.evaluate --workdir={workdir} --tables=all")


def run() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    run()
