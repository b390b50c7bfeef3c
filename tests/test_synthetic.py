"""The generator: what every row promises, what the splits promise, and that the answers alone give little away."""

import collections
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from pit_jax.data import synthetic, synthetic_text
from pit_jax.data.verifier import CHECKS, verify, words
from pit_jax.types import PreferenceExample, Requirement

COPYING = ("contains", "starts_with", "ends_with", "hashtag", "topic")


@pytest.fixture(scope="module")
def rows():
    return synthetic.generate(0, 0, 6000)


@pytest.fixture(scope="module")
def splits():
    return synthetic.make_splits(5, 1000, num_selection=60, num_test=200, num_pretrain=300)


def failed(row):
    return [r.kind for r, ok in zip(row.requirements, verify(row.requirements, row.rejected), strict=True) if not ok]


def test_chosen_meets_all_and_rejected_some(rows):
    for row in rows:
        assert all(verify(row.requirements, row.chosen)), row
        met = verify(row.requirements, row.rejected)
        assert any(met) and not all(met), row
        assert 2 <= len(row.requirements) <= 4 and row.requirements[0].kind == "topic"
        assert "<<" not in row.prompt + row.chosen + row.rejected + row.reflection


def test_every_kind_is_asked_for_and_failed(rows):
    asked = collections.Counter(r.kind for row in rows for r in row.requirements)
    faults = collections.Counter(kind for row in rows for kind in failed(row))
    assert asked.keys() == faults.keys() == CHECKS.keys()
    assert min(faults.values()) >= 30


def test_failures_are_those_of_a_half_trained_model(rows):
    faults = collections.Counter(kind for row in rows for kind in failed(row))
    share = sum(faults[kind] for kind in COPYING) / sum(faults.values())
    assert 0.5 <= share <= 0.85
    counts = np.bincount([len(failed(row)) for row in rows]) / len(rows)
    # 1, 2 or 3 with 0.6, 0.3, 0.1, but never all of the 2, 3 or 4 that are asked (0.2, 0.6, 0.2 of the rows).
    expected = [0, 0.2 + 0.8 * 0.6, 0.8 * 0.3 + 0.6 * 0.1, 0.2 * 0.1]
    np.testing.assert_allclose(counts, expected, atol=0.04)
    # Counts are missed from both sides, and a missing word is as often a wrong one as no word.
    off = collections.Counter()
    for row in rows:
        for r in row.requirements:
            if r.kind == "exactly_words":
                off[int(np.sign(len(words(row.rejected)) - int(r.value)))] += 1
    assert off[1] > 20 and off[-1] > 20


def test_most_pairs_are_minimal_edits(rows):
    """Pairs of one base text share most tokens; pairs of two base texts share only what is asked for."""

    def overlap(row):
        a, b = set(row.chosen.lower().split()), set(row.rejected.lower().split())
        return len(a & b) / len(a | b)

    shared = np.mean([overlap(row) > 0.55 for row in rows])
    assert 0.58 < shared < 0.72  # 0.65 where 0.85 are; what is added to either answer counts against some


def test_failure_weights_choose_what_fails():
    base = dict.fromkeys(synthetic.FAILURE_WEIGHTS, 0.0)
    only_topic = synthetic.generate(0, 0, 40, failure_weights=base | {"topic": 1.0})
    assert {tuple(failed(row)) for row in only_topic} == {("topic",)}
    more = synthetic.generate(0, 0, 600, failure_weights={"upper_case": 20.0})
    usual = synthetic.generate(0, 0, 600, failure_weights={"upper_case": 0.5})
    count = lambda rows: sum("upper_case" in failed(row) for row in rows)  # noqa: E731
    assert count(more) > 2 * count(usual) > 0


@pytest.mark.parametrize("weights", [{"rhymes": 1.0}, {"topic": -1.0}, dict.fromkeys(synthetic.FAILURE_WEIGHTS, 0)])
def test_bad_failure_weights(weights):
    with pytest.raises(ValueError, match="failure_weights"):
        synthetic.generate(0, 0, 1, failure_weights=weights)


def test_bad_phrasings():
    with pytest.raises(ValueError, match="use train or test"):
        synthetic.generate(0, 0, 0, phrasings="dev")


def test_a_row_depends_only_on_seed_and_index(rows):
    assert synthetic.generate(0, 1234, 1240) == rows[1234:1240]
    assert synthetic.generate(1, 0, 20) != rows[:20]
    assert synthetic.generate(0, 0, 20, stream=1) != rows[:20]


def test_another_process_draws_the_same_rows(rows):
    """Sets of strings have another order in each process; no row may depend on it."""
    code = "from pit_jax.data import synthetic; print(repr(synthetic.generate(0, 0, 300)))"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == repr(rows[:300])


def test_importing_needs_no_tfds():
    code = "import sys; import pit_jax.data.synthetic; print('tensorflow_datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Wording --------------------------------------------------------------------------------------------------------------


def test_prompts_say_all_that_is_asked(rows):
    """From the prompt alone: each requirement stands there in one of its wordings, in order, and nothing else does."""
    for row in rows[:1500]:
        task, _ = synthetic.combination(row)
        a, rest = synthetic_text.TASKS[task][0], row.prompt
        for r in row.requirements:
            wordings = [p.format(a=a, v=r.value) for p in synthetic_text.phrasings(r.kind, "train")]
            said = [p for p in wordings if rest.startswith(p)]
            assert said, (r, rest)
            rest = rest[len(max(said, key=len)) :].lstrip()
        assert rest == ""


def test_each_kind_has_held_out_phrasings():
    assert synthetic_text.PHRASINGS.keys() == synthetic_text.CLAUSES.keys() == CHECKS.keys()
    for kind, wordings in synthetic_text.PHRASINGS.items():
        train, test = synthetic_text.phrasings(kind, "train"), synthetic_text.phrasings(kind, "test")
        assert len(set(wordings)) == len(wordings) >= 8, kind
        assert len(train) >= 6 and len(test) >= 2 and not set(train) & set(test), kind


def test_no_wording_can_be_read_as_another_kind():
    """A wording that fits two kinds would make two different requirements look the same."""
    owner = {}
    for kind, wordings in synthetic_text.PHRASINGS.items():
        for wording in wordings:
            assert owner.setdefault(wording, kind) == kind


def test_held_out_phrasings_are_only_in_test(splits):
    def sentences(rows, which):
        """How many wordings of the rows are of `which`, by kind and value."""
        found = 0
        for row in rows:
            a = synthetic_text.TASKS[synthetic.combination(row)[0]][0]
            for r in row.requirements:
                for p in synthetic_text.phrasings(r.kind, which):
                    found += f" {p.format(a=a, v=r.value)}" in f" {row.prompt}"
        return found

    for name, rows in splits.items():
        asked = sum(len(row.requirements) for row in rows)
        assert sentences(rows, "test") == (asked if name == "test" else 0), name
        assert sentences(rows, "train") == (0 if name == "test" else asked), name


def test_reflect_by_hand():
    requirements = (Requirement("topic", "tea"), Requirement("hashtag", "lake"), Requirement("exactly_words", "7"))
    assert synthetic.reflect(requirements, (True, False, True)) == "topic tea yes, #lake no, exactly 7 words yes."
    assert synthetic.reflect(requirements[:1], (True,)) == "topic tea yes."


def test_reflections_are_true(rows):
    """Read back, clause by clause: the name of the requirement, then the verifier's verdict on y_l."""
    names = [name.format(v="X") for name in synthetic_text.CLAUSES.values()]
    assert len(set(names)) == len(names)
    for row in rows[:1500]:
        clauses = row.reflection.removesuffix(".").split(", ")
        for r, ok, clause in zip(row.requirements, verify(row.requirements, row.rejected), clauses, strict=True):
            name, verdict = clause.rsplit(" ", 1)
            assert name == synthetic_text.CLAUSES[r.kind].format(v=r.value)
            assert verdict == ("yes" if ok else "no")


def test_rows_are_short_and_the_words_few(rows):
    size = lambda field: np.array([len(getattr(row, field).split()) for row in rows])  # noqa: E731
    assert np.quantile(size("prompt"), 0.99) <= 30
    assert 6 <= size("chosen").mean() <= 12 and np.quantile(size("chosen"), 0.99) <= 18
    assert np.quantile(size("rejected"), 0.99) <= 18
    assert np.quantile(size("reflection"), 0.99) <= 20
    lexicon = set()
    for row in rows:
        lexicon.update(re.findall(r"[a-z]+", f"{row.prompt} {row.chosen} {row.rejected} {row.reflection}".lower()))
    assert len(lexicon) <= 300


def test_bank_words_are_only_where_they_are_asked_for():
    """A bank word inside another text could meet `contains`, or break `avoids`, by accident."""
    texts = [*synthetic_text.TOPICS, *synthetic_text.SENTENCES, *synthetic_text.ITEMS, *synthetic_text.ITEM_CORES]
    texts += [*synthetic_text.JSON_KEYS, *synthetic_text.STARTERS, *synthetic_text.WORD_TAILS]
    texts += [tail for tails in synthetic_text.TAILS.values() for tail in tails]
    texts += [text for called, cores in synthetic_text.TASKS.values() for text in (called, *cores)]
    assert len(set(synthetic_text.BANK)) == len(synthetic_text.BANK) >= 16
    assert not set(synthetic_text.BANK) & {word for text in texts for word in words(text)}
    assert len(synthetic_text.TASKS) >= 12 and len(set(synthetic_text.TOPICS)) >= 15
    for length, tails in synthetic_text.TAILS.items():
        assert all(len(words(tail)) == length for tail in tails)


def test_word_forms_cover_the_words_of_rows(rows):
    forms = set(re.findall(r"[A-Za-z]+", " ".join(synthetic_text.word_forms())))
    for row in rows[:1000]:
        for text in (row.prompt, row.chosen, row.reflection):
            assert set(re.findall(r"[A-Za-z]{2,}", text)) <= forms


# Splits ---------------------------------------------------------------------------------------------------------------


def test_folds_are_equal_and_no_prompt_is_in_two_splits(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {
        **{"sft": 333, "rm": 333, "rl": 334, "selection": 60, "test": 200, "pretrain": 300},
    }
    prompts = [row.prompt for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts))


def test_selection_and_test_share_no_combination_with_other_splits(splits):
    keys = {name: {synthetic.combination(row) for row in rows} for name, rows in splits.items()}
    for held_out in ("selection", "test"):
        for name in splits:
            assert name == held_out or not keys[held_out] & keys[name]


def test_what_another_split_holds_is_passed_over(monkeypatch, rows):
    """Streams made to collide: the folds ask what the test rows ask, in other words; pretraining repeats the folds."""
    reworded = synthetic.generate(0, 0, 40, phrasings="test")
    assert [synthetic.combination(row) for row in reworded] == [synthetic.combination(row) for row in rows[:40]]
    assert not {row.prompt for row in reworded} & {row.prompt for row in rows[:40]}
    streams = {"test": reworded, "folds": rows[5:40], "pretrain": [*rows[10:16], *rows[10:30]], "selection": []}

    def generate(seed, start, stop, *, stream, **_):
        return next(streams[name] for name, number in synthetic.STREAMS.items() if number == stream)[start:stop]

    monkeypatch.setattr(synthetic, "generate", generate)
    splits = synthetic.make_splits(0, 9, num_selection=0, num_test=10, num_pretrain=8)
    assert splits["test"] == reworded[:10]
    folds = {row.prompt for name in ("sft", "rm", "rl") for row in splits[name]}
    assert folds == {row.prompt for row in rows[10:19]}  # not 5 .. 9, which test asks for
    assert splits["pretrain"] == rows[19:27]  # not 10 .. 18, which are the folds'


def test_split_keeps_equal_prompts_together_and_ignores_the_order():
    rows = [PreferenceExample(f"prompt {i % 90}", f"worse {i}", f"better {i}") for i in range(120)]
    folds = synthetic.split(rows)
    assert [len(fold) for fold in folds] == [30, 30, 30]
    assert len({row.prompt for fold in folds for row in fold}) == 90
    mixed = rows[:90]
    np.random.default_rng(0).shuffle(mixed)
    assert synthetic.split(mixed) == folds
    assert [len(fold) for fold in synthetic.split(rows[:11], 4)] == [2, 3, 3, 3]


def test_combination_is_blind_to_wording_and_order():
    first = PreferenceExample("Write a poster. B", "", "", "", (Requirement("topic", "tea"), Requirement("quotes")))
    second = PreferenceExample("B Make a poster", "", "", "", (Requirement("quotes"), Requirement("topic", "tea")))
    other = PreferenceExample("Write a slogan. B", "", "", "", first.requirements)
    assert synthetic.combination(first) == synthetic.combination(second) != synthetic.combination(other)
    with pytest.raises(ValueError, match="no synthetic task"):
        synthetic.combination(PreferenceExample("Write an opera.", "", ""))


# Surface cues ---------------------------------------------------------------------------------------------------------


def test_answers_alone_give_little_away(rows):
    """0.67 and 0.57, where a reader of the prompt reaches 1.0."""
    ours = synthetic.surface_baselines(rows[:4000], rows[4000:])
    assert 0.5 < ours["bag_of_words"] < 0.68
    assert 0.45 < ours["length"] < 0.60


def test_surface_baselines_agree_with_scikit_learn(rows):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    vectorizer = text.CountVectorizer(token_pattern=synthetic.SURFACE_TOKEN, lowercase=False)
    vectorizer.fit([t for row in rows[:4000] for t in (row.chosen, row.rejected)])
    chosen, rejected = (vectorizer.transform([getattr(row, name) for row in rows]) for name in ("chosen", "rejected"))
    flips = np.where(np.random.default_rng(1).random(len(rows)) < 0.5, -1, 1)
    x = (chosen - rejected).multiply(flips[:, None]).tocsr()
    model = linear.LogisticRegression(max_iter=1000, fit_intercept=False).fit(x[:4000], flips[:4000])
    theirs = model.score(x[4000:], flips[4000:])
    assert theirs < 0.70
    assert synthetic.surface_baselines(rows[:4000], rows[4000:])["bag_of_words"] == pytest.approx(theirs, abs=0.02)


def test_surface_baselines_find_a_cue_that_is_there():
    rows = [PreferenceExample("", f"tea {i % 7}", f"tea {i % 5} now") for i in range(400)]
    found = synthetic.surface_baselines(rows[:200], rows[200:])
    assert found == {"bag_of_words": 1.0, "length": 1.0}
    rng = np.random.default_rng(0)
    noise = [PreferenceExample("", *(" ".join(rng.choice(list("abcdef"), 5)) for _ in range(2))) for _ in range(4000)]
    found = synthetic.surface_baselines(noise[:2000], noise[2000:])
    assert found["bag_of_words"] == pytest.approx(0.5, abs=0.04)
    assert found["length"] == 0.5  # nothing to see is half right
