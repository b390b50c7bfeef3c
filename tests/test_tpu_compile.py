"""Nothing lands that a TPU would refuse: every learner's step goes through the TPU compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: test)")
@pytest.mark.parametrize("arguments", [("2", "2", "float32", "none", "0"), ("4", "1", "bfloat16", "full", "8")])
def test_every_step_compiles_for_a_v4_slice(arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "tests/compile_for_tpu.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    temporaries = json.loads(result.stdout.splitlines()[-1])
    steps = {"sft_policy", "r_p", "r_pit", "dpo"}
    of_rl = {f"rl_policy: {name}" for name in ("rollout", "reward", "update")}
    programs = steps | of_rl | {"rl_pit: reward by difference"}
    programs |= {f"{name} {kind}" for name in ("sft_policy", "r_pit") for kind in ("windows", "blocks")}
    if arguments[1] == "2":
        programs |= {f"{name} muon" for name in steps}
        programs |= {f"{name} lora" for name in ("dpo", *of_rl)}
    assert set(temporaries) == programs | {"self_feedback: answers"}
    # Two forward passes of a small model need no memory beyond their arguments.
    assert all(0 < size < 2**30 for name, size in temporaries.items() if name in programs)
