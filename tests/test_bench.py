"""What is measured is what is said: works that are compared do the same, and shares of limits are by hand."""

import dataclasses
import json

import numpy as np
import pytest
from commands import run

from pit_jax import speed, works
from pit_jax.config import ModelConfig

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


def test_an_iteration_of_ppo_and_a_step_of_sft_run():
    first, second = called(works.ppo_work(SIZES, 4, 5, 6, 2))
    for values in (first, second):
        assert values["policy/first_ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert first["length"] == 6
    losses = [values["loss"] for values in called(works.sft_work(SIZES, 4, 12), 3)]
    assert losses[0] == pytest.approx(np.log(64), rel=0.2)


def test_sampling_costs_by_hand():
    """Two rows, prompt 3, 3 new tokens: a prefill that scores one place, and two steps behind 3 and 4 tokens."""
    sizes = dataclasses.replace(SIZES, num_layers=1)
    matrices = 16 * 4 * 2 * (4 + 2) + 3 * 16 * 24  # q, o; k, v; gate, up, down
    unembedding = 64 * 16
    attention = lambda keys: 4 * 4 * 4 * keys  # noqa: E731
    prefill = 2 * (2 * 3 * matrices + 2 * unembedding + attention(1 + 2 + 3))
    steps = [2 * (2 * matrices + 2 * unembedding + attention(keys)) for keys in (4, 5)]
    bytes_ = [4 * (matrices + unembedding + 2 * keys * 2 * 2 * 4) for keys in (4, 5)]
    found = works.sampling_phases(sizes, 2, 3, 3)
    assert [phase.flops for phase in found] == [prefill, *steps]
    assert [phase.bytes for phase in found] == [0, *bytes_]
    # Each phase takes the longer of the two.
    limits = speed.Limits(flops=steps[0] * 2.0, bandwidth=bytes_[1] / 3.0)
    assert speed.at_best(found[1:], limits) == pytest.approx(bytes_[0] / bytes_[1] * 3.0 + 3.0)
    assert speed.at_best(found[:1], limits) == pytest.approx(prefill / (2 * steps[0]))


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
