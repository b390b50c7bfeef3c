"""How answers are improved: which row goes on, what is kept, what is counted; with methods whose answers are known."""

import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pit_jax.config import ModelConfig, SamplingConfig
from pit_jax.data import batches
from pit_jax.models.transformer import Transformer
from pit_jax.pipelines import common, improve, samples
from pit_jax.pipelines.improve import Row, Step, StopRules

KEY = jax.random.key(0)


def counting(calls):
    """A method that adds one to the last id; it takes 10 tokens read and 2 written for each answer."""

    def method(prompts, answers, key, draws):
        calls.append([(x, tuple(map(int, draw))) for x, draw in zip(prompts, draws, strict=True)])
        return [Step((y[-1] + 1,), 10, 2) for y in answers]

    return method


def first(prompts, answers, key, draws):
    assert all(y == () for y in answers) and all(draw[1] == 0 for draw in draws)
    return [Step((100 + int(draw[0]),), 5, 1) for draw in draws]


def gains_of(values):
    """gap = gain - 1, by the answer's last id."""
    return lambda xs, ys, refs: [(values[y[-1]] - 1.0, values[y[-1]], 7) for y in ys]


def run(rows, rules, gains=None, size=2):
    calls = []
    done = list(improve.run(rows, counting(calls), first, gains, rules, KEY, size))
    return {d.row.number: d for d in done}, calls


def ids(done):
    return [step.ids[0] for step in done.steps]


def test_a_fixed_number_of_iterations():
    rows = [Row(1, "a", (0,)), Row(2, "b", (50,)), Row(3, "c")]
    done, calls = run(rows, StopRules(iterations=2))
    assert ids(done[1]) == [0, 1, 2] and ids(done[2]) == [50, 51, 52] and ids(done[3]) == [103, 104, 105]
    assert {d.stop for d in done.values()} == {"iterations"} and {d.kept for d in done.values()} == {2}
    assert done[1].steps[0] == Step((0,)), "a given answer took nothing"
    assert [step.tokens for step in done[3].steps] == [6, 12, 12]
    assert calls[0] == [("a", (1, 1)), ("b", (2, 1))], "row number and iteration name the noise"
    assert calls[-1] == [("c", (3, 2))]


def test_a_row_that_stops_frees_its_place():
    """Row 1 stops at once by its gain; row 3 takes its place beside row 2, which goes on."""
    rows = [Row(1, "a", (0,)), Row(2, "b", (10,)), Row(3, "c", (20,))]
    values = {1: -1.0, 11: 1.0, 12: 1.0, 21: 1.0, 22: 1.0}
    done, calls = run(rows, StopRules(min_gain=0.0, iterations=2), gains_of(values))
    assert [[x for x, _ in call] for call in calls] == [["a", "b"], ["b", "c"], ["c"]]
    assert (done[1].stop, done[1].kept) == ("gap", 0), "the answer before is the result"
    assert (done[2].stop, done[2].kept) == ("iterations", 2)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_do_not_depend_on_the_batch(size):
    rows = [Row(i, str(i), (10 * i,)) for i in range(6)]
    values = {n: 1.0 if n % 10 < 1 + n // 10 % 3 else -1.0 for n in range(100)}
    rules = StopRules(min_gain=0.0, iterations=4)
    done, _ = run(rows, rules, gains_of(values), size)
    assert done == {i: run([row], rules, gains_of(values), 1)[0][i] for i, row in enumerate(rows)}


def test_identical_answers_stop():
    same = lambda xs, ys, key, draws: [Step(tuple(y), 1, 1) for y in ys]  # noqa: E731
    (done,) = improve.run([Row(0, "a", (5,))], same, first, None, StopRules(identical=True, iterations=9), KEY, 4)
    assert (done.stop, done.kept, len(done.steps)) == ("identical", 1, 2)


def test_budgets():
    done, _ = run([Row(0, "a", (0,))], StopRules(max_tokens=24, iterations=9))
    assert (done[0].stop, len(done[0].steps)) == ("tokens", 3), "12 and 12 tokens"
    done, _ = run([Row(0, "a", (0,))], StopRules(max_tokens=25, iterations=9))
    assert len(done[0].steps) == 4
    values = gains_of(dict.fromkeys(range(9), 1.0))
    done, _ = run([Row(0, "a", (0,))], StopRules(max_tokens=24, iterations=9), values)
    assert [step.tokens for step in done[0].steps] == [0, 12, 12] and done[0].steps[1].gap == 0.0
    done, _ = run([Row(0, "a", (0,))], StopRules(max_tokens=24, min_gain=0.0, iterations=9), values)
    assert [step.tokens for step in done[0].steps] == [0, 19, 19], "what R_PIT reads counts where it decides"


def test_no_row_begins_after_the_time(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr(improve.time, "perf_counter", lambda: next(clock))
    rows = [Row(0, "a", (0,)), Row(1, "b", (5,)), Row(2, "c")]
    done, _ = run(rows, StopRules(max_seconds=5.0, iterations=9), size=1)
    assert (done[0].stop, ids(done[0])) == ("seconds", [0, 1, 2]), "the iteration under way is finished"
    assert (done[1].stop, ids(done[1]), done[1].kept) == ("seconds", [5], 0)
    assert (done[2].stop, done[2].steps) == ("seconds", ())


def test_the_best_is_kept():
    """Sums of gains: 0, 1, 3, 2 and 2.5: the third answer."""
    done, _ = run([Row(0, "a", (0,))], StopRules(keep="best", iterations=4), gains_of({1: 1, 2: 2, 3: -1, 4: 0.5}))
    assert (done[0].kept, done[0].stop) == (2, "iterations")
    done, _ = run([Row(0, "a", (0,))], StopRules(keep="best", iterations=2), gains_of({1: -1, 2: 0.5}))
    assert done[0].kept == 0, "none is better than the one that came"
    done, _ = run([Row(0, "a", (0,))], StopRules(keep="best", iterations=2), gains_of({1: 0.5, 2: 0.5}))
    assert done[0].kept == 2, "by gains, though each gap is below 0"


def test_a_gain_at_the_threshold_stops():
    """A copy has the gain 0, which is not above 0."""
    done, _ = run([Row(0, "a", (0,))], StopRules(min_gain=0.0, iterations=3), gains_of({1: 0.0}))
    assert (done[0].stop, done[0].kept) == ("gap", 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "at least 1"),
        ({"keep": "first"}, "use last or best"),
        ({"max_tokens": -1}, "not below 0"),
    ],
)
def test_rules_refuse(fields, message):
    with pytest.raises(ValueError, match=message):
        StopRules(**fields)


def test_gains_are_asked_for_where_a_rule_needs_them():
    with pytest.raises(ValueError, match="need R_PIT"):
        run([Row(0, "a", (0,))], StopRules(min_gain=0.0))


@settings(max_examples=60, deadline=None)
@given(
    gains=st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=5),
    min_gain=st.none() | st.integers(-3, 3),
    identical=st.booleans(),
    max_tokens=st.sampled_from([0, 15, 19, 40]),
    keep=st.sampled_from(["last", "best"]),
)
def test_stopping_afterwards_is_stopping_on_the_way(gains, min_gain, identical, max_tokens, keep):
    """`stopped` on rows that went on to K gives what `run` does with the same rules."""
    values = {10 * i + k: float(row[k - 1]) for i, row in enumerate(gains) for k in range(1, 5)}
    rows = [Row(i, str(i), (10 * i,)) for i in range(len(gains))]
    rules = StopRules(identical, min_gain, max_tokens, 0.0, 4, keep)
    on_the_way, _ = run(rows, rules, gains_of(values))
    never = StopRules(iterations=4, min_gain=-9.0 if rules.needs_gains else None)  # so that R_PIT's tokens count too
    to_the_end, _ = run(rows, never, gains_of(values))
    for i in range(len(gains)):
        kept, written = improve.stopped(to_the_end[i].steps, rules)
        assert (kept, written) == (on_the_way[i].kept, len(on_the_way[i].steps) - 1)


def chains(*gains):
    return [[Step((0,)), *(Step((k,), gain=g) for k, g in enumerate(row, 1))] for row in gains]


def test_the_threshold_by_hand():
    """Answers that score better have gains above 1, those that score worse below -1; 40 rows leave little error."""
    better, worse = ([2.0, 2.0], [0.0, 1.0, 2.0]), ([-2.0, -2.0], [0.0, -1.0, -2.0])
    rows = [better, worse] * 20
    scores = np.asarray([s for _, s in rows])
    threshold = improve.calibrate(chains(*[g for g, _ in rows]), scores)
    assert threshold == 0.0, "a gain of -2 stops, one of 2 goes on"
    assert improve.calibrate(chains(*[g for g, _ in rows]), -scores) == 2.0, "gains that mislead: always stop"
    assert improve.calibrate(chains([3.0, 1.0]), np.zeros((1, 3))) == 3.0, "of equals the one that stops earliest"
    with pytest.raises(ValueError, match="no rows"):
        improve.calibrate([], np.zeros((0, 3)))


def test_a_difference_within_the_error_stops_earlier():
    """Going on from y_1 gains 0.1 on average over 4 rows, 0.4 in one of them: the standard error is 0.1 as well."""
    rows = chains(*[[2.0, 1.0]] * 4)
    scores = np.asarray([[0.0, 1.0, 1.4]] + [[0.0, 1.0, 1.0]] * 3)
    assert improve.calibrate(rows, scores) == 1.0
    scores = np.asarray([[0.0, 1.0, 1.1]] * 4)
    assert improve.calibrate(rows, scores) == 0.0, "the same mean without error: no stop"


@pytest.mark.usefixtures("one_device")
def test_prompts_of_like_length_are_read_together(monkeypatch):
    """Every answer is that to its prompt padded to the whole window, in the order of the prompts."""
    sizes = ModelConfig(vocab_size=16, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
    model, rng = Transformer(sizes), np.random.default_rng(0)
    context = types.SimpleNamespace(encoder=types.SimpleNamespace(tokenizer=types.SimpleNamespace(eos_id=2)))
    monkeypatch.setattr(common, "model_of", lambda *_: model)
    params = jax.tree.map(lambda x: 3 * x, common.init_params(model, jax.random.key(0)))
    prompts = [rng.integers(3, 16, n).tolist() for n in (250, 3, 130, 7, 20)]
    draws = np.asarray([(i, 1) for i in range(5)], np.uint32)
    shapes, prompt_rows = [], batches.prompt_rows
    monkeypatch.setattr(batches, "prompt_rows", lambda some, n: shapes.append((len(some), n)) or prompt_rows(some, n))

    def ask():
        sampler = samples.Sampler(context, "any", 256, SamplingConfig(max_new_tokens=6), 2, params)
        return sampler(prompts, KEY, draws), shapes[-3:]

    found, read = ask()
    assert read == [(2, 128), (2, 256), (2, 256)]
    monkeypatch.setattr(batches, "prompt_lengths", lambda lengths, window: np.full_like(lengths, window))
    expected, read = ask()
    assert read == [(2, 256)] * 3
    assert found == expected and [step.read for step in found] == [250, 3, 130, 7, 20]
    assert len({step.ids for step in found}) == 5


def test_noise_of_rows():
    """A key per draw: equal draws have equal keys, whatever stands beside them."""
    keys = samples.row_keys(KEY, np.asarray([(1, 2), (2, 1), (1, 2)], np.uint32))
    data = jax.random.key_data(keys)
    assert (data[0] == data[2]).all() and (data[0] != data[1]).any()
    expected = jax.random.fold_in(jax.random.fold_in(KEY, 2), 1)
    assert (jax.random.key_data(expected) == data[1]).all()
