"""Whether a config's programs fit on a slice, and how fast they can be, without any TPU.

python -m pit_jax.plan --config=configs/srt_tulu2.py:70b --topology=v4:4x8x8
python -m pit_jax.plan --config=configs/pit_llama2.py:7b --topology=v4-64 --stages=r_pit,rl_pit --json=plan.json
python -m pit_jax.plan --config=configs/srt_tulu2.py:7b --topology=v4-128 --stages=dpo --search
python -m pit_jax.plan --config=configs/pit_llama2.py:7b --smallest

Every program of the config's stages goes through the TPU compiler (the extra `tpu` or `test`, on Linux), for batches
as long as the windows allow. Of a program that does not fit the compiler says how much it needs, and other values of
the config, other meshes and larger slices are tried until one does: --noremedies leaves that away.

Memory is that of a chip (of a device, locally) while a program runs: `others` are models that lie beside it, as
ref_policy and reward model in PPO's update. Times are bounds by published rates; MFU counts the operations that the
mathematics asks for, without those that remat does again, and prefill and decode of a program that samples do not
overlap.

--topology: v4:4x4x4, v5e:4x4, v5p:2x2x2, v6e:4x4 (chips along each axis), v4-128 (as Cloud TPU names slices of v4 and
v5p: by TensorCores, two per chip), v5litepod-16 and v6e-16 (by chips), or local: the devices of this machine, with
JAX_PLATFORMS=cuda its GPUs.
--micro_batch: also the largest number of rows at a time of each program.
--search: ranks meshes and micro-batches of each program by the time per token.
--smallest: the smallest slice of the chips of --topology on which all programs fit.
--json=FILE: {config, topology, mesh, chips, programs: [{name, batch, length, fits, peak_gib, parts, flops, bytes,
collectives, seconds, mfu, ...}]} and what the other flags found; while the plan is made, and where it was stopped, what
is known so far, with "finished": false.
"""

import os
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is held, so several plans may be made at once

from absl import app, flags, logging
from ml_collections import config_flags

from pit_jax import cli, config as config_lib, interrupts, planner, slices
from pit_jax.files import write_json_atomic

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :VARIANT where it has some.")
_TOPOLOGY = flags.DEFINE_string("topology", "v4:2x2x1", "Slice to plan for: v4:4x4x4, v4-128, v5litepod-16, local.")
_STAGES = flags.DEFINE_list("stages", None, "Stages to plan; all by default.")
_REMEDIES = flags.DEFINE_bool("remedies", True, "Looks for what makes a program fit that does not.")
_MICRO_BATCH = flags.DEFINE_bool("micro_batch", False, "Also the largest number of rows at a time of each program.")
_SEARCH = flags.DEFINE_bool("search", False, "Ranks meshes and micro-batches instead.")
_SMALLEST = flags.DEFINE_bool("smallest", False, "Finds the smallest slice on which all programs fit instead.")
_JSON = flags.DEFINE_string("json", None, "File for the same numbers.")


def main(argv: list[str]) -> None:
    """Prints the table."""
    logging.set_verbosity(logging.ERROR)
    with cli.one_line_errors():
        if _CONFIG.value is None:
            raise ValueError("--config=FILE is needed: python -m pit_jax.plan --config=configs/srt_tulu2.py:70b")
        if argv[1:]:
            raise ValueError(f"unknown arguments {' '.join(argv[1:])}; fields are set as --config.FIELD=VALUE")
        remedies = _REMEDIES.value if flags.FLAGS["remedies"].present else None
        planner.check_asked(_SMALLEST.value, _SEARCH.value, _MICRO_BATCH.value, remedies, _JSON.value)
        config = config_lib.from_config_dict(config_lib.class_of(_CONFIG.value), _CONFIG.value)
        lock, kept = threading.Lock(), threading.Event()

        def say(line: str) -> None:
            with lock:
                print(line, flush=True)

        def keep(found: dict, finished: bool = False) -> None:
            if _JSON.value:
                with lock:
                    write_json_atomic(_JSON.value, found | {"finished": finished})
                    kept.set()

        def last(name: str) -> str:
            lock.acquire()  # for good: nothing is half-written, and nothing comes behind
            where = f"; what is known so far is in {_JSON.value}" if kept.is_set() else ""
            return f"{name}: the plan is not finished{where}"

        kind = slices.kind_of(_TOPOLOGY.value) if _SMALLEST.value else ""
        slices.place_of(slices.of_kind(kind)[0] if kind else _TOPOLOGY.value)  # loads libtpu
        interrupts.at_once(last)
        if kind:
            found = planner.smallest(config, kind, _STAGES.value, say=say)
        else:
            found = planner.plan(
                config, _TOPOLOGY.value, _STAGES.value, with_remedies=_REMEDIES.value,
                with_micro_batches=_MICRO_BATCH.value, with_search=_SEARCH.value, say=say, keep=keep,
            )  # fmt: skip
        keep(found, finished=True)
        uncompiled = [row["name"] for row in found["programs"] if "refused" in row]
        misfits = [row["name"] for row in found["programs"] if not row["fits"] and "refused" not in row]
        ends = {"does not fit": misfits, "does not compile": uncompiled}
        if any(ends.values()):
            raise ValueError("; ".join(f"{words}: {', '.join(names)}" for words, names in ends.items() if names))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
