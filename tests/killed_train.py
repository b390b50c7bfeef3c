"""Runs `pit_jax.train` and kills it with SIGKILL at a named point: python tests/killed_train.py POINT FLAGS...

Points: rollout (while the second rollout of a stage is sampled), reward (while it is judged), update (while the second
update runs), rounds (between two rounds of the curriculum), save (a checkpoint is written but has not got its name
yet), choice (the evaluator's parameters were chosen, but the stage is not marked as done).
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax

from pit_jax import train
from pit_jax.learners import ppo
from pit_jax.pipelines import stages

PROGRAMS = ("rollout", "reward", "update")
"""What `ppo.make_ppo` gives."""


def die() -> None:
    """As a power cut would: no handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_soon() -> None:
    """When the checkpoint that is being written is there: which step is gone on from must not be left to chance."""
    time.sleep(0.002)
    while any(thread.name == "checkpoint" for thread in threading.enumerate()):
        time.sleep(0.001)
    die()


def die_within(call: int, function):
    """`function`, whose call number `call` is killed a moment after it began."""
    calls = 0

    def run(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            threading.Thread(target=die_soon, daemon=True).start()
            result = function(*args)
            jax.block_until_ready(result)
            time.sleep(1)  # the program was quicker than the killer: it still dies before it can go on
        return function(*args)

    return run


def main() -> None:
    """Patches one point, then runs the real command."""
    point = sys.argv.pop(1)
    if point in PROGRAMS:
        make_ppo = ppo.make_ppo

        def patched(*args, **kwargs):
            made = dict(zip(PROGRAMS, make_ppo(*args, **kwargs), strict=True))
            # All but the update are called once for the candidate at step 0, then for each iteration.
            made[point] = die_within(2 if point == "update" else 3, made[point])
            return tuple(made.values())

        ppo.make_ppo = patched
    elif point in ("rounds", "choice"):
        finish = stages.Workdir.finish

        def finish_and_die(self, stage, record):
            if (point, stage) == ("choice", "evaluator"):
                die()
            finish(self, stage, record)
            if (point, stage) == ("rounds", "rl_pit_1"):
                die()

        stages.Workdir.finish = finish_and_die
    elif point == "save":
        rename = os.rename

        def rename_or_die(source, target, *args, **kwargs):
            if Path(target).parent.name == "rl_policy" and Path(target).parent.parent.name == "checkpoints":
                die()
            return rename(source, target, *args, **kwargs)

        os.rename = os.replace = rename_or_die
    else:
        raise SystemExit(f"no such point: {point}")
    train.run()


if __name__ == "__main__":
    main()
