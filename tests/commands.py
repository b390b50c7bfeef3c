"""The real commands, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = "configs/pit_synthetic.py:smoke"
SRT_CONFIG = "configs/srt_synthetic.py:smoke"
ADAPTIVE = "--config.ppo.adaptive_kl=True"  # the controller's state has to come back as well


def run(*arguments, cache=None, **more):
    """Runs Python with these arguments in the repository, on one CPU device."""
    command = [sys.executable, *map(str, arguments)]
    settings = {"capture_output": True, "text": True, "timeout": 600, "check": False}
    return subprocess.run(command, **(settings | {"cwd": ROOT, "env": environment(cache)} | more))


def start(*arguments, log, cache=None):
    """The same, and goes on; what it prints is in a file."""
    with open(log, "w") as file:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, env=environment(cache), stdout=file, stderr=file)


def environment(cache=None):
    """Of a command."""
    more = {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}
    flags = "--xla_backend_optimization_level=0"  # of the seconds of a smoke run two thirds are compilation
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more


def train(workdir, *flags, config=CONFIG, program=("-m", "pit_jax.train"), cache=None):
    """Runs the training command; of the smoke variant with an adaptive KL."""
    return run(*train_arguments(workdir, *flags, config=config, program=program), cache=cache)


def train_arguments(workdir, *flags, config=CONFIG, program=("-m", "pit_jax.train")):
    """Of Python."""
    flags = (ADAPTIVE, *flags) if config == CONFIG else flags
    return [*program, f"--config={config}", f"--workdir={workdir}", *flags]
