"""Elo and Bradley-Terry ratings."""

import csv
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pit_jax.evaluation import ratings

DATA = pathlib.Path(os.environ.get("PIT_JAX_DATA", pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"))
BATTLES = DATA / "elo"


def simulated(strengths, n, seed=0, tie_share=0.0):
    """n comparisons of players whose strengths are in nats."""
    rng = np.random.default_rng(seed)
    num_players = len(strengths)
    first = rng.integers(0, num_players, n)
    second = (first + rng.integers(1, num_players, n)) % num_players
    p = 1 / (1 + np.exp(np.asarray(strengths)[second] - np.asarray(strengths)[first]))
    outcome = np.where(rng.random(n) < p, 1, -1) * (rng.random(n) >= tie_share)
    return first, second, outcome


def column(rows, key):
    return np.array([row[key] for row in rows])


# all_pairs


def test_every_answer_meets_every_other_once_per_prompt():
    pairs = ratings.all_pairs([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]])
    assert {name: x.tolist() for name, x in pairs.items()} == {
        "first": [0, 0, 1, 0, 0, 1],
        "second": [1, 2, 2, 1, 2, 2],
        "outcome": [1, 1, -1, 0, -1, -1],
        "groups": [0, 0, 0, 1, 1, 1],
    }
    assert ratings.all_pairs(np.zeros((1000, 11)))["first"].size == 55_000  # section 4.7
    assert ratings.all_pairs([[0.0, 0.1]], tie_band=(0.45, 0.55))["outcome"].tolist() == [0]
    with pytest.raises(ValueError, match="at least two players"):
        ratings.all_pairs([[1.0], [2.0]])


# Elo


def test_three_battles_by_hand():
    # 0 beats 1, both at 1000: 2 points. 1 (998) and 2 (1000) tie: 1 expects 1 / (1 + 10^(2 / 400)) = 0.4971218 and
    # gains 4 * 0.0028782. 2 (999.98849) loses to 0 (1002): 0 expects 0.5028946 and gains 4 * 0.4971054.
    got = ratings.elo([0, 1, 2], [1, 2, 0], [1, 0, -1], 3)
    assert got == pytest.approx([1002 + 1.9884216, 998 + 0.0115127, 1000 - 0.0115127 - 1.9884216], abs=1e-6)


def test_recorded_battles_have_their_recorded_elo():
    if not BATTLES.exists():
        pytest.skip(f"no {BATTLES}: set PIT_JAX_DATA to the folder of test data")
    with open(BATTLES / "pandalm_human_battles.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = json.loads((BATTLES / "pandalm_expected_k4.json").read_text())["elo_k4"]
    names = list(expected)
    first, second = ([names.index(row[side]) for row in rows] for side in ("model_a", "model_b"))
    outcome = [{"model_a": 1, "model_b": -1, "tie": 0}[row["winner"]] for row in rows]
    assert len(rows) == 999
    assert dict(zip(names, ratings.elo(first, second, outcome, len(names)).tolist(), strict=True)) == expected
    # Both ratings put llama-7b first and cerebras last, in every order.
    for table in (
        ratings.elo_shuffled(first, second, outcome, len(names), names=names),
        ratings.bradley_terry(first, second, outcome, len(names), names=names),
    ):
        ranks = {row["name"]: (row["rank_low"], row["rank"], row["rank_high"]) for row in table}
        assert ranks["llama-7b"] == (1, 1, 1)
        assert ranks["cerebras-gpt-6.7B"] == (5, 5, 5)
        assert sum(row["n"] for row in table) == 2 * 999


COMPARISONS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from([1, 0, -1])).filter(lambda c: c[0] != c[1]),
    min_size=1,
    max_size=60,
)


@settings(deadline=None)
@given(COMPARISONS)
def test_sides_do_not_matter_and_points_are_only_moved(comparisons):
    first, second, outcome = np.array(comparisons).T
    got = ratings.elo(first, second, outcome, 5)
    assert got == pytest.approx(ratings.elo(second, first, -outcome, 5), abs=1e-9)
    assert got.sum() == pytest.approx(5000, abs=1e-8)
    for row, swapped in zip(
        ratings.bradley_terry(first, second, outcome, 5, prior=1, num_resamples=20),
        ratings.bradley_terry(second, first, -outcome, 5, prior=1, num_resamples=20),
        strict=True,
    ):
        for key in ("rating", "low", "high", "n"):  # ranks of equal ratings may differ by rounding
            assert row[key] == pytest.approx(swapped[key], abs=1e-6)


def test_the_orders_are_shuffles_of_all_comparisons():
    first, second, outcome = simulated([0.0, 0.5, 1.0], 400)
    rows = ratings.elo_shuffled(first, second, outcome, 3, num_shuffles=3, seed=5, names=["a", "b", "c"])
    rng = np.random.default_rng(5)
    orders = [rng.permutation(400) for _ in range(3)]
    each = np.array([ratings.elo(first[i], second[i], outcome[i], 3) for i in orders])
    assert column(rows, "rating") == pytest.approx(each.mean(0), abs=1e-9)
    assert column(rows, "low") == pytest.approx(np.quantile(each, 0.025, axis=0), abs=1e-9)
    assert column(rows, "high") == pytest.approx(np.quantile(each, 0.975, axis=0), abs=1e-9)
    assert [row["name"] for row in rows] == ["a", "b", "c"]


def test_order_moves_the_ranks_of_equals_only():
    first, second, outcome = simulated([0.0, 0.0, 2.0], 600)
    rows = ratings.elo_shuffled(first, second, outcome, 3)
    assert [(row["rank_low"], row["rank_high"]) for row in rows] == [(2, 3), (2, 3), (1, 1)]
    assert rows[2]["rank"] == 1
    assert all(row["low"] < row["rating"] < row["high"] for row in rows)
    assert rows == ratings.elo_shuffled(first, second, outcome, 3)
    assert rows != ratings.elo_shuffled(first, second, outcome, 3, seed=1)


def test_equal_ratings_share_the_better_rank():
    rows = ratings.elo_shuffled([0, 1, 2], [1, 2, 0], [0, 0, 0], 4, num_shuffles=5)
    assert {(row["rating"], row["rank"], row["rank_low"], row["rank_high"]) for row in rows} == {(1000.0, 1, 1, 1)}
    assert column(rows, "n").tolist() == [2, 2, 2, 0]


# Bradley-Terry


def test_two_players_by_hand():
    # 30 wins, 10 losses: odds of 3, 400 * log10(3) = 190.85 points apart. 20 ties more: 40 to 20, odds of 2.
    rows = ratings.bradley_terry([0] * 40, [1] * 40, [1] * 30 + [-1] * 10, 2)
    assert column(rows, "rating") == pytest.approx([1095.42425, 904.57575], abs=1e-5)
    rows = ratings.bradley_terry([0] * 60, [1] * 60, [1] * 30 + [-1] * 10 + [0] * 20, 2)
    assert rows[0]["rating"] - rows[1]["rating"] == pytest.approx(400 * np.log10(2), abs=1e-8)
    # Ties added by the prior count the same: 3 wins and no loss with one tie are 3.5 to 0.5.
    rows = ratings.bradley_terry([0] * 3, [1] * 3, [1] * 3, 2, prior=1)
    assert rows[0]["rating"] - rows[1]["rating"] == pytest.approx(400 * np.log10(7), abs=1e-8)


def test_recovers_the_strengths_of_simulated_players():
    truth = np.array([-1.0, -0.3, 0.0, 0.1, 1.2])
    rows = ratings.bradley_terry(*simulated(truth, 20_000), 5)
    expected = 1000 + 400 / np.log(10) * (truth - truth.mean())
    # About 8,000 comparisons per player: 2 / sqrt(8000) nats are a standard error near 3.9 points.
    assert column(rows, "rating") == pytest.approx(expected, abs=10)
    assert column(rows, "rating").mean() == pytest.approx(1000, abs=1e-8)
    assert column(rows, "high") - column(rows, "low") == pytest.approx([2 * 1.96 * 3.9] * 5, rel=0.25)
    assert column(rows, "rank").tolist() == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("tie_share", [0.0, 0.4])
def test_equals_logistic_regression_without_a_penalty(tie_share):
    linear_model = pytest.importorskip("sklearn.linear_model")
    first, second, outcome = simulated([0.0, 0.4, -0.8, 1.5, 0.2, 0.1], 800, seed=3, tie_share=tie_share)
    design = np.zeros((800, 6))
    design[np.arange(800), first], design[np.arange(800), second] = 1, -1
    # A tie is half a win and half a loss.
    rows, labels = np.concatenate([design, design]), np.repeat([1, 0], 800)
    weights = np.concatenate([(1 + outcome) / 2, (1 - outcome) / 2])
    model = linear_model.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, solver="newton-cholesky")
    model.fit(rows[weights > 0, 1:], labels[weights > 0], sample_weight=weights[weights > 0])
    strengths = np.concatenate([[0.0], model.coef_[0]])  # player 0 is the zero of the scale
    expected = 1000 + 400 / np.log(10) * (strengths - strengths.mean())
    got = column(ratings.bradley_terry(first, second, outcome, 6, num_resamples=1), "rating")
    assert got == pytest.approx(expected, abs=1e-4)


def test_order_and_side_change_nothing():
    first, second, outcome = simulated([0.0, 0.4, -0.8], 300)
    rows = ratings.bradley_terry(first, second, outcome, 3)
    order = np.random.default_rng(0).permutation(300)
    mixed = ratings.bradley_terry(first[order], second[order], outcome[order], 3, groups=order)
    for key in ("rating", "low", "high"):
        assert column(rows, key) == pytest.approx(column(mixed, key), abs=1e-6)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    truth, covered = np.array([0.0, 0.3, 0.8]), 0
    expected = 1000 + 400 / np.log(10) * (truth - truth.mean())
    for trial in range(200):
        rows = ratings.bradley_terry(*simulated(truth, 300, seed=trial), 3, num_resamples=200)
        covered += ((column(rows, "low") <= expected) & (expected <= column(rows, "high"))).mean()
    assert 0.91 <= covered / 200 <= 0.98  # 0.95 +- 0.01 standard error, 200 resamples make it a little narrow


def test_copies_of_a_prompts_comparisons_do_not_narrow_its_interval():
    first, second, outcome = simulated([0.0, 0.4, -0.8], 300)
    one = ratings.bradley_terry(first, second, outcome, 3)
    four = [np.repeat(x, 4) for x in (first, second, outcome)]
    grouped = ratings.bradley_terry(*four, 3, groups=np.repeat(np.arange(300), 4))
    assert column(grouped, "low") == pytest.approx(column(one, "low"), abs=1e-6)
    assert column(grouped, "high") == pytest.approx(column(one, "high"), abs=1e-6)
    alone = ratings.bradley_terry(*four, 3)
    width = lambda rows: column(rows, "high") - column(rows, "low")  # noqa: E731
    assert width(alone) == pytest.approx(width(one) / 2, rel=0.15)


def test_players_without_a_finite_rating_are_named():
    names = ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"^c never lost to the others \(a, b, d\).*prior=1"):
        ratings.bradley_terry([0, 1, 2, 2, 3, 0], [1, 0, 0, 1, 2, 3], [1, 1, 1, 1, -1, 0], 4, names=names)
    with pytest.raises(ValueError, match=r"^a, b never met the others \(c, d\)"):
        ratings.bradley_terry([0, 2], [1, 3], [0, 0], 4, names=names)
    # One that only lost is the same, seen from the others.
    with pytest.raises(ValueError, match=r"^a, b, c never lost to the others \(d\)"):
        ratings.bradley_terry([0, 1, 2, 0], [1, 2, 0, 3], [1, 1, 1, 1], 4, names=names)
    rows = ratings.bradley_terry([0, 2], [1, 3], [1, 0], 4, names=names, prior=0.5)
    assert np.isfinite([row[key] for row in rows for key in ("rating", "low", "high")]).all()
    assert column(rows, "rank").tolist() == [1, 4, 2, 2]


def test_few_comparisons_have_finite_intervals():
    # Each player won once: any resample with whole weights would often lack one of the wins.
    rows = ratings.bradley_terry([0, 1, 2], [1, 2, 0], [1, 1, 1], 3, num_resamples=2000)
    assert column(rows, "rating") == pytest.approx([1000] * 3, abs=1e-6)
    assert np.isfinite(column(rows, "low")).all()
    assert (column(rows, "high") - column(rows, "low") > 300).all()


@pytest.mark.parametrize("rate", [ratings.elo, ratings.elo_shuffled, ratings.bradley_terry])
@pytest.mark.parametrize(
    ("first", "second", "outcome", "num_players", "message"),
    [
        ([], [], [], 2, "at least one"),
        ([0, 1], [1], [1, 1], 2, "one entry per comparison"),
        ([0.0], [1.0], [1], 2, "whole number"),
        ([0], [2], [1], 2, "second holds 2 in comparison 0: players are 0 to 1"),
        ([-1], [1], [1], 2, "first holds -1"),
        ([0, 1], [1, 1], [1, 1], 2, "comparison 1 is of player 1 with itself"),
        ([0], [1], [0.5], 2, r"outcome of comparison 0 is 0.5"),
        ([0], [1], [np.nan], 2, r"outcome of comparison 0 is nan"),
        ([0], [1], [1], 1, "at least two"),
    ],
)
def test_refuses_what_is_no_comparison(rate, first, second, outcome, num_players, message):
    with pytest.raises(ValueError, match=message):
        rate(first, second, outcome, num_players)


@pytest.mark.parametrize(
    ("rate", "kwargs", "message"),
    [
        (ratings.elo_shuffled, {"num_shuffles": 0}, "num_shuffles=0"),
        (ratings.elo_shuffled, {"level": 1.0}, "level=1.0"),
        (ratings.elo_shuffled, {"names": ["a"]}, "1 names for 2 players"),
        (ratings.bradley_terry, {"num_resamples": 0}, "num_resamples=0"),
        (ratings.bradley_terry, {"groups": [1]}, "one group for each"),
        (ratings.bradley_terry, {"prior": -1}, "prior=-1"),
    ],
)
def test_refuses_settings(rate, kwargs, message):
    with pytest.raises(ValueError, match=message):
        rate([0, 0], [1, 1], [1, -1], 2, **kwargs)
