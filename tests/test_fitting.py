"""Searches for what fits, over made-up memory: what they find, and how seldom they ask."""

import dataclasses

import pytest

from pit_jax import config as config_lib, fitting
from pit_jax.config import (
    DPOConfig,
    FeedbackConfig,
    MeshConfig,
    ModelConfig,
    PitConfig,
    PPOConfig,
    SFTConfig,
    SrtConfig,
)
from pit_jax.fitting import Candidate, Lever

TINY = ModelConfig(vocab_size=64, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
PIT = PitConfig(
    policy_model=TINY,
    pit_model=dataclasses.replace(TINY, remat="dots"),
    reward_model=dataclasses.replace(TINY, remat="full"),
    sft_policy=SFTConfig(batch_size=48, accumulation=2, chunk_size=128),
    ppo_pit=PPOConfig(rollout_size=96, num_minibatches=4),
)
SRT = SrtConfig(policy_model=TINY, dpo=DPOConfig(batch_size=16), self_feedback=FeedbackConfig(batch_size=6))


def test_values_of_a_config_and_what_to_type():
    values = {"sft_policy.accumulation": 4, "mesh.model": 2, "pretrain.sft.chunk_size": 32}
    found = fitting.changed(PIT, values)
    assert (found.sft_policy.accumulation, found.mesh, found.pretrain.sft.chunk_size) == (4, MeshConfig(0, 2), 32)
    assert fitting.flags(values) == (
        "--config.sft_policy.accumulation=4 --config.mesh.model=2 --config.pretrain.sft.chunk_size=32"
    )
    assert fitting.changed(found, {"sft_policy.accumulation": 2, "mesh.model": 1, "pretrain.sft.chunk_size": 0}) == PIT
    # What is to be typed is read back to the same.
    typed = config_lib.to_config_dict(PIT)
    typed.sft_policy.accumulation, typed.mesh.model, typed.pretrain.sft.chunk_size = 4, 2, 32
    assert config_lib.from_config_dict(PitConfig, typed) == found


@pytest.mark.parametrize(
    ("config", "settings", "model", "stage", "found"),
    [
        (
            # 48 rows in 2 pieces on 4 devices: 6 rows each, which may be 3, 2 or 1.
            PIT, "sft_policy", "policy_model", "sft_policy",
            [("sft_policy.accumulation", (2, 4, 6, 12)), ("policy_model.remat", ("none", "dots", "full")),
             ("sft_policy.chunk_size", (128, 32))],
        ),
        (
            # 24 rows of a minibatch on 4 devices: 6 each.
            PIT, "ppo_pit", "pit_model", "rl_pit: update",
            [("pit_model.remat", ("dots", "full")), ("ppo_pit.chunk_size", (0, 512, 128, 32)),
             ("ppo_pit.num_minibatches", (4, 8, 12, 24))],
        ),
        (
            PIT, "ppo_pit", "pit_model", "rl_pit: rollout", [("ppo_pit.rollout_size", (96, 48, 32, 16))],
        ),
        (
            PIT, "ppo_pit", "pit_model", "rl_pit: reward",
            [("ppo_pit.chunk_size", (0, 512, 128, 32)), ("ppo_pit.rollout_size", (96, 48, 32, 16))],
        ),
        (SRT, "dpo", "policy_model", "dpo: log-probs", [("dpo.chunk_size", (0, 512, 128, 32))]),
        (
            # 6 rows are 8 on 4 devices.
            SRT, "self_feedback", "policy_model", "self_feedback: answers", [("self_feedback.batch_size", (8, 4))],
        ),
    ],
)  # fmt: skip
def test_levers_of_programs(config, settings, model, stage, found):
    levers = fitting.levers(config, settings, model, stage, data=4)
    assert [(lever.field, lever.values) for lever in levers] == found
    for lever in levers:  # all of these are configs
        for value in lever.values:
            fitting.changed(config, {lever.field: value})


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_the_mildest_value_that_fits(length):
    for first in range(length):
        asked: list[int] = []
        found = fitting.mildest(range(length), lambda v, first=first, asked=asked: asked.append(v) or v >= first)
        assert found == first
        assert len(asked) <= 1 + max(length - 1, 1).bit_length() and len(set(asked)) == len(asked)


LEVERS = [Lever("a.pieces", (1, 2, 4, 8)), Lever("m.remat", ("none", "dots", "full"))]
SHARE = {"none": 1.0, "dots": 0.5, "full": 0.25}


def gib(values):
    return 64 / values["a.pieces"] * SHARE[values["m.remat"]]


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (64, {}),
        (32, {"a.pieces": 2}),
        (8, {"a.pieces": 8}),
        (4, {"a.pieces": 8, "m.remat": "dots"}),
        (2, {"a.pieces": 8, "m.remat": "full"}),
        (1, None),
    ],
)
def test_pieces_are_turned_before_remat(limit, found):
    asked = []
    assert fitting.turned(LEVERS, lambda v: asked.append(v) or gib(v) <= limit) == found
    if found is None:
        assert asked == [{"a.pieces": 8, "m.remat": "full"}]  # where that does not fit, nothing does


def test_the_first_place_that_will_do():
    """The levers of a place are asked for, and a place is made, only when those before it will not do."""

    def places():
        yield from (1, 3)
        raise AssertionError("there is no need to look further")

    found = fitting.first_place(places(), lambda size: LEVERS, lambda size, values: gib(values) / size <= 1)
    assert found == (3, {"a.pieces": 8, "m.remat": "full"})
    assert fitting.first_place([1], lambda size: LEVERS, lambda size, values: False) is None
    assert fitting.first_place([2], lambda size: [], lambda size, values: values == {}) == (2, {})


@pytest.mark.parametrize(
    ("memory", "most"),
    [
        (lambda n: 5 + 0.75 * n, 33),
        (lambda n: 28 + 0.75 * n, 2),
        (lambda n: 29 + 0.75 * n, 1),
        (lambda n: 30 + 0.75 * n, 0),
        (lambda n: 20 + 2 * -(-n // 2), 10),  # in steps
        (lambda n: 3 + 0.5 * n + 0.01 * n * n, 32),  # bent
        (lambda n: 0.1 * n * n, 17),
        (lambda n: 20 + 6 * (n > 1) + 0.1 * n, 40),  # a line through 1 and 2 says 2
        (lambda n: 4.0, 4096),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_the_most_rows(memory, most, says):
    """Of 30 GiB, whether the compiler says what a refused program needs or not."""

    def ask(rows):
        fits = memory(rows) <= 30
        return fits, memory(rows) if fits or says else None

    found = fitting.most_rows(ask, 30)
    assert found.rows == most
    assert len(found.asked) <= 18
    if most < 4096:
        assert most + 1 in found.asked, "that one more does not fit is not guessed"
        steps = {memory(n + 1) - memory(n) for n in (1, 2, 3)}
        assert len(steps) > 1 or len(found.asked) <= 4  # two points are a line; a third and a fourth confirm it


def test_meshes_that_models_can_be_cut_over():
    """2 key/value heads are cut over 1 or 2 devices; of width 16 no axis data may have 32."""
    assert fitting.model_axes(PIT, 8) == [1, 2]
    assert fitting.model_axes(PIT, 32) == [2]
    assert fitting.model_axes(PIT, 64) == []
    assert fitting.model_axes(SRT, 1) == [1]


def test_candidates_give_the_batch_of_the_config():
    found = fitting.candidates(SRT, "dpo", 8)
    assert [c[:3] for c in found] == [(8, 1, 1), (8, 1, 2), (4, 2, 1), (4, 2, 2), (4, 2, 4)]
    for one in found:
        dpo = fitting.changed(SRT, one.values).dpo
        assert one.rows * dpo.accumulation * one.data == dpo.batch_size == SRT.dpo.batch_size
    assert [c[:3] for c in fitting.candidates(PIT, "ppo_pit", 8)] == [(8, 1, 3), (4, 2, 6)]
    assert [c[:3] for c in fitting.candidates(SRT, "self_feedback", 8)] == [(8, 1, 1), (4, 2, 2)]


def test_the_fastest_first_and_more_rows_not_asked_where_some_do_not_fit():
    asked = []
    candidates = [Candidate(8, 1, n, {}) for n in (1, 2, 4)] + [Candidate(4, 2, n, {}) for n in (1, 2)]

    def measure(one):
        asked.append(one[:3])
        fits = one.model == 2 or one.rows == 1
        seconds = {1: 16.0, 2: 8.0}[one.model] / one.rows
        return {"fits": fits, "peak_gib": 1.0} | ({"seconds": seconds, "tokens": 8} if fits else {})

    found = fitting.search(candidates, measure)
    assert [(c.data, c.rows) for c, _ in found] == [(4, 2), (4, 1), (8, 1), (8, 2), (8, 4)]
    assert asked == [(8, 1, 1), (8, 1, 2), (4, 2, 1), (4, 2, 2)]
    assert found[-1][1]["said"] == "2 rows do not fit"
