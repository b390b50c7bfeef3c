import csv
import json
import math

import numpy as np
import pytest

from pit_jax import files
from pit_jax.evaluation import agreement, tables, win_rate
from pit_jax.types import GAP_PAIRINGS

# compare


def test_plain_comparison_ties_on_equal_scores_only():
    assert win_rate.compare([1.0, 0.5, 0.0], [0.0, 0.5, 1e-9]).tolist() == [1, 0, -1]


def test_reward_model_tie_band_of_section_4_4():
    # sigma(d) = 0.55 at d = log(0.55 / 0.45) = 0.20067.
    edge = math.log(0.55 / 0.45)
    differences = np.array([edge + 1e-6, edge - 1e-6, 0.0, -edge + 1e-6, -edge - 1e-6])
    assert win_rate.compare(differences, np.zeros(5), tie_band=(0.45, 0.55)).tolist() == [1, 0, 0, 0, -1]
    assert win_rate.compare(differences, np.zeros(5)).tolist() == [1, 1, 0, -1, -1]


def test_the_band_looks_at_the_difference_and_does_not_overflow():
    a = np.array([1000.1, 5000.0, -5000.0])
    assert win_rate.compare(a, np.array([1000.0, -5000.0, 5000.0]), tie_band=(0.45, 0.55)).tolist() == [0, 1, -1]


@pytest.mark.parametrize("band", [None, (0.45, 0.55)])
def test_swapping_the_sides_negates_outcomes_and_delta(band):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500)).round(1)
    forward, backward = win_rate.compare(a, b, tie_band=band), win_rate.compare(b, a, tie_band=band)
    assert (forward == -backward).all()
    first, second = win_rate.summarize(forward), win_rate.summarize(backward)
    assert 0 < first["tie"] < 1
    assert first["delta"] == -second["delta"]
    assert (first["win"], first["lose"], first["tie"]) == (second["lose"], second["win"], second["tie"])


@pytest.mark.parametrize(
    ("a", "b", "band", "message"),
    [
        ([1.0], [1.0, 2.0], None, "one score per prompt"),
        ([[1.0]], [[1.0]], None, "one score per prompt"),
        ([math.nan, 1.0], [0.0, 0.0], None, r"NaN for prompts \[0\]"),
        ([1.0], [0.0], (0.6, 0.7), "does not hold 0.5"),
    ],
)
def test_compare_refuses(a, b, band, message):
    with pytest.raises(ValueError, match=message):
        win_rate.compare(a, b, tie_band=band)


# summarize


def test_shares_by_hand():
    summary = win_rate.summarize([1, 1, 1, -1, 0, 0, 0, 0])
    assert {k: summary[k] for k in ("win", "lose", "tie", "delta", "n")} == {
        "win": 3 / 8, "lose": 1 / 8, "tie": 1 / 2, "delta": 1 / 4, "n": 8,
    }  # fmt: skip


def test_interval_matches_the_normal_one_for_many_prompts():
    # Var(delta) = (win + lose - delta^2) / n: 0.7 - 0.09 = 0.61 over 1,000 prompts; 1.96 standard errors are 0.0484.
    outcomes = np.repeat([1, -1, 0], [500, 200, 300])
    summary = win_rate.summarize(outcomes)
    half = 1.959964 * math.sqrt(0.61 / 1000)
    assert summary["low"] == pytest.approx(0.3 - half, abs=0.004)
    assert summary["high"] == pytest.approx(0.3 + half, abs=0.004)
    narrow = win_rate.summarize(outcomes, level=0.5)
    assert narrow["high"] - narrow["low"] == pytest.approx(2 * 0.674490 * math.sqrt(0.61 / 1000), abs=0.004)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, covered = 0.5 - 0.3, 0
    for trial in range(300):
        outcomes = rng.choice([1, -1, 0], size=128, p=[0.5, 0.3, 0.2])
        summary = win_rate.summarize(outcomes, seed=trial, num_resamples=1000)
        covered += summary["low"] <= truth <= summary["high"]
    assert 0.91 <= covered / 300 <= 0.985  # 0.95 +- 0.013 standard error, and the bootstrap of 128 is a little narrow


def test_the_seed_decides_the_interval_and_unanimity_has_none():
    outcomes = np.repeat([1, -1, 0], [50, 20, 30])
    assert win_rate.summarize(outcomes, seed=3) == win_rate.summarize(outcomes[::-1], seed=3)
    assert win_rate.summarize(outcomes, seed=3, num_resamples=99) != win_rate.summarize(
        outcomes, seed=4, num_resamples=99
    )
    summary = win_rate.summarize([1, 1, 1])
    assert (summary["low"], summary["high"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("outcomes", "kwargs", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1]], {}, "one axis"),
        ([1, 2], {}, r"outcomes hold \[2\]"),
        ([0.5, 1], {}, r"outcomes hold \[0.5\]"),
        ([1], {"level": 1.0}, "level"),
        ([1], {"num_resamples": 0}, "num_resamples"),
    ],
)
def test_summarize_refuses(outcomes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        win_rate.summarize(outcomes, **kwargs)


# agreement


def test_accuracy_counts_a_tie_as_an_error():
    result = agreement.accuracy([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 1.0, 4.0])
    assert result["accuracy"] == 0.5
    assert result["n"] == 4


def test_wilson_interval_against_the_textbook():
    # 81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3); 0 of 20: 0 to 0.1611.
    result = agreement.accuracy(np.arange(263) < 81, np.zeros(263))
    assert (round(result["low"], 4), round(result["high"], 4)) == (0.2553, 0.3662)
    none = agreement.accuracy(np.zeros(20), np.zeros(20))
    assert none["low"] == 0.0
    assert round(none["high"], 4) == 0.1611


def test_pair_accuracy_leaves_true_ties_out_and_counts_predicted_ones_as_errors():
    result = agreement.pair_accuracy_excluding_ties([1.0, -2.0, 0.0, 3.0, -1.0], [0.5, -0.5, 0.5, 0.0, 0.25])
    assert (result["accuracy"], result["n"]) == (0.5, 4)
    flipped = agreement.pair_accuracy_excluding_ties([-1.0, 2.0, -0.0, -3.0, 1.0], [-0.5, 0.5, -0.5, 0.0, -0.25])
    assert flipped == result


def test_more_pairs_of_the_same_prompts_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    predicted, true = rng.normal(size=100), np.where(rng.random(100) < 0.1, 0.0, 1.0)
    prompts = np.arange(100)
    one = agreement.pair_accuracy_excluding_ties(predicted, true, groups=prompts)
    twice = agreement.pair_accuracy_excluding_ties(np.tile(predicted, 2), np.tile(true, 2), groups=np.tile(prompts, 2))
    assert twice["n"] == 2 * one["n"]
    assert (twice["accuracy"], twice["low"], twice["high"]) == (one["accuracy"], one["low"], one["high"])
    assert one == agreement.pair_accuracy_excluding_ties(predicted, true), "one pair per prompt"
    assert agreement.pair_accuracy_excluding_ties(np.tile(predicted, 2), np.tile(true, 2))["low"] > one["low"]


def test_pair_accuracy_of_no_pairs_is_none_and_json():
    result = agreement.pair_accuracy_excluding_ties([], [])
    assert result == {"accuracy": None, "low": None, "high": None, "n": 0}
    assert agreement.pair_accuracy_excluding_ties([1.0, 2.0], [0.0, 0.0]) == result


def test_gap_diagnostics_by_hand():
    # By row: wl + lw - ww - ll = 0, 4, 2 and wl - lw = 6, 6, 10.
    wl, ww, ll, lw = [2.0, 4.0, 6.0], [-1.0, 0.0, -1.0], [-1.0, -2.0, 1.0], [-4.0, -2.0, -4.0]
    result = agreement.gap_diagnostics(wl, ww, ll, lw)
    assert result["gaps"] == pytest.approx(
        {"chosen_rejected": 4.0, "chosen_chosen": -2 / 3, "rejected_rejected": -2 / 3, "rejected_chosen": -10 / 3}
    )
    assert result["order_holds"] is True
    assert result["diagonal_offset"] == pytest.approx(-2 / 3)
    # std of (6, 6, 10) = sqrt(32 / 9).
    assert result["antisymmetry_error"] == pytest.approx(2.0 / math.sqrt(32 / 9))
    assert result["quantiles"]["chosen_rejected"][result["quantile_levels"].index(0.5)] == 4.0
    assert list(result["gaps"]) == list(result["quantiles"])
    json.dumps(result, allow_nan=False)


def test_names_follow_the_order_of_the_pairings():
    words = {"w": "chosen", "l": "rejected"}
    assert tuple(f"{words[first]}_{words[second]}" for first, second in GAP_PAIRINGS) == agreement.PAIRING_NAMES


@pytest.mark.parametrize(
    ("gaps", "holds"),
    [
        ((3, 1, 1, 0), True),
        ((1, 1, 0, -1), False),
        ((3, 0, 1, 0), False),
        ((3, 4, 1, 0), False),
        ((3, 1, -1, 0), False),
    ],
)
def test_order_of_equation_1(gaps, holds):
    assert agreement.gap_diagnostics(*[[float(g)] * 2 for g in gaps])["order_holds"] is holds


def test_a_difference_of_scores_is_antisymmetric_and_ignores_a_shift_per_prompt():
    rng = np.random.default_rng(0)
    w, l, shift = rng.normal(size=(3, 50))
    gaps = [w - l + shift, shift, shift, l - w + shift]
    assert agreement.gap_diagnostics(*gaps)["antisymmetry_error"] == pytest.approx(0.0, abs=1e-12)
    gaps[0] = gaps[0] + 0.5
    error = agreement.gap_diagnostics(*gaps)["antisymmetry_error"]
    assert error == pytest.approx(0.5 / np.std(2 * (w - l)))


def test_a_spread_of_zero_gives_none():
    assert agreement.gap_diagnostics([1.0], [0.0], [0.0], [-1.0])["antisymmetry_error"] is None
    assert agreement.shortcut_probe([1.0], [1.0], [0.0], [0.0])["change"] is None


def test_shortcut_probe_by_hand_and_of_a_model_that_ignores_the_reference():
    # Gaps 1, 1, -1, -1: std 1; changes 0, 3, 0, 1: mean 1. Row 2 falls from 1 > -1 to -2 < 0.
    result = agreement.shortcut_probe([1.0, 1.0], [-1.0, -1.0], [1.0, -2.0], [-1.0, 0.0])
    assert result == {"change": 1.0, "accuracy": 1.0, "shuffled_accuracy": 0.5, "accuracy_change": -0.5}
    same = agreement.shortcut_probe([1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0])
    assert (same["change"], same["accuracy_change"]) == (0.0, 0.0)


def test_agreement_refuses():
    with pytest.raises(ValueError, match="at least one"):
        agreement.accuracy([], [])
    with pytest.raises(ValueError, match="the shapes are"):
        agreement.accuracy([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"ww is NaN in rows \[1\]"):
        agreement.gap_diagnostics([1.0, 1.0], [0.0, math.nan], [0.0, 0.0], [0.0, 0.0])


# tables

SUMMARY = {"win": 0.5547, "lose": 0.2734, "tie": 0.1719, "delta": 0.2813, "low": 0.1406, "high": 0.4219, "n": 128}
RESULTS = {
    "name": "pit_synthetic",
    "seed": 7,
    "comparisons": {
        "pit_vs_original": {"verifier": SUMMARY, "evaluator": SUMMARY | {"delta": -0.037}},
        "original_vs_chosen": {"verifier": SUMMARY | {"win": 0.2891}},
    },
    "answers": {"original": {"tokens": 31.04, "copy_rate": None}, "pit": {"tokens": 30.0, "copy_rate": 0.125}},
    "reward_models": {
        "r_pit": {"accuracy": 0.9609, "low": 0.91, "high": 0.98, "n": 128}
        | agreement.gap_diagnostics([2.0, 3.0], [-1.0, -1.0], [-1.0, -1.0], [-4.0, -4.0])
        | {"shortcut_probe": {"change": 0.4, "accuracy": 0.96, "shuffled_accuracy": 0.9, "accuracy_change": -0.06}}
        | {"policy_accuracy": None, "policy_low": None, "policy_high": None, "policy_n": 0},
        "r_p": {"accuracy": 0.875, "low": 0.81, "high": 0.92, "n": 128},
    },
    "stages": {"data": {"steps": 0}, "sft_policy": {"steps": 300, "seconds": 41.26, "rows": 12}},
    "missing": {
        "second_rl_only_vs_original": "python -m pit_jax.train --config.arms=second_rl_only",
        "second_rl_only_vs_pit": "python -m pit_jax.train --config.arms=second_rl_only",
    },
}


def test_render_shows_every_number_in_aligned_columns():
    text = tables.render(RESULTS)
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("pit vs. original") and "verifier" in line)
    assert row.split() == "pit vs. original verifier 55.47 27.34 17.19 +28.13 [+14.06, +42.19] 128 30.0 12.50".split()
    table = [line for line in lines if " vs. " in line and ("verifier" in line or "evaluator" in line)]
    assert len(table) == 3
    for column in ("verifier", "evaluator"):
        assert len({line.index(column) for line in table if column in line}) == 1
    assert len({len(line) for line in table}) == 1  # the last column is flush right
    assert "-3.70" in text
    assert [line.split() for line in lines if line.startswith("r_p ")] == [
        ["r_p", "labelled,", "of", "test", "prompts", "87.50", "[81.00,", "92.00]", "128"]
    ]
    assert "they hold the order of Equation 1" in text
    assert "96.00 -> 90.00" in text
    assert ["sft_policy", "300", "41.3"] in [line.split() for line in lines]
    assert ["original", "31.0", "-"] in [line.split() for line in lines]


def test_a_missing_arm_is_named_once_with_its_command():
    last = tables.render(RESULTS).split("\n\n")[-1]
    assert last == (
        "Not in the table: second rl only vs. original, second rl only vs. pit. This arm was not trained; "
        "train it with: python -m pit_jax.train --config.arms=second_rl_only"
    )
    assert "not trained" not in tables.render({k: v for k, v in RESULTS.items() if k != "missing"})


def test_render_warns_where_equation_1_does_not_hold_and_takes_little():
    wrong = {"reward_models": {"r_pit": agreement.gap_diagnostics([0.0], [1.0], [0.0], [-1.0])}}
    assert "do NOT hold" in tables.render(wrong)
    assert tables.render({}) == ""


def test_csv_holds_the_full_numbers(tmp_path):
    paths = tables.write_csv(RESULTS, tmp_path / "tables")
    assert [path.name for path in paths] == ["comparisons.csv", "answers.csv", "reward_models.csv", "stages.csv"]
    with open(paths[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["comparison"], r["judge"]) for r in rows] == [
        ("pit_vs_original", "verifier"), ("pit_vs_original", "evaluator"), ("original_vs_chosen", "verifier"),
    ]  # fmt: skip
    assert {key: float(x) for key, x in rows[0].items() if key in SUMMARY} == SUMMARY
    with open(paths[2], newline="") as file:
        values = {(r["model"], r["name"]): r["value"] for r in csv.DictReader(file)}
    assert float(values["r_pit", "gaps.chosen_rejected"]) == 2.5
    assert values["r_pit", "policy_accuracy"] == ""


# results.json


def test_json_is_sorted_plain_and_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "results.json"
    files.write_json_atomic(path, {"b": np.float32(0.5), "a": np.array([1, 2]), "c": tmp_path})
    assert list(files.read_json(path)) == ["a", "b", "c"]
    assert files.read_json(path)["a"] == [1, 2]
    before = path.read_bytes()
    for wrong in ({"a": math.nan}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            files.write_json_atomic(path, wrong)
    assert path.read_bytes() == before
    files.write_json_atomic(path, RESULTS)
    assert files.read_json(path) == RESULTS
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_reader_of_the_earlier_file_sees_all_of_it(tmp_path):
    path = tmp_path / "results.json"
    files.write_json_atomic(path, {"a": 1})
    with open(path) as file:
        files.write_json_atomic(path, {"a": 2})
        assert json.load(file) == {"a": 1}
    assert files.read_json(path) == {"a": 2}


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json_atomic(path, {"a": 1})

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_json_atomic(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_read_json_names_the_file(tmp_path):
    (tmp_path / "broken.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"broken\.json is not a JSON file"):
        files.read_json(tmp_path / "broken.json")
