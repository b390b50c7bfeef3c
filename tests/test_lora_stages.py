"""Adapters in RL as a stage: which weights a round reads, what it leaves behind, and which candidates others read."""

import dataclasses

import jax
import numpy as np
import pytest
from test_rl_stage import make_context

from pit_jax import checkpoint
from pit_jax.config import LoraConfig, OptimizerConfig
from pit_jax.files import read_json
from pit_jax.learners import ppo
from pit_jax.models import lora
from pit_jax.pipelines import common, pit

pytestmark = pytest.mark.usefixtures("one_device")
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "v", "up", "down"))


def context_of(root, **settings):
    context = make_context(root, **settings)
    context.config = dataclasses.replace(context.config, lora=LORA)
    return context


def save(context, stage, seed=0, bias=None):
    params = common.init_params(common.model_of(context, stage), jax.random.key(seed))
    if bias is not None:
        inner = params["params"]
        params = {"params": inner | {"head": inner["head"] * 0, "bias": inner["bias"] + bias}}
    context.workdir.save_model(stage, params)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-7), a, b)


def test_two_rounds_of_rl(tmp_path, monkeypatch):
    """KL (k3 is never negative) is to the SFT model in both, R_PIT says 4 to everything, R_P 3.

    Of the first round ref_policy is the base of the state, in both the reward model is that of the value model, whose
    head starts at 0.
    """
    context = context_of(
        tmp_path, num_iterations=1, num_epochs=1, kl_estimator="k3", policy_optimizer=OptimizerConfig(learning_rate=0.1)
    )
    for stage, bias in (("sft_pit", None), ("r_p", 3.0), ("r_pit", 4.0)):
        save(context, stage, bias=bias)
    monkeypatch.setattr(pit, "choose_by_kl_bin", lambda measured, *_: (max(measured), []))  # the last one
    compiled, make_ppo = [], ppo.make_ppo
    once = lambda *args, **kwargs: (compiled or compiled.append(make_ppo(*args, **kwargs)) or compiled)[0]  # noqa: E731
    monkeypatch.setattr(pit.ppo, "make_ppo", once)  # both rounds are one program
    read, load_model = [], common.load_model
    monkeypatch.setattr(common, "load_model", lambda c, stage: read.append(stage) or load_model(c, stage))
    found = []
    for stage, start in (("rl_pit_1", "sft_pit"), ("rl_pit_2", "rl_pit_1")):
        references = pit.References(context, "data", start)
        read.clear()
        record = pit.rl_stage(context, stage, context.config.ppo_pit, start, references)
        found += [record["candidates"][step] for step in ("0", "1")]
        assert sorted(read) == {"rl_pit_1": ["r_pit", "sft_pit"], "rl_pit_2": ["r_pit", "rl_pit_1", "sft_pit"]}[stage]
    kl = [m["kl"] for m in found]
    assert abs(kl[0]) < 1e-5 and min(kl[1:]) > 0.01, kl
    assert {m["score"] for m in found} == {4.0}

    for stage, start in (("rl_pit_1", "sft_pit"), ("rl_pit_2", "rl_pit_1")):
        folder = context.workdir.adapters(stage)
        values = read_json(folder / "adapters.json")
        assert values == {"rank": 2, "alpha": 4.0, "targets": ["q", "v", "up", "down"], "base": f"models/{start}"}
        base = load_model(context, start)
        fresh = lora.add(base, LORA, jax.random.key(0))
        trained = checkpoint.restore(folder, 0, lora.trained(fresh))
        left = load_model(context, stage)
        assert_close(left, lora.merge(lora.with_trained(fresh, trained)))
        before, after = base["params"]["layers"], left["params"]["layers"]
        assert np.abs(after["up"] - before["up"]).max() > 1e-3
        np.testing.assert_array_equal(after["k"], before["k"])


def test_candidates_of_a_policy_are_read_with_what_they_were_trained_on(tmp_path):
    context = context_of(tmp_path)
    save(context, "sft_policy", seed=5)
    base = common.load_model(context, "sft_policy")
    adapted = lora.add(base, LORA, jax.random.key(1))
    moved = lora.with_trained(adapted, jax.tree.map(lambda x: x + 0.5, lora.trained(adapted)))
    context.workdir.candidates("rl_policy").add(1, lora.trained(moved), {})
    (policy,) = pit.References(context, "policy_checkpoint", "sft_pit").policies
    jax.tree.map(np.testing.assert_array_equal, policy, moved)
