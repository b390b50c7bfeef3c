"""The training loop: traces and the split of a step's seconds (resume is in test_train, signals in test_interrupts)."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from pit_jax import checkpoint
from pit_jax.learners import loop
from pit_jax.metrics import MetricsWriter

pytestmark = pytest.mark.usefixtures("one_device")


def train(root, num_steps=6, **more):
    """Batches take 0.05 s."""

    def batch_at(step):
        time.sleep(0.05)
        return jnp.float32(step)

    step = jax.jit(lambda state, batch: (state + batch, {"loss": (batch, jnp.float32(1.0))}))
    root.mkdir(exist_ok=True)
    return loop.run(
        jnp.float32(0.0), stage="s", num_steps=num_steps, batch_at=batch_at, train_step=step,
        directory=root / "checkpoints", writer=MetricsWriter(root), save_every=100, **more,
    )  # fmt: skip


def test_seconds_of_a_step_have_a_part_for_data(tmp_path):
    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(0.05 <= line["seconds/data"] < 0.5 for line in lines)


@pytest.mark.parametrize("num_steps", [1, 3, 6])
def test_a_trace_is_written(tmp_path, num_steps):
    """Also where there are fewer steps than asked for."""
    assert float(train(tmp_path, num_steps, profile=2)) == sum(range(num_steps))
    traces = list((tmp_path / "profile" / "s").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


def test_a_state_and_the_one_that_is_read_are_not_held_together(tmp_path, monkeypatch):
    """What fits while it trains must fit when it goes on: 1,000 numbers, not 2,000."""
    step = jax.jit(
        lambda state, batch: ({"x": state["x"] + batch}, {"loss": (batch, jnp.float32(1.0))}), donate_argnums=0
    )

    def train(num_steps):
        return loop.run(
            {"x": jnp.zeros(1000)}, stage="s", num_steps=num_steps, batch_at=jnp.float32, train_step=step,
            directory=tmp_path / "checkpoints", writer=MetricsWriter(tmp_path), save_every=100,
        )  # fmt: skip

    held, load = [], checkpoint.ocp.load

    def loading(*args):
        held.append(sum(x.size for x in jax.live_arrays() if x.shape == (1000,)))
        return load(*args)

    assert float(train(2)["x"][0]) == 1.0
    monkeypatch.setattr(checkpoint.ocp, "load", loading)
    assert float(train(4)["x"][0]) == 6.0
    assert held == [0]


def test_without_profile_there_is_none(tmp_path):
    train(tmp_path)
    assert not (tmp_path / "profile").exists()
