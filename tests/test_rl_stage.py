"""RL as a stage: which models a round reads, what it scores, and which of its checkpoints it leaves behind."""

import collections
import functools
import json
import shutil
import time
import types

import jax
import numpy as np
import pytest

from pit_jax import sampling
from pit_jax.config import DataConfig, ModelConfig, OptimizerConfig, PitConfig, PPOConfig, RewardModelConfig
from pit_jax.data import encode
from pit_jax.learners import ppo
from pit_jax.metrics import MetricsWriter
from pit_jax.pipelines import common, pit
from pit_jax.pipelines.common import Context
from pit_jax.pipelines.stages import Workdir
from pit_jax.types import PreferenceExample

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
EOS = 2


class Characters:
    """One id per ASCII character: a vocabulary of 128."""

    vocab_size, pad_id, bos_id, eos_id = 128, 0, 1, EOS
    control_ids = {"<<Candidate>>": 4, "<<Improved>>": 5}

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i >= 32)


ROWS = [PreferenceExample(prompt=f"{i}?", rejected=f"{i}-", chosen=f"{i}++") for i in range(4)]
HELD = [PreferenceExample(prompt=f"{i}!", rejected=f"{i}<", chosen=f"{i}>") for i in range(5, 8)]
MARKS = {"sft_policy": 10.0, "sft_pit": 20.0, "r_p": 30.0, "r_pit": 40.0, "rl_policy": 50.0, "rl_pit_1": 60.0}


def make_context(root, loss="gap", rollout_size=8, **settings):
    settings = PPOConfig(rollout_size=rollout_size, num_minibatches=1, eval_every=1, **settings)
    config = PitConfig(
        data=DataConfig(prompt_window=4, response_window=4, reflection_window=4),
        policy_model=SIZES, pit_model=SIZES, reward_model=SIZES, r_pit=RewardModelConfig(loss=loss),
        ppo=settings, ppo_pit=settings, arms=("second_rl_only",),
    )  # fmt: skip
    workdir = Workdir(root / "w", config)
    encoder = encode.make_encoder(Characters(), config.data)
    rows = {"rl": ROWS, "selection": HELD}
    return Context(config, workdir, MetricsWriter(workdir.root), rows=rows, encoder=encoder)


@pytest.fixture(scope="module", autouse=True)
def shapes_once():
    """Shapes are traced once per module of the models: that is most of what these tests would do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes", functools.cache(common.shapes))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory, shapes_once, one_device):
    """A folder of models of one number each, by which they are known again."""
    context = make_context(tmp_path_factory.mktemp("marked"))
    spec = lambda x: x.sharding.spec if x.sharding else jax.P()  # noqa: E731
    for stage, value in MARKS.items():
        full = lambda x: jax.device_put(np.full(x.shape, value, x.dtype), spec(x))  # noqa: B023, E731
        context.workdir.save_model(stage, jax.tree.map(full, common.shapes(common.model_of(context, stage))))
    return context.workdir.root / "models"


@pytest.fixture
def run(tmp_path, models):
    """(stage, settings) -> (what the stage records, its context): by `stage_functions`, on the marked models."""

    def run(stage, **settings):
        context = make_context(tmp_path, **settings)
        shutil.copytree(models, context.workdir.root / "models", dirs_exist_ok=True)
        return pit.stage_functions(context)[stage](), context

    return run


def mark(params):
    (value,) = {float(v) for x in jax.tree.leaves(params) for v in np.unique(x)}
    return value


@pytest.fixture
def collected(monkeypatch):
    """PPO without its arithmetic: an update adds 1 to the policy, `measured` says KL and score after each step.

    What every call of judge was given: first the selection rows at step 0, then a training batch and the selection
    rows in turn.
    """
    calls = types.SimpleNamespace(measured={}, seen=[], seconds=collections.Counter(), now=0.0)

    def make_ppo(model, decode_model, value_model, score, *optimizers, max_new_tokens, eos_id):
        def sample(state, batch, key):
            calls.now += calls.seconds["rollout"]
            prompts = jax.device_get(batch.prompts)
            answers = [Characters().encode("ok")] * len(prompts.lengths)
            return sampling.append_ids(prompts, answers, max_new_tokens, eos_id)

        def judge(state, ref_params, reward_params, batch, rollout):
            calls.now += calls.seconds["reward"]
            value = state.value.params["params"]
            calls.seen.append(
                types.SimpleNamespace(
                    policy=mark(state.policy.params), anchor=mark(ref_params), reward=mark(reward_params),
                    value=mark(value["backbone"]), head=mark([value["head"], value["bias"]]),
                    batch=jax.device_get(batch),
                )
            )  # fmt: skip
            kl, raw = calls.measured.get(int(state.step), (0.0, 0.0))
            metrics = {"kl": (kl, 1.0), "score": (raw, 1.0), "length": (3.0, 1.0)}
            return ppo.Experience(rollout, None, None, None), None, state.scores, metrics

        def update(state, experience, statistics, mean_kl, key):
            calls.now += calls.seconds["update"]
            params = jax.tree.map(lambda x: x + 1, state.policy.params)
            return state._replace(step=state.step + 1, policy=state.policy._replace(params=params)), {}

        return sample, judge, update

    monkeypatch.setattr(pit.ppo, "make_ppo", make_ppo)
    monkeypatch.setattr(common, "sample", lambda model, params, prompts, key, **_: [[ord("y")] for _ in prompts])
    return calls


def unpadded(prompts):
    """Rows of ids of left-padded prompts."""
    return [list(row[-n:]) for row, n in zip(prompts.tokens, prompts.lengths, strict=True)]


@pytest.mark.parametrize(
    ("stage", "loss", "start", "anchor", "reward"),
    [
        ("rl_policy", "gap", "sft_policy", "sft_policy", "r_p"),
        ("rl_pit_1", "gap", "sft_pit", "sft_pit", "r_pit"),
        ("rl_pit_2", "gap", "rl_pit_1", "sft_pit", "r_pit"),
        ("arm_second_rl_only", "gap", "sft_pit", "sft_pit", "r_pit"),
        ("rl_pit_1", "r_p_difference", "sft_pit", "sft_pit", "r_p"),
        ("rl_policy", "r_p_difference", "sft_policy", "sft_policy", "r_p"),
    ],
)
def test_which_models_a_round_reads(run, collected, stage, loss, start, anchor, reward):
    """KL is to the SFT model in every round; the value model starts as the reward model with a head of zeros."""
    run(stage, loss=loss, num_iterations=2)
    assert len(collected.seen) == 5
    assert [c.policy - MARKS[start] for c in collected.seen] == [0, 0, 1, 1, 2]
    for call in collected.seen:
        assert (call.anchor, call.reward) == (MARKS[anchor], MARKS[reward])
        assert (call.value, call.head) == (MARKS[reward], 0.0)


# KL from 0 to 5 in two bins of 2.5: steps 0 to 3 and step 4.
MEASURED = {0: (0.0, 0.1), 1: (1.0, 0.4), 2: (1.5, 0.9), 3: (1.9, 0.9), 4: (5.0, 2.0)}


@pytest.mark.parametrize(
    ("stage", "max_kl", "chosen"), [("rl_policy", 0.0, 4), ("rl_policy", 2.0, 2), ("rl_pit_2", 1.2, 1)]
)
def test_the_chosen_checkpoint_is_left_behind(run, collected, stage, max_kl, chosen):
    """The best score under the limit, of equal ones the earlier, and not the last parameters."""
    collected.measured = MEASURED
    record, context = run(stage, num_iterations=4, num_kl_bins=2, max_kl=max_kl)
    start = MARKS["sft_policy" if stage == "rl_policy" else "rl_pit_1"]
    assert mark(common.load_model(context, stage)) == start + chosen
    assert record["chosen_step"] == chosen
    assert [winner["step"] for winner in record["kl_bins"]] == [2, 4]
    assert {int(step): (m["kl"], m["score"]) for step, m in record["candidates"].items()} == MEASURED


def test_a_round_on_the_data_reads_both_answers_of_every_prompt(run, collected):
    """4 prompts are 8 rows: with y_w behind them they are, token for token, R_PIT's rows (w, l) and (w, w)."""
    _, context = run("rl_pit_1", num_iterations=1)
    prompts = unpadded(collected.seen[1].batch.prompts)
    e = context.encoder
    assert sorted(prompts) == sorted(e.pit_prompt(r.prompt, y) for r in ROWS for y in (r.rejected, r.chosen))
    groups = pit.gap_groups(e, ROWS)
    chosen = {chr(prompt[8]): e.response(r.chosen) for r in ROWS for prompt in [e.pit_prompt(r.prompt, "")]}
    rows = [prompt + chosen[chr(prompt[8])] for prompt in prompts]
    assert sorted(rows) == sorted(group[i] for group in groups for i in (0, 1))


def test_a_round_on_the_policy_reads_every_prompt_once(run, collected):
    for stage in ("rl_pit_2", "rl_policy"):
        _, context = run(stage, rollout_size=4, num_iterations=1)
    e = context.encoder
    of_pit, of_policy = (sorted(unpadded(collected.seen[i].batch.prompts)) for i in (1, 4))
    assert of_pit == [e.pit_prompt(r.prompt, "y") for r in ROWS]
    assert of_policy == [e.policy_prompt(r.prompt) for r in ROWS]


def test_the_answers_to_one_prompt_stand_together_and_share_its_ref_response(run, collected):
    run("rl_pit_1", rollout_size=8, samples_per_prompt=4, num_iterations=1)
    prompts = unpadded(collected.seen[1].batch.prompts)
    assert prompts[:4] == [prompts[0]] * 4 and prompts[4:] == [prompts[4]] * 4 and prompts[0] != prompts[4]


def test_prompts_are_padded_to_the_longest_of_their_batch(run, collected, monkeypatch):
    asked = []
    monkeypatch.setattr(pit.batches, "longest_prompt_length", lambda prompts, window: asked.append(
        (max(map(len, prompts)), window)
    ) or asked[-1][0])  # fmt: skip
    _, context = run("rl_pit_1", num_iterations=1)
    longest = [len(context.encoder.pit_prompt("0?", y)) for y in ("0<", "0++")]  # of selection, and of the batch
    assert asked == [(n, context.encoder.pit_window) for n in longest]
    assert [call.batch.prompts.tokens.shape[1] for call in collected.seen[:2]] == longest


def test_seconds_of_an_iteration_by_what_they_are_spent_on(run, collected, monkeypatch):
    """A clock that stands still but for 2, 16 and 32 seconds; measuring the rows of selection is no part of a step."""
    collected.seconds.update(rollout=2, reward=16, update=32)
    monkeypatch.setattr(time, "perf_counter", lambda: collected.now)
    _, context = run("rl_policy", num_iterations=2)
    lines = (context.workdir.root / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, lines) if "seconds" in line]
    assert len(lines) == 2
    for line in lines:
        spent = {name: line[f"seconds/{name}"] for name in ("data", "rollout", "reward", "update")}
        assert spent == {"data": 0, "rollout": 2, "reward": 16, "update": 32}
    assert [line["seconds"] for line in lines] == [50, 50]


def test_candidates_are_measured_on_the_same_selection_rows(run, collected):
    """Three rows for a rollout of 8 come again and again, with y_l and y_w in alternation."""
    _, context = run("rl_pit_1", num_iterations=2)
    rows = [HELD[i] for i in (0, 1, 2, 0, 1, 2, 0, 1)]
    answers = [r.chosen if i % 2 else r.rejected for i, r in enumerate(rows)]
    expected = [context.encoder.pit_prompt(r.prompt, y) for r, y in zip(rows, answers, strict=True)]
    for call in collected.seen[0::2]:
        assert unpadded(call.batch.prompts) == expected


def test_a_difference_of_r_p_reads_both_answers_in_its_own_form(run, collected):
    """Row by row, R_P's x and ref_response are those of the PIT prompt that the policy continues."""
    _, context = run("rl_pit_1", loss="r_p_difference", num_iterations=1)
    e, batch = context.encoder, collected.seen[1].batch
    pairs = [(r.prompt, y) for r in ROWS for y in (r.rejected, r.chosen)]
    read_by_r_p = {tuple(e.policy_prompt(x) + e.response(y)): e.pit_prompt(x, y) for x, y in pairs}
    rows = [tuple(row[real > 0]) for row, real in zip(batch.references.tokens, batch.references.segments, strict=True)]
    assert sorted(rows) == sorted(read_by_r_p)
    assert [read_by_r_p[row] for row in rows] == unpadded(batch.prompts)
    policy_prompts = unpadded(batch.policy_prompts)
    assert [list(row[: len(prompt)]) for row, prompt in zip(rows, policy_prompts, strict=True)] == policy_prompts


def test_the_kl_of_the_second_round_starts_where_the_first_ended(tmp_path, monkeypatch):
    """Real models. Estimator k3 is never negative: 0 before the first round, above 0 at the start of the second.

    R_P says 3 and R_PIT says 4 to everything, so the score tells which of them was asked.
    """
    context = make_context(
        tmp_path, num_iterations=1, num_epochs=1, kl_estimator="k3",
        policy_optimizer=OptimizerConfig(learning_rate=0.05),
    )  # fmt: skip
    for stage, bias in (("sft_pit", None), ("r_p", 3.0), ("r_pit", 4.0)):
        params = common.init_params(common.model_of(context, stage), jax.random.key(0))
        if bias is not None:
            inner = params["params"]
            params = {"params": inner | {"head": inner["head"] * 0, "bias": inner["bias"] + bias}}
        context.workdir.save_model(stage, params)
    monkeypatch.setattr(pit, "choose_by_kl_bin", lambda measured, *_: (max(measured), []))  # the last one
    compiled, make_ppo = [], ppo.make_ppo
    once = lambda *args, **kwargs: (compiled or compiled.append(make_ppo(*args, **kwargs)) or compiled)[0]  # noqa: E731
    monkeypatch.setattr(pit.ppo, "make_ppo", once)  # both rounds are one program
    first, second = (
        pit.rl_stage(context, stage, context.config.ppo_pit, start, pit.References(context, "data", start))
        for stage, start in (("rl_pit_1", "sft_pit"), ("rl_pit_2", "rl_pit_1"))
    )
    kl = [record["candidates"][step]["kl"] for record in (first, second) for step in ("0", "1")]
    assert abs(kl[0]) < 1e-5, kl
    assert min(kl[1:]) > 0.01, kl
    assert {m["score"] for record in (first, second) for m in record["candidates"].values()} == {4.0}
