"""The classifier of good and bad rows: what it learns, what it cannot know, and files that it refuses."""

import json

import numpy as np
import pytest

from pit_jax.data import quality
from pit_jax.data.quality import Labelled
from pit_jax.data.sources import DataError


def rows_of(n: int, label) -> list[Labelled]:
    """Answers of ten words of fifty; a good one says "fine"."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        words = [f"word{j}" for j in rng.integers(0, 50, 10)]
        good = bool(label(rng))
        rows.append(Labelled(f"prompt {i}", " ".join([*words[:5], "fine" if good else "awful", *words[5:]]), good))
    return rows


def test_a_word_that_tells_is_found():
    found = quality.train(rows_of(200, lambda rng: rng.random() < 0.7), held_out=0.25, seed=0)
    assert found.accuracy >= 0.96 and (found.num_train, found.num_held_out) == (150, 50)
    assert 0.5 < found.majority < 0.9
    p = quality.probabilities(found, ["new", "new"], ["this is fine", "this is awful"])
    assert p[0] > 0.8 and p[1] < 0.3 and p.dtype == np.float64


def test_labels_that_nothing_tells_are_not_learnt():
    """Held-out accuracy is on rows that were not learnt from: a coin is guessed half the time."""
    rng = np.random.default_rng(1)
    rows = [row._replace(label=bool(rng.random() < 0.5)) for row in rows_of(400, lambda rng: True)]
    found = quality.train(rows, held_out=0.5, seed=0)
    assert abs(found.accuracy - 0.5) < 0.12
    learnt = quality.probabilities(found, [r.prompt for r in rows], [r.response for r in rows]) > 0.5
    assert np.mean(learnt == [r.label for r in rows]) > 0.65  # what was learnt from is remembered


def test_accuracy_is_that_of_the_filter():
    """Where hardly anything is let through, it is right on the bad rows alone."""
    rows = rows_of(200, lambda rng: rng.random() < 0.7)
    found = [quality.train(rows, 0.25, 0, min_quality) for min_quality in (0.5, 1.0, 0.0)]
    assert found[0].accuracy >= 0.96
    assert found[1].accuracy == pytest.approx(1 - found[0].majority)
    assert found[2].accuracy == pytest.approx(found[0].majority)


def test_no_prompt_is_on_both_sides():
    """Ten prompts with ten rows each, of which a prompt's are all good or all bad: two whole prompts are held out."""
    rows = [Labelled(f"prompt {i}", f"word{i} word{j}", i % 2 == 0) for i in range(10) for j in range(10)]
    found = quality.train(rows, held_out=0.2, seed=3)
    assert (found.num_train, found.num_held_out) == (80, 20)
    assert {quality.train(rows, 0.2, seed).accuracy for seed in range(6)} != {
        found.accuracy
    }  # other prompts, by the seed


def test_features():
    x = quality.features(["a", "a", "b"], ["Hi there", "there hi", "HI THERE"])
    assert x.shape == (3, quality.NUM_BUCKETS + 1) and x.dtype == np.float32
    np.testing.assert_allclose((x[:, :-1] ** 2).sum(1), 1.0, rtol=1e-6)
    assert (x[:, -1] == 1).all()
    # "x a", "y hi", "y there", the pair, the length of two words, not upper case.
    assert (x[:, :-1] > 0).sum(1).tolist() == [6, 6, 6]
    assert ((x[0] > 0) & (x[1] > 0)).sum() == 6  # all but the pair, and the constant
    assert ((x[0] > 0) & (x[2] > 0)).sum() == 5  # all but prompt and upper case, and the constant
    np.testing.assert_array_equal(quality.features(["", "\ud83d"], ["", "😀"])[:, -1], [1, 1])  # any text


def test_pieces_are_put_together():
    found = quality.train(rows_of(40, lambda rng: rng.random() < 0.5), 0.2, 0)
    texts = [f"fine {i}" for i in range(1030)]
    p = quality.probabilities(found, texts, texts)
    assert p.shape == (1030,) and len(quality.probabilities(found, [], [])) == 0
    np.testing.assert_allclose(p[1025:], quality.probabilities(found, texts[1025:], texts[1025:]), rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Labelled("x", "y", True)] * 30, "30 good and 0 bad rows"),
        ([Labelled("x", "y", True)] * 9 + [Labelled("x", "y", False)] * 9, "9 good and 9 bad rows.*at least 20 rows"),
        ([Labelled("a", "y", True)] * 15 + [Labelled("b", "y", False)] * 15, "15 rows are left .* one label only"),
    ],
)
def test_rows_that_teach_nothing(rows, message):
    with pytest.raises(DataError, match=message):
        quality.train(rows, 0.2, 0)


def test_a_file_of_labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    good = {"prompt": "x", "response": "y", "label": True}
    path.write_text("\n".join(json.dumps(r) for r in (good, good | {"label": 0, "note": "dull"})) + "\n\n")
    assert quality.read_labels(path) == [Labelled("x", "y", True), Labelled("x", "y", False)]
    for row, message in (
        (good | {"label": None}, "line 2: label is None: write true"),
        (good | {"label": "good"}, "line 2: label is 'good'"),
        ({"prompt": "x", "label": True}, "line 2: field 'response' is missing"),
        (good | {"response": 3}, "line 2: field 'response' is a JSON number"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(DataError, match=message):
            quality.read_labels(path)
    with pytest.raises(DataError, match=r"no such file \(--config\.labels\)"):
        quality.read_labels(tmp_path / "none")
