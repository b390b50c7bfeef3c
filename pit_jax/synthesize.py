"""Makes preference rows with a language model behind an OpenAI-compatible server (PIT appendix D).

python -m pit_jax.synthesize --config=configs/synthesize.py --config.base_url=http://localhost:8000/v1 \
    --config.model=MODEL --output=FOLDER

FOLDER/rows.jsonl is read by `pit_jax.train` with --config.data.source=file --config.data.path=FOLDER/rows.jsonl. The
same command goes on where a run was stopped or killed, and pays for no stored answer again; with a larger
--config.num_rows it adds rows.
"""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from pit_jax import cli, config as config_lib
from pit_jax.pipelines import synthesize

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :VARIANT where it has some.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the rows and for all that they were made from.")


def main(argv: list[str]) -> None:
    """A user's mistake, or a server that fails for good, ends in one line on stderr and status 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; fields are set as --config.FIELD=VALUE")
    with cli.one_line_errors(f"the same command goes on from what is in {_OUTPUT.value}"):
        config = config_lib.from_config_dict(config_lib.SynthesisConfig, _CONFIG.value)
        print(synthesize.describe(synthesize.run(config, Path(_OUTPUT.value)), Path(_OUTPUT.value)))


def run() -> None:
    """Entry point."""
    logging.set_verbosity(logging.WARNING)
    flags.mark_flags_as_required(["config", "output"])
    app.run(main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    run()
