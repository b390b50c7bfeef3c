"""SIGTERM and Ctrl-C: the step that runs is saved, and the run goes on bitwise."""

import gc
import signal
import subprocess
import sys
import threading
import time

import commands
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax import checkpoint, interrupts
from pit_jax.learners import loop
from pit_jax.metrics import MetricsWriter

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def ctrl_c():
    """As at a terminal: a shell's background processes, which tests may be, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def train(root, signals=None, evaluated=None):
    """Seven steps of x -> 1.1 x + step; `signals` says which come in which step."""
    root.mkdir(exist_ok=True)

    def train_step(state, step):
        for number in (signals or {}).get(step, ()):
            signal.raise_signal(number)  # to this thread, so that the next one finds it handled
        return {"x": state["x"] * 1.1 + step}, {"loss": (jnp.float32(step), jnp.float32(1.0))}

    return loop.run(
        {"x": jnp.arange(3.0)},
        stage="s",
        num_steps=7,
        batch_at=lambda step: step,
        train_step=train_step,
        directory=root / "checkpoints",
        writer=MetricsWriter(root),
        save_every=100,
        evaluate=None if evaluated is None else lambda state, step: evaluated.append((step, float(state["x"][1]))),
        eval_every=3,
    )


@pytest.mark.parametrize(("step", "number"), [(2, signal.SIGTERM), (3, signal.SIGINT), (6, signal.SIGTERM)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path, step, number):
    """Asked in the step with this number, of 0 to 6: also where that one is evaluated, and the last."""
    whole, parts = [], []
    expected = train(tmp_path / "whole", evaluated=whole)
    before = signal.getsignal(number)
    with pytest.raises(interrupts.Interrupted, match=f"stage s: step {step + 1} of 7 is saved") as stopped:
        train(tmp_path / "parts", {step: [number]}, parts)
    assert stopped.value.number == number and signal.getsignal(number) is before
    assert checkpoint.latest_step(tmp_path / "parts" / "checkpoints") == step + 1
    np.testing.assert_array_equal(train(tmp_path / "parts", evaluated=parts)["x"], expected["x"])
    assert parts == whole
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert len(lines[0]) == len(lines[1]) == 7


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, {1: [signal.SIGINT, signal.SIGINT]})
    assert not (tmp_path / "checkpoints").exists()


PROGRAM = """
import sys, time
from absl import flags
from pit_jax import cli, interrupts
flags.FLAGS(sys.argv[:1])
with cli.one_line_errors("the same command goes on"):
    interrupts.take_back()
    try:
        print("here", flush=True)
        time.sleep(60)
    finally:
        print("tidied", flush=True)
"""


def test_sigterm_where_no_step_runs_ends_with_the_status_of_a_restart():
    """As while a stage samples, asks a critic or evaluates: launchers start it again."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": commands.ROOT}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=commands.environment(), **settings)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (interrupts.RESTART, "tidied\n"), errors
    assert errors.strip() == "SIGTERM; the same command goes on"


def test_sigterm_while_garbage_is_collected_is_not_lost():
    """As in JAX's callback, out of which no exception comes."""
    calls = []

    def callback(phase, info):
        if not calls:
            calls.append(phase)
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(interrupts.Terminated), interrupts.raised():
            gc.collect()
            time.sleep(10)
    finally:
        gc.callbacks.remove(callback)
    assert calls == ["start"] and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_tidied_up_after_sigterm_is_not_disturbed():
    tidied = []
    with pytest.raises(interrupts.Terminated), interrupts.raised():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(0.5)
            signal.raise_signal(signal.SIGTERM)
            tidied.append(True)
    assert tidied


def test_a_second_sigterm_is_a_restart_too(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(interrupts.Terminated) as ended, interrupts.raised():
        train(tmp_path, {1: [signal.SIGTERM, signal.SIGTERM]})
    assert ended.value.code == interrupts.RESTART and signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_so(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert train(tmp_path, {1: [signal.SIGINT]})["x"].shape == (3,)


def test_other_threads_are_left_alone(tmp_path):
    """Python gives signals to the main thread alone: a loop in another one trains as it did."""
    done = []
    thread = threading.Thread(target=lambda: done.append(interrupts.deferred().__enter__()()))
    thread.start()
    thread.join()
    assert done == [0]
