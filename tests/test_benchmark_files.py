"""Files of answers to benchmarks: what their scores are, and what is said of broken ones."""

import json

import pytest

from pit_jax.data.sources import DataError
from pit_jax.evaluation import benchmark_files


def write(tmp_path, *rows):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k(tmp_path):
    rows = [{"response": "So 1,000.", "target": "#### 1000"}, {"response": "none", "target": "3"}]
    found = benchmark_files.score("gsm8k", write(tmp_path, *rows))
    assert (found["accuracy"], found["n"], found["unparsed"]) == (0.5, 2, 1)


def test_bbh_is_the_mean_over_tasks(tmp_path):
    navigate = {"task": "navigate", "target": "Yes"}
    right, wrong = {"response": "So the answer is Yes."}, {"response": "So the answer is No."}
    counting = {"task": "object_counting", "target": "3", "response": "So the answer is 3."}
    found = benchmark_files.score("bbh", write(tmp_path, navigate | right, navigate | wrong, counting))
    assert found["accuracy"] == 0.75 and found["tasks"]["navigate"]["accuracy"] == 0.5


def test_tydiqa_is_the_mean_over_languages(tmp_path):
    rows = [
        {"language": "en", "response": "the red house", "targets": ["red house"]},
        {"language": "fi", "response": "talo", "targets": ["punainen talo", "auto"]},
    ]
    found = benchmark_files.score("tydiqa", write(tmp_path, *rows))
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2) and found["exact_match"] == 0.5


def test_alpaca_eval(tmp_path):
    row = {"instruction": "i", "output_1": "b", "output_2": "m", "generator_1": "base", "generator_2": "model"}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([row | {"preference": p} for p in (1.0, 2.0, 1.75, None)]))
    found = benchmark_files.score("alpaca_eval", path)
    assert found["win_rate"] == pytest.approx(100 * (0 + 1 + 0.75) / 3)
    assert (found["model"], found["n_total"], found["n_dropped"]) == ("model", 3, 1)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8k", [{"response": "3"}], "line 1: field 'target' is missing"),
        ("gsm8k", [{"response": "3", "target": "none"}], "line 1: the target 'none' holds no number"),
        ("bbh", [{"response": "3", "target": "3", "task": "chess"}], "line 1: .*chess"),
        ("tydiqa", [{"response": "3", "targets": "3"}], "line 1: field 'targets' must be an array"),
        ("gsm8k", [], "no rows"),
        ("mmlu", [], "use gsm8k, bbh"),
    ],
)
def test_what_is_refused(tmp_path, name, rows, message):
    with pytest.raises(ValueError, match=message):
        benchmark_files.score(name, write(tmp_path, *rows))
    with pytest.raises(DataError, match="no such file"):
        benchmark_files.score("gsm8k", tmp_path / "nothing.jsonl")
