"""Scorers of GSM8K, BIG-Bench Hard and TyDi QA."""

import gzip
import json
import lzma
import os
import pathlib
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pit_jax.evaluation import benchmarks
from pit_jax.evaluation.benchmarks import Score, TextScore

DATA = pathlib.Path(os.environ.get("PIT_JAX_DATA", pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"))


def rows_of(path):
    """JSON rows of a file below the data folder, which may be compressed."""
    if not path.exists():
        pytest.skip(f"no {path}: set PIT_JAX_DATA to the folder of test data")
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def bbh_rows(task):
    plain = DATA / "bbh" / f"{task}.jsonl"
    return rows_of(plain if plain.exists() else plain.with_suffix(".jsonl.xz"))


# GSM8K


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sold 48 + 24 = 72 clips.", "72"),
        ("The total is $1,080,000.00 in all", "1080000"),
        ("7 is wrong.\n#### 1,234 (of 5)", "1234"),
        ("#### 5 apples of 7", "5"),
        ("#### 3 or rather #### 4 of 5", "4"),
        ("It is 12. ####", "12"),
        ("The discount is 50%.", "50"),
        ("It is -$5", "-5"),
        ("It is $-5.50", "-5.5"),
        ("The result is (-5)", "-5"),
        ("x = \u22124", "-4"),
        ("5-3", "3"),
        ("10 - 3", "3"),
        ("A1-2", "2"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("1, 2,3", "3"),
        ("1,234,567.", "1234567"),
        ("3/4", "4"),
        ("12345678901234567890.0", "12345678901234567890"),
        ("none", None),
        ("", None),
        ("####", None),
        ("- $ . ,", None),
    ],
)
def test_last_number(text, number):
    assert benchmarks.last_number(text) == number


def test_gsm8k_compares_values():
    target = "48/2 = <<48/2=24>>24\n#### 1,000"
    for right in ("#### 1000", "The answer is 1,000.00 dollars.", "so $1000."):
        assert benchmarks.gsm8k_score(right, target) == Score(1.0, "1000")
    assert benchmarks.gsm8k_score("It is 24", target) == Score(0.0, "24")
    assert benchmarks.gsm8k_score("I do not know.", target) == Score(0.0, None)
    # Without punctuation these would be equal.
    assert benchmarks.gsm8k_score("2.5", "#### 25").score == 0.0
    assert benchmarks.gsm8k_score("-3", "#### 3").score == 0.0
    with pytest.raises(ValueError, match="holds no number"):
        benchmarks.gsm8k_score("3", "#### three")


def test_gsm8k_targets_of_the_data():
    rows = rows_of(DATA / "gsm8k" / "train.jsonl.xz")
    assert len(rows) == 7473
    for row in rows:
        text = row["answer"].split("####")[1].strip()
        number = benchmarks.last_number(row["answer"])
        assert float(number) == float(text.replace(",", "")), row["answer"]
        value = int(number)  # every target of the data is whole
        assert benchmarks.gsm8k_score(row["answer"], row["answer"]).score == 1.0
        assert benchmarks.gsm8k_score(f"The answer is ${value:,}.00.", row["answer"]).score == 1.0
        assert benchmarks.gsm8k_score(f"The answer is {value + 1}.", row["answer"]).score == 0.0
        assert benchmarks.gsm8k_score(f"The answer is {-value}.", row["answer"]).score == float(value == 0)


@given(st.decimals(-(10**12), 10**12, places=3), st.text())
def test_a_number_scores_1_in_every_writing(value, before):
    for writing in (f"{value:f}", f"{value:,f}", f"{value:f}0", f"${value:f}"):
        text = f"{before}\n#### {writing} in all"
        assert benchmarks.gsm8k_score(text, f"#### {value:f}").score == 1.0, writing
    assert benchmarks.gsm8k_score(f"#### {value:f}", f"#### {value + 1:f}").score == 0.0


# BIG-Bench Hard


@pytest.mark.parametrize(
    ("task", "response", "answer"),
    [
        ("snarks", "We see that ... So the answer is (A).", "(A)"),
        ("snarks", "the answer is b.", "(B)"),
        ("snarks", "The answer is **(B)** the second", "(B)"),
        ("snarks", "The answer is: option B)", "(B)"),
        ("snarks", "(B)", "(B)"),
        ("snarks", "(B) because it is ironic", "(B)"),
        ("snarks", "B.", "(B)"),
        ("snarks", "A cat", None),
        ("snarks", "the answer is A cat", None),
        ("snarks", "A, then B", None),
        ("snarks", "the answer is unclear", None),
        ("snarks", "So the answer is (A). No, wait. So the answer is (B).", "(B)"),
        ("snarks", "So the answer is (A).\n\nQ: Another\nA: So the answer is (B).", "(A)"),
        ("snarks", "If the answer is (B) then ... So the answer is (A).", "(A)"),
        ("snarks", "So the answer is (A), and I am sure that the answer is right.", "(A)"),
        ("snarks", "Q: What?\nA: So the answer is (A).", None),
        ("boolean_expressions", "So the answer is True.", "true"),
        ("boolean_expressions", "FALSE", "false"),
        ("boolean_expressions", "So the answer is Truely.", None),
        ("navigate", "So the answer is yes, we do.", "yes"),
        ("navigate", "Yes, we do", None),
        ("formal_fallacies", 'So the answer is "invalid".', "invalid"),
        ("formal_fallacies", "So the answer is deductive.", None),
        ("object_counting", "So the answer is 1,015 fruits.", "1015"),
        ("object_counting", "15", "15"),
        ("object_counting", "It may be 15 or 16", None),
        ("multistep_arithmetic_two", "So the answer is $-219$.", "-219"),
        ("multistep_arithmetic_two", "So the answer is \u2212219.0", "-219"),
        ("dyck_languages", "So the answer is } ] >.", "} ] >"),
        ("dyck_languages", "So the answer is `}]>`.", "} ] >"),
        ("dyck_languages", "] ]", "] ]"),
        ("dyck_languages", "So the answer is { }.", None),
        ("dyck_languages", "]] is missing", None),
        ("word_sorting", "So the answer is Arson, it&t, o'connell.", "arson it&t o'connell"),
        ("word_sorting", "So the answer is arson aspect. We are done. Really", "arson aspect"),
        ("word_sorting", "So the answer is\narson aspect\n", "arson aspect"),
        ("word_sorting", "", None),
    ],
)
def test_bbh_answers(task, response, answer):
    targets = {"snarks": "(A)", "boolean_expressions": "True", "formal_fallacies": "valid", "dyck_languages": "]"}
    targets |= {"navigate": "No", "object_counting": "7", "multistep_arithmetic_two": "-7", "word_sorting": "a b"}
    assert benchmarks.bbh_score(task, response, targets[task]).answer == answer


def test_bbh_brackets_are_compared():
    assert benchmarks.bbh_score("dyck_languages", "So the answer is } ] >.", "} ] >").score == 1.0
    assert benchmarks.bbh_score("dyck_languages", "So the answer is } ] ).", "} ] >").score == 0.0
    assert benchmarks.bbh_score("dyck_languages", "So the answer is } ].", "} ] >").score == 0.0


def test_bbh_refuses():
    with pytest.raises(ValueError, match="'sorting' is not one of BIG-Bench Hard: boolean_expressions"):
        benchmarks.bbh_score("sorting", "a", "b")
    for task, target in (
        ("snarks", " "),
        ("navigate", "Perhaps"),
        ("object_counting", "many"),
        ("dyck_languages", "["),
    ):
        with pytest.raises(ValueError, match=f"is no answer to a question of the task '{task}'"):
            benchmarks.bbh_score(task, "(A)", target)


NOT_OPTIONS = {
    ("movie_recommendation", "Monsters, Inc"),
    ("ruin_names", "dearth, wind, & fire"),
    ("ruin_names", "rita, sue and bob poo"),
}
"""Rows of the data whose target is the text of an option."""


def perturbed(kind, target):
    """A wrong answer of the same form."""
    if isinstance(kind, tuple):
        return next(word for word in kind if word != target.casefold())
    if kind == "option":
        return "(A)" if target != "(A)" else "(B)"
    if kind == "number":
        return str(int(target) + 1)
    if kind == "closers":
        return target + " ]"
    words = target.split()
    return " ".join([words[-1], *words[:-1]])


@pytest.mark.parametrize("task", benchmarks.BBH_KINDS)
def test_bbh_targets_of_the_data(task):
    kind, rows = benchmarks.BBH_KINDS[task], bbh_rows(task)
    assert len(rows) > 100
    for row in rows:
        target = row["target"]
        for right in (f"As we see. So the answer is {target}.", target, f"The answer is **{target}**"):
            assert benchmarks.bbh_score(task, right, target).score == 1.0, right
        if (task, target) in NOT_OPTIONS:
            assert benchmarks.bbh_score(task, "So the answer is (A).", target).score == 0.0
            continue
        wrong = f"As we see. So the answer is {perturbed(kind, target)}."
        score = benchmarks.bbh_score(task, wrong, target)
        assert score.score == 0.0, wrong
        assert score.answer is not None, wrong
        assert benchmarks.bbh_score(task, "It is hard to say anything.\nReally.", target).score == 0.0


def exemplars(task):
    """(question, answer with its steps) of the task's few-shot text."""
    path = DATA / "bbh" / "cot-prompts" / f"{task}.txt"
    if not path.exists():
        pytest.skip(f"no {path}: set PIT_JAX_DATA to the folder of test data")
    parts = re.split(r"^Q: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [re.split(r"\nA: ?", part, maxsplit=1) for part in parts]


def solved(task, question):
    """The target of a question that a few lines of Python can answer; None for others."""
    if task == "boolean_expressions":
        return str(eval(question.removesuffix(" is")))
    if task == "multistep_arithmetic_two":
        return str(eval(question.removesuffix("=")))
    if task == "word_sorting":
        return " ".join(sorted(question.split("List:")[1].split()))
    if task == "dyck_languages":
        stack = []
        for bracket in question.split("Input:")[1].split():
            if bracket in "([{<":
                stack.append(")]}>"["([{<".index(bracket)])
            else:
                assert stack.pop() == bracket
        return " ".join(reversed(stack))
    return None


@pytest.mark.parametrize("task", benchmarks.BBH_KINDS)
def test_bbh_exemplars_score_1_and_wrong_ones_0(task):
    shots = exemplars(task)
    assert len(shots) == 3
    for question, answer in shots:
        steps, written = answer.strip().removesuffix(".").rsplit("So the answer is ", 1)
        # The data does not hold these questions: targets are what is written and, in four tasks, what Python finds.
        for target in (written, solved(task, question.strip())):
            if target is None:
                continue
            assert benchmarks.bbh_score(task, answer, target).score == 1.0, (question, target)
            wrong = perturbed(benchmarks.BBH_KINDS[task], target)
            assert benchmarks.bbh_score(task, f"{steps}So the answer is {wrong}.", target).score == 0.0
            assert benchmarks.bbh_score(task, f"{steps}So the answer is not clear.", target).score == 0.0
            assert benchmarks.bbh_score(task, steps, target).score == 0.0


# TyDi QA


@pytest.mark.parametrize(
    ("response", "targets", "f1", "exact_match"),
    [
        ("The cat sat.", ["cat sat"], 1.0, 1.0),
        # "in 1869" and "1869": 1 shared word of 2 + 1.
        ("in 1869", ["1869", "year"], 2 / 3, 0.0),
        # Words count as often as they stand: shared "a b", of 3 + 2 words (x is not an article).
        ("x x b", ["x b"], 4 / 5, 0.0),
        ("orang-orang Viking", ["orang-orang Viking", "orang-orang Viking dari Eropa Utara"], 1.0, 1.0),
        # orangorang, viking: 2 shared of 2 + 5.
        ("orang-orang Viking", ["orang-orang Viking dari Eropa Utara"], 4 / 7, 0.0),
        # Thai: the date's words are apart, 4 shared of 4 + 5.
        ("24 กันยายน พ.ศ. 2492", ["วันที่ 24 กันยายน พ.ศ. 2492"], 8 / 9, 0.0),
        ("بطولتين", ["بطولتين", "ثلاث"], 1.0, 1.0),
        # Bengali: 2 shared of 3 + 2.
        ("হুসেইন মুহম্মদ এরশাদ", ["মুহম্মদ এরশাদ"], 4 / 5, 0.0),
        ("Иван Грозный", ["иван грозный"], 1.0, 1.0),
        ("", ["cat"], 0.0, 0.0),
        ("dog", ["cat"], 0.0, 0.0),
    ],
)
def test_tydiqa_by_hand(response, targets, f1, exact_match):
    score = benchmarks.tydiqa_score(response, targets)
    assert (score.f1, score.exact_match) == (pytest.approx(f1), exact_match)
    assert (score.answer is None) == (response == "")


def test_punctuation_of_other_scripts_counts_as_squad_counts_it():
    # The Arabic comma and the Bengali danda are no punctuation of ASCII.
    for response, target in (("1949، لاهور", "1949 لاهور"), ("ঢাকা।", "ঢাকা"), ("«Виктория»", "Виктория")):
        assert benchmarks.tydiqa_score(response, [target]).exact_match == 0.0
        assert benchmarks.tydiqa_score(response, [target], multilingual=True) == TextScore(
            1.0, 1.0, benchmarks.normalize_answer(target, multilingual=True)
        )
    # Vowel signs are marks, not punctuation; one letter can be written in two ways.
    assert benchmarks.normalize_answer("కోట", multilingual=True) == "కోట"
    assert benchmarks.tydiqa_score("Malmo\u0308", ["Malmö"], multilingual=True).exact_match == 1.0
    assert benchmarks.tydiqa_score("Malmo\u0308", ["Malmö"]).exact_match == 0.0


def test_tydiqa_answers_of_the_data():
    answers = []
    files = ("tiny_dev.jsonl.gz", "small_gold_annotation.jsonl.xz")
    for row in (row for name in files for row in rows_of(DATA / "tydiqa" / name)):
        text = row["document_plaintext"].encode()
        spans = [a["minimal_answer"] for a in row["annotations"]]
        golds = [
            text[s["plaintext_start_byte"] : s["plaintext_end_byte"]].decode()
            for s in spans
            if s["plaintext_start_byte"] >= 0
        ]
        for multilingual in (False, True):
            for gold in golds:
                assert benchmarks.tydiqa_score(gold, golds, multilingual=multilingual)[:2] == (1.0, 1.0)
                assert benchmarks.tydiqa_score(f" {gold}.\n", golds).f1 == 1.0
                longer = benchmarks.tydiqa_score(gold + " unrelated", golds, multilingual=multilingual)
                assert 0.5 < longer.f1 < 1.0
                assert longer.exact_match == 0.0
        answers += golds
    assert len(answers) == 12


def test_tydiqa_refuses():
    for wrong in ([], "cat"):
        with pytest.raises(ValueError, match="at least one annotated answer"):
            benchmarks.tydiqa_score("a", wrong)


# laws

TARGETS = {"option": "(A)", "number": "7", "closers": "] ]", "words": "a b"} | {
    kind: kind[0] for kind in benchmarks.BBH_KINDS.values() if isinstance(kind, tuple)
}

ANSWERS = st.text() | st.sampled_from(
    ["#### ", "So the answer is ", "the answer is (", "Q:", "-$1,0.", "A)", "] ["]
).flatmap(lambda part: st.text().map(lambda text: text + part + text))


@settings(deadline=None)
@given(ANSWERS, st.sampled_from(sorted(benchmarks.BBH_KINDS)))
def test_any_response_has_a_score(response, task):
    scores = [
        benchmarks.gsm8k_score(response, "#### 7"),
        benchmarks.bbh_score(task, response, TARGETS[benchmarks.BBH_KINDS[task]]),
    ]
    for score in scores:
        assert score.score in (0.0, 1.0)
        assert score.answer is not None or score.score == 0.0
    for multilingual in (False, True):
        score = benchmarks.tydiqa_score(response, ["some gold answer", "1869"], multilingual=multilingual)
        assert 0.0 <= score.exact_match <= score.f1 <= 1.0
        # A target scores 1 against itself, whatever it is, and F1 has no sides.
        assert benchmarks.tydiqa_score(response, [response], multilingual=multilingual)[:2] == (1.0, 1.0)
        forward = benchmarks.tydiqa_score(response, ["the answer is"], multilingual=multilingual)
        assert forward.f1 == benchmarks.tydiqa_score("the answer is", [response], multilingual=multilingual).f1


def test_long_responses_take_no_time():
    targets = {"snarks": "(A)", "dyck_languages": "]", "object_counting": "3", "navigate": "No"}
    for part in ("1", "1,", "-", "123,456", ".", " \n", "} ", "the answer is ", "So the answer is (", "Q", "\t"):
        text, started = part * 30_000 + "!", time.process_time()
        benchmarks.gsm8k_score(text, "1")
        for task, target in targets.items():
            benchmarks.bbh_score(task, text, target)
            benchmarks.bbh_score(task, "the answer is " + text, target)
        assert time.process_time() - started < 4, part  # about 0.1; a quadratic pattern takes half a minute


# summaries


def test_summary_by_hand():
    # Wilson's interval of 0 of 20 is 0 to 0.1611 (Newcombe 1998).
    scores = [Score(0.0, None)] * 5 + [Score(0.0, "3")] * 15
    summary = benchmarks.summarize(scores)
    assert summary | {"high": round(summary["high"], 4)} == {
        "accuracy": 0.0, "low": 0.0, "high": 0.1611, "n": 20, "unparsed": 5,
    }  # fmt: skip
    assert benchmarks.summarize([Score(1.0, "3"), Score(0.0, "4")])["accuracy"] == 0.5
    with pytest.raises(ValueError, match="no scores"):
        benchmarks.summarize([])


def test_tasks_count_alike_whatever_their_sizes_are():
    right, wrong, none = Score(1.0, "a"), Score(0.0, "b"), Score(0.0, None)
    summary = benchmarks.summarize_tasks({"x": [right] * 30 + [wrong] * 90, "y": [right] * 30 + [none] * 10})
    assert summary["accuracy"] == 0.5  # of 0.25 and 0.75; of all examples 60 / 160
    assert (summary["n"], summary["unparsed"]) == (160, 10)
    assert summary["tasks"]["y"] == benchmarks.summarize([right] * 30 + [none] * 10)
    half = 1.959964 * np.sqrt(0.1875 / 120 + 0.1875 / 40) / 2
    assert (summary["low"], summary["high"]) == (
        pytest.approx(0.5 - half, abs=0.01),
        pytest.approx(0.5 + half, abs=0.01),
    )
    json.dumps(summary, allow_nan=False)
    for wrong_scores, message in (({}, "no tasks"), ({"x": [right], "y": []}, "for the tasks y")):
        with pytest.raises(ValueError, match=message):
            benchmarks.summarize_tasks(wrong_scores)


def test_languages_count_alike():
    scores = {
        "finnish": [TextScore(1.0, 1.0, "a"), TextScore(0.0, 0.0, None)] * 50,
        "thai": [TextScore(0.25, 0.0, "b")] * 50,
    }
    summary = benchmarks.summarize_languages(scores)
    assert (summary["f1"], summary["exact_match"], summary["n"], summary["unparsed"]) == (0.375, 0.25, 150, 50)
    assert summary["languages"]["thai"] == {"f1": 0.25, "exact_match": 0.0, "n": 50, "unparsed": 0}
    half = 1.959964 * np.sqrt(0.25 / 100) / 2  # only Finnish varies
    assert (summary["low"], summary["high"]) == (
        pytest.approx(0.375 - half, abs=0.006),
        pytest.approx(0.375 + half, abs=0.006),
    )
    json.dumps(summary, allow_nan=False)
    for wrong, message in (({}, "no languages"), ({"x": []}, "for the languages x")):
        with pytest.raises(ValueError, match=message):
            benchmarks.summarize_languages(wrong)
