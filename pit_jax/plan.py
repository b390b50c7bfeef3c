"""Whether a config's programs fit on a slice, and how fast they can be, without any TPU.

python -m pit_jax.plan --config=configs/srt_tulu2.py:70b --topology=v4:4x8x8
python -m pit_jax.plan --config=configs/pit_llama2.py:7b --topology=v4-64 --stages=r_pit,rl_pit --json=plan.json

Every program of the config's stages goes through the TPU compiler (the extra `tpu` or `test`, on Linux), for batches
as long as the windows allow. A program that does not fit is refused by the compiler, which says how much it needs.

--topology: v4:4x4x4, v5e:4x4, v5p:2x2x2, v6e:4x4 (chips along each axis), v4-128 (as Cloud TPU names slices of v4 and
v5p: by TensorCores, two per chip), or local: the devices of this machine.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is held, so several plans may be made at once

from absl import app, flags, logging
from ml_collections import config_flags

from pit_jax import cli, config as config_lib, planner
from pit_jax.files import write_json_atomic

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :VARIANT where it has some.")
_TOPOLOGY = flags.DEFINE_string("topology", "v4:2x2x1", "Slice to plan for: v4:4x4x4, v4-128, v5e:4x4, local.")
_STAGES = flags.DEFINE_list("stages", None, "Stages to plan; all by default.")
_JSON = flags.DEFINE_string("json", None, "File for the same numbers.")


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    with cli.one_line_errors():
        if _CONFIG.value is None:
            raise ValueError("--config=FILE is needed: python -m pit_jax.plan --config=configs/srt_tulu2.py:70b")
        config = config_lib.from_config_dict(config_lib.class_of(_CONFIG.value), _CONFIG.value)
        found = planner.plan(config, _TOPOLOGY.value, _STAGES.value)
        if _JSON.value:
            write_json_atomic(_JSON.value, found)
        misfits = [row["name"] for row in found["programs"] if not row["fits"]]
        if misfits:
            raise ValueError(f"does not fit: {', '.join(misfits)}")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
