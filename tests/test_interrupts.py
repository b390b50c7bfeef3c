"""SIGTERM and Ctrl-C: the step that runs is saved, and the run goes on bitwise."""

import signal
import threading

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
