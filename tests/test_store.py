"""What is kept of an evaluation: read back where it was made from the same, made anew where it was not."""

import json

import pytest

from pit_jax.evaluation import judges, store
from pit_jax.pipelines.improve import Step

SPEC = {"models": {"rl_policy": "a1"}, "temperature": 1.0}


@pytest.fixture
def make():
    """Makes values that say how often it was called."""

    def call():
        call.times += 1
        return {"times": call.times}

    call.times = 0
    return call


def test_values_are_made_once_for_a_spec(tmp_path, make):
    path = tmp_path / "scores" / "x.json"
    assert store.values(path, SPEC, make) == store.values(path, dict(SPEC), make) == {"times": 1}
    assert store.values(path, SPEC | {"temperature": 0.5}, make) == {"times": 2}
    assert store.values(path, SPEC | {"models": {"rl_policy": "b2"}}, make) == {"times": 3}
    assert store.values(path, SPEC, make) == {"times": 4}, "one file holds what it was last made from"


def test_incomplete_values_are_used_and_made_again(tmp_path):
    found = iter([{"outcome": [None], "incomplete": 1}, {"outcome": [1], "incomplete": 0}])
    path = tmp_path / "x.json"
    assert store.values(path, SPEC, lambda: next(found))["outcome"] == [None]
    assert json.loads(path.read_text())["values"]["outcome"] == [None]
    assert store.values(path, SPEC, lambda: next(found))["outcome"] == [1]
    assert store.values(path, SPEC, lambda: next(found))["outcome"] == [1]


def test_answers_come_back_as_they_were(tmp_path):
    path, text = tmp_path / "pit.jsonl", lambda ids: "\u2028".join(map(str, ids))
    steps = [Step((1, 2), 10, 3, 4), Step((), 7, 1, parsed=False)]
    made = store.answers(path, "pit", SPEC, lambda: steps, text)
    read = store.answers(path, "pit", SPEC, lambda: pytest.fail("made again"), text)
    assert read == made and read.steps == steps and read.texts == ["1\u20282", ""] and read.ids == [(1, 2), ()]
    other = store.answers(path, "pit", SPEC | {"temperature": 0.0}, lambda: steps[:1], text)
    assert len(other.steps) == 1


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "pit.jsonl"
    for content in ("", "{", '{"spec": {}, "seconds": 1}\n{"row": 0}\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"pit.jsonl is damaged .* delete it"):
            store.read_answers(path, "pit")


def answers(name, *texts, spec=None):
    return store.AnswerSet(name, spec or {"name": name}, [Step((i,)) for i in range(len(texts))], list(texts), 0.0)


def test_scores_are_kept_by_answers_and_by_judge(tmp_path):
    asked = []

    def judge(**spec):
        def score(given):
            asked.append(given.texts)
            return [float(len(text)) for text in given.texts]

        return judges.by_scores("length", tmp_path, spec, score, None)

    first, second = answers("a", "xx", "y", "zz"), answers("b", "x", "yy", "zz")
    verdicts = judge(model=1).compare(first, second)
    assert verdicts.outcome.tolist() == [1, -1, 0] and verdicts.mask.all() and verdicts.asked.all()
    assert len(asked) == 2
    judge(model=1).compare(first, second)
    assert len(asked) == 2
    judge(model=1).compare(answers("a", "new", "y", "zz", spec={"name": "a", "of": "other"}), second)
    assert len(asked) == 3, "other answers of the same name"
    judge(model=2).compare(first, second)
    assert len(asked) == 5, "another judge of the same name"


def test_verdicts_are_kept_and_turned_and_asked_once(tmp_path):
    replies = iter([{"outcome": [1, None], "incomplete": 1}, {"outcome": [1, -1], "incomplete": 0}])
    make = lambda: judges.by_pairs("llm", tmp_path, {}, lambda a, b: next(replies))  # noqa: E731
    first, second = answers("a", "x", "y", "z"), answers("b", "x", "y", "z")
    judge = make()
    verdicts = judge.compare(first, second)
    assert verdicts.outcome.tolist() == [1, 0, 0]
    assert verdicts.mask.tolist() == [True, False, False] and verdicts.asked.tolist() == [True, True, False]
    turned = judge.compare(first, second), judge.details(first, second)
    assert turned[0].mask.tolist() == [True, False, False] and turned[1]["outcome"] == [1, None], "as in the file"
    turned = make().compare(second, first)
    assert turned.outcome.tolist() == [-1, 1, 0] and turned.mask.tolist() == [True, True, False]
