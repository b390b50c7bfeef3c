"""What is measured is what is said: works that are compared do the same, and shares of limits are by hand."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import run

from pit_jax import config as c, growth, programs, sharding, speed, stand_ins, works
from pit_jax.config import ModelConfig
from pit_jax.models.transformer import Transformer
from pit_jax.pipelines import common

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = ModelConfig(
    vocab_size=64, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, tie_embeddings=False
)


def called(work: works.Work, times: int = 2) -> list:
    """What the first calls give back."""
    call = work.start(speed.Compiler())
    return [call(i) for i in range(times)]


@pytest.mark.parametrize("kind", ["gap", "bradley_terry", "dpo"])
def test_groups_that_share_what_they_begin_with_learn_as_separate_rows(kind):
    """The loss of the second call is that of weights which the first one has changed."""
    made = {
        "gap": lambda shared: works.reward_work(SIZES, 2, 5, 7, gap=True, shared=shared),
        "bradley_terry": lambda shared: works.reward_work(SIZES, 2, 5, 7, gap=False, shared=shared),
        "dpo": lambda shared: works.dpo_work(SIZES, 2, 5, 7, shared=shared),
    }[kind]
    shared, separate = made(True), made(False)
    assert shared.tokens == separate.tokens and shared.phases[0].flops < separate.phases[0].flops
    for one, other in zip(called(shared), called(separate), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_pairs_of_mixed_lengths_learn_alike_in_every_layout(monkeypatch):
    """An epoch of one batch is the same step, whatever stands in a sequence."""
    monkeypatch.setattr(works, "MIXED_LENGTHS", (2, 9))
    layouts = ("packed", "like", "padded")
    sizes = dataclasses.replace(SIZES, num_layers=1)
    made = [works.mixed_reward_work(sizes, 6, 6, layout) for layout in layouts]
    losses = [[values["loss"] for values in called(work, 3)] for work in made]
    for other in losses[1:]:
        assert losses[0] == pytest.approx(other, rel=1e-5)
    assert len(set(losses[0])) == 3
    made = [works.mixed_reward_work(SIZES, 12, 3, layout) for layout in layouts]
    assert len({work.tokens for work in made}) == len({work.phases for work in made}) == 1


def test_answers_of_mixed_lengths_are_all_written():
    turns, batches = (called(works.mixed_work(SIZES, 12, 4, 3, 40, replace=replace), 1)[0] for replace in (True, False))
    for lengths in (turns, batches):
        assert lengths.shape == (12,) and lengths.min() >= 1 and lengths.max() <= 40
        assert len(np.unique(lengths)) > 4


def test_the_same_prompts_are_answered_in_other_batches():
    """12 prompts, most of them short; the padding does not change what is written, but the noise is that of places."""
    ours, padded = (works.prompts_work(SIZES, 12, 4, 256, 3, padded=padded) for padded in (False, True))
    assert ours.tokens == padded.tokens and ours.phases == padded.phases
    shapes = [[x.shape[1] for x in called(work, 1)[0]] for work in (ours, padded)]
    assert shapes[1] == [256 + 3] * 3 and shapes[0][0] == 128 + 3 and max(shapes[0]) == 256 + 3


def test_an_iteration_of_ppo_runs():
    first, second = called(works.ppo_work(SIZES, 4, 5, 6, 2))
    for values in (first, second):
        assert values["policy/first_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert first["length"] == 6


def test_steps_of_sft_are_those_of_adamw_on_all_tokens_but_the_first(monkeypatch):
    """Written out. The second batch is one token over and over: where nothing is cut, its gradient outweighs others."""
    sizes, some = dataclasses.replace(SIZES, num_layers=1), works.random_tokens
    monkeypatch.setattr(works, "random_tokens", lambda *of: np.full(of[2:], 7, np.int32) if of[1] == 1 else some(*of))
    found = called(works.sft_work(sizes, 4, 12), 3)
    assert found[0]["loss"] == pytest.approx(np.log(64), rel=0.2)
    assert found[1]["grad_norm"] > 2 * found[0]["grad_norm"] > 2
    module = Transformer(sizes)
    params = common.init_params(module, jax.random.key(0))
    matrices = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
    adamw = optax.adamw(1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01, mask=matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    @jax.jit
    def step(params, state, tokens):
        def loss(params):
            ones = jnp.ones_like(tokens)
            logits = module.apply(params, tokens, ones, jnp.cumsum(ones, 1) - 1, method=Transformer.full_logits)
            targets = tokens[:, 1:, None] == jnp.arange(64)
            return -jnp.sum(jnp.where(targets, jax.nn.log_softmax(logits[:, :-1]), 0.0)) / (4 * 11)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, (value, optax.tree.norm(gradients), optax.tree.norm(params))

    state = optimizer.init(params)
    for i, values in enumerate(found):
        params, state, expected = step(params, state, sharding.shard_batch(works.random_tokens(sizes, i, 4, 12)))
        # A few roundings of float32: the two sum in another order.
        np.testing.assert_allclose([values[k] for k in ("loss", "grad_norm", "param_norm")], expected, rtol=1e-6)


def test_what_training_costs_by_hand(monkeypatch):
    """Of rows of 5 tokens, or 3 of a prompt and 2 of each answer; a token sees itself and those before it.

    5 tokens see 15, the 3 of a prompt 6, 2 behind it 4 + 5 = 9, and 2 behind these 6 + 7 = 13. Learning is three times
    reading. The last layer makes keys, values and mixtures of them of all, and the rest of what is scored alone.
    """
    matrices = 2 * (16 * 4 * 2 * (4 + 2) + 3 * 16 * 24)  # of two layers q, o; k, v; gate, up, down

    def read(tokens, targets, seen, unread=0):
        """Two operations for each weight; two for scores and two for values of each of 4 x 4 entries of two layers."""
        rest = 16 * 4 * 4 + 3 * 16 * 24  # o; gate, up, down
        return 2 * (matrices * tokens - rest * unread + 64 * 16 * targets) + 2 * 4 * 4 * 4 * seen

    reward, dpo = (functools.partial(work, SIZES, 7, 3, 2) for work in (works.reward_work, works.dpo_work))
    monkeypatch.setattr(works, "MIXED_LENGTHS", (2, 3))
    for work, tokens, flops in (
        (works.sft_work(SIZES, 7, 5), 5, 3 * read(5, 4, 15)),
        (reward(gap=True), 4 * 7, 3 * read(3 + 2 * 2 + 4 * 2, 0, 6 + 2 * 9 + 4 * 13, 11)),
        (reward(gap=True, shared=False), 4 * 7, 3 * 4 * read(7, 0, 28, 6)),
        (reward(gap=False), 2 * 5, 3 * read(3 + 2 * 2, 0, 6 + 2 * 9, 5)),
        (reward(gap=False, shared=False), 2 * 5, 3 * 2 * read(5, 0, 15, 4)),
        (works.reward_work(SIZES, 7, 0, 5, gap=False), 2 * 5, 3 * 2 * read(5, 0, 15, 4)),
        (works.mixed_reward_work(SIZES, 7, 7, "padded"), 2 * 4, 3 * read(2 + 2 * 2, 0, 3 + 2 * 7, 4)),
        (dpo(), 2 * 5, 3 * read(3 + 2 * 2, 2 * 2, 6 + 2 * 9, 3)),
        (dpo(shared=False), 2 * 5, 3 * 2 * read(5, 2, 15, 3)),
    ):
        assert work.tokens == 7 * tokens and work.phases == (works.Phase(7 * flops),)
    ppo = works.ppo_work(SIZES, 7, 3, 2, epochs=4)
    policy, value, score = read(5, 2, 15, 3), read(5, 0, 15, 3), read(5, 0, 15, 4)
    # Log-probs of ref_policy, scores and values, and four times both learn.
    assert ppo.phases[-1] == works.Phase(7 * (policy + score + value + 4 * 3 * (policy + value)))
    assert ppo.tokens == 7 * 5 and ppo.phases[:-1] == works.sampling_phases(SIZES, 7, 3, 2)


def test_sampling_costs_by_hand():
    """Two rows, prompt 3, 3 new tokens: a prefill that scores one place, and two steps behind 3 and 4 tokens.

    The only layer is the last one: of the first two tokens of the prompt it makes keys and values alone.
    """
    sizes = dataclasses.replace(SIZES, num_layers=1)
    matrices = 16 * 4 * 2 * (4 + 2) + 3 * 16 * 24  # q, o; k, v; gate, up, down
    unembedding = 64 * 16
    attention = lambda keys: 4 * 4 * 4 * keys  # noqa: E731
    keys_and_values = 16 * 4 * 2 * 2
    prefill = 2 * (2 * matrices + 2 * 2 * keys_and_values + 2 * unembedding + attention(3))
    steps = [2 * (2 * matrices + 2 * unembedding + attention(keys)) for keys in (4, 5)]
    bytes_ = [4 * (matrices + unembedding + 2 * keys * 2 * 2 * 4) for keys in (4, 5)]
    found = works.sampling_phases(sizes, 2, 3, 3)
    assert [phase.flops for phase in found] == [prefill, *steps]
    assert [phase.bytes for phase in found] == [0, *bytes_]
    # Each phase takes the longer of the two.
    limits = speed.Limits(flops=steps[0] * 2.0, bandwidth=bytes_[1] / 3.0)
    assert speed.at_best(found[1:], limits) == pytest.approx(bytes_[0] / bytes_[1] * 3.0 + 3.0)
    assert speed.at_best(found[:1], limits) == pytest.approx(prefill / (2 * steps[0]))
    assert speed.at_best((*found, works.Phase(1.0, None)), limits) is None


def test_a_measurement():
    seen = []

    def start(compile):
        seen.append(compile)
        return seen.append

    work = works.Work(100, "tokens", (works.Phase(4.0), works.Phase(1.0, 6.0)), start)
    found = speed.measure("some", work, speed.Limits(2.0, 3.0), calls=3, warmup=2)
    assert seen[1:] == [0, 1, 2, 3, 4], "warm-up calls come first and do not count"
    assert len(found.runs) == 3 and found.seconds == sorted(found.runs)[1]
    assert found.flops == 5.0 and found.at_best == 4.0 and found.share == 4.0 / found.seconds
    assert found.rate == 100 / found.seconds and found.compile_seconds == 0.0


def test_the_command(tmp_path, cache):
    file = tmp_path / "bench.jsonl"
    result = run("-m", "pit_jax.bench", "--works=gen_tiny_b16", "--calls=1", f"--json={file}", cache=cache)
    assert result.returncode == 0, result.stderr
    assert "GFLOP/s in products" in result.stdout and "\ngen_tiny_b16 " in result.stdout
    row = json.loads(file.read_text())
    assert row["tokens"] == 16 * 128 and row["rate"] == pytest.approx(2048 / row["seconds"])
    wrong = run("-m", "pit_jax.bench", "--works=sft_smal", cache=cache)
    assert wrong.returncode == 2 and "no work 'sft_smal': use some of sft_small, " in wrong.stderr
    for flags, said in (
        (("--grow=lenght",), "--grow=lenght: use some of length, vocabulary, batch, layers"),
        (("--grow=",), "--grow=: use some of length"),
        (("--grow=length", "--works=sft_small"), "--works and --grow are different measurements"),
        (("--grow=length", "--list"), "--list is of the works, and not of --grow"),
        ((f"--json={tmp_path}/missing/bench.jsonl",), "No such file or directory"),
    ):
        wrong = run("-m", "pit_jax.bench", *flags, cache=cache)
        assert (wrong.returncode, wrong.stdout) == (2, "") and said in wrong.stderr


# -------------------------------------------------------------------------------------------------- programs of configs

DATA = c.DataConfig(prompt_window=20, response_window=6)
SHORT = c.SFTConfig(batch_size=2)
PPO = c.PPOConfig(rollout_size=4, num_epochs=1, num_minibatches=2)
SCORE = c.RewardModelConfig(batch_size=2)
PIT = c.PitConfig(
    data=DATA, policy_model=SIZES, pit_model=SIZES, reward_model=SIZES, sft_policy=SHORT,
    pretrain=c.PretrainConfig(sft=dataclasses.replace(SHORT, sequence_length=96)),
    sft_pit=dataclasses.replace(SHORT, unlikelihood=0.1), r_p=SCORE, r_pit=SCORE, ppo=PPO,
    ppo_pit=dataclasses.replace(PPO, samples_per_prompt=2),
)  # fmt: skip
SRT = c.SrtConfig(
    data=DATA, policy_model=SIZES, feedback_window=8, sft_policy=SHORT, srt=SHORT, dpo=c.DPOConfig(batch_size=2),
    self_feedback=c.FeedbackConfig(batch_size=4),
)  # fmt: skip
ADAPTED = dataclasses.replace(PIT, lora=c.LoraConfig(rank=2))


def made(config, *stages: str) -> list[programs.Program]:
    """The programs of some stages."""
    makers = programs.programs(config, jax.sharding.get_mesh())
    return [program for stage in stages for program in makers[stage]()]


@pytest.mark.parametrize(
    ("config", "stages", "runs"),
    [
        (PIT, ("pretrain", "sft_policy", "sft_pit", "r_p", "r_pit", "rl_policy", "rl_pit"), ("r_pit",)),
        (SRT, ("srt", "self_feedback", "dpo"), ("dpo",)),
        (ADAPTED, ("sft_policy", "rl_policy"), ("rl_policy",)),
        (dataclasses.replace(PIT, r_pit=c.RewardModelConfig(loss="r_p_difference")), ("rl_pit",), ()),
        (
            dataclasses.replace(PIT, r_pit=c.RewardModelConfig(batch_size=4, sequence_length=180)),
            ("r_pit",),
            ("r_pit",),
        ),
        (dataclasses.replace(PIT, r_pit=c.RewardModelConfig(batch_size=2, sequence_length=60)), ("r_pit",), ()),
    ],
    ids=["pit", "srt", "lora", "difference", "packed", "cut"],
)
def test_arguments_are_those_that_programs_were_made_for(config, stages, runs):
    """Shapes, types and layouts; and programs run, their states are fed back, and no number is lost."""
    for program in made(config, *stages):
        given = stand_ins.arguments(program, config)
        kind = lambda x: (x.shape, x.dtype, x.sharding.spec)  # noqa: E731
        assert jax.tree.map(kind, given) == jax.tree.map(kind, program.arguments), program.stage
    for program in made(config, *runs):
        found = called(stand_ins.work(program, config, float("inf")), 2)[-1]
        if program.gradients is not None:
            assert found[0].step == 2, (
                f"{program.stage}: the state of the first call is what the second one begins with"
            )
        numbers = jax.tree.leaves(jax.device_get(found))
        assert all(np.isfinite(x).all() for x in numbers if np.issubdtype(x.dtype, np.floating)), program.stage


def test_rows_are_full():
    """x of 52 tokens (20 and the form) and y of 6: 96 tokens hold a row and most of another."""
    batches = {p.stage: jax.device_get(stand_ins.arguments(p, PIT)[1]) for p in made(PIT, "pretrain", "sft_policy")}
    rows = batches["pretrain"].likely
    assert rows.segments.tolist() == [[1] * 58 + [2] * 38] * 2
    assert rows.positions.tolist() == [[*range(58), *range(38)]] * 2
    assert rows.tokens.min() >= stand_ins.FIRST_ID and rows.tokens.max() < 64
    rows = batches["sft_policy"].likely
    assert rows.segments.sum(1).tolist() == [58] * 2 and rows.loss_mask.sum(1).tolist() == [6] * 2
    (program,) = made(PIT, "r_pit")
    groups = jax.device_get(stand_ins.arguments(program, PIT)[1])
    # x, two candidates, and the last token of four answers of 6 behind them; of 7 padded slots none is more.
    assert (groups.members > 0).sum(1).max() <= 52 + 6 * 6 <= program.length < 52 + 6 * 6 + 8
    assert groups.positions[0, groups.last[0, 0]].tolist() == [52 + 2 * 6 - 1] * 4


def test_a_program_that_the_devices_cannot_hold_is_named():
    program = made(PIT, "sft_policy")[0]
    with pytest.raises(stand_ins.TooLargeError, match=r"sft_policy needs at least 0.00 GiB on each device, which has"):
        stand_ins.work(program, PIT, 1000.0).start(None)
    assert speed.available_bytes() > 2**20


def test_what_sampling_takes_is_that_of_works():
    (program,) = (p for p in made(SRT, "self_feedback") if p.stage == "self_feedback: critiques")
    R = program.while_trips
    found = stand_ins.phases(program, SIZES)
    assert found[1:] == works.sampling_phases(SIZES, 4, program.length - R, R)[1:]
    assert sum(phase.flops for phase in found) == pytest.approx(program.model_flops)


def test_the_command_with_a_config(cache, tmp_path):
    file, flags = tmp_path / "bench.jsonl", ("--config=configs/pit_synthetic.py:smoke", "--calls=1")
    result = run("-m", "pit_jax.bench", *flags, "--stages=sft_policy", f"--json={file}", cache=cache)
    assert result.returncode == 0, result.stderr
    row = json.loads(file.read_text())
    assert row["name"] == "sft_policy" and row["tokens"] == row["batch"] * row["length"] == 4 * 208
    assert row["config"] == "pit_synthetic:smoke"
    wrong = run("-m", "pit_jax.bench", *flags, "--stages=sft", cache=cache)
    assert wrong.returncode == 2 and "--stages names sft: use pretrain, sft_policy, " in wrong.stderr


# -------------------------------------------------------------------------------------------------------------- growth


def temporaries(V: int, T: int, chunk: int = 32, B: int = 2, D: int = 16) -> int:
    """Bytes of the log-probs alone, as the compiler says."""
    shapes = ((V, D), np.float32), ((B, T, D), np.float32), ((B, T), np.int32)
    arguments = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    return speed.peak_bytes(growth.log_probs_program(chunk).lower(*arguments).compile())[1]


def test_log_probs_hold_a_chunk_of_logits_whatever_the_length():
    """With gradients. What grows with the length is hidden states and their gradients, not the vocabulary."""
    short, long = temporaries(4096, 256), temporaries(4096, 2048)
    hidden = 4 * 2 * (2048 - 256) * 16
    assert 0 <= long - short <= 4 * hidden, "a logit for each of these tokens would be 64 times as much"
    assert temporaries(1024, 2048) - temporaries(1024, 256) <= 4 * hidden
    chunk = 4 * 2 * 32 * 4096
    assert chunk <= short <= 5 * chunk
    assert temporaries(4096, 2048, chunk=2048) > 10 * long, "all at once"


def test_what_grows():
    """As many tokens at every length; one thing grows at a time."""
    of = {name: growth.points(name) for name in growth.VALUES}
    assert {p.rows * p.length for p in of["length"] if p.program == "sft"} == {growth.TOKENS}
    for name, points in of.items():
        steps = [p for p in points if p.program == "sft"]
        assert [p.value for p in steps] == list(growth.VALUES[name])
    assert {(p.rows, p.length) for p in of["vocabulary"]} == {(growth.ROWS, growth.LENGTH)}
    small = growth.sft_work(dataclasses.replace(growth.SIZES, num_layers=1, d_model=16, mlp_dim=16), 2, 128, 64)
    losses = [float(values["loss"]) for values in called(small)]
    assert losses[0] == pytest.approx(np.log(2048), rel=0.1)
    assert float(called(growth.log_probs_work(growth.SIZES, 1, 128))[0][0]) < 0
