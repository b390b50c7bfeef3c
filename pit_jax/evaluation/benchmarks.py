"""Scores of free-form answers to GSM8K, BIG-Bench Hard and TyDi QA (SRT Table 3; protocol of Tulu 2, appendix).

One function per benchmark scores one response, and says what it took as the answer; None where it found none, which is
wrong and is counted. Scores are in 0..1.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pit_jax.evaluation import agreement


class Score(NamedTuple):
    """Of one response."""

    score: float
    """1.0 for the right answer, else 0.0."""
    answer: str | None
    """What the response was taken to answer, in one form for all ways to write it; None where nothing was found."""


class TextScore(NamedTuple):
    """Of one response, against the best of several targets."""

    f1: float
    exact_match: float
    answer: str | None
    """The normalised response; None where nothing is left of it."""


# A minus belongs to the number unless it stands right behind a letter, a digit or a bracket: 5-3 is a difference.
_NUMBER = re.compile(
    r"((?<![\w)\]}])-)?(?:[$€£](-)?)?([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]*\.[0-9]+|[0-9]+)"
)


def gsm8k_score(response: str, target: str) -> Score:
    """GSM8K exact match: is the response's number the target's?

    The number is the one behind the last ####, as the data set's own answers have it, else the last one in the response
    (Tulu 2). Numbers are compared by value: 1,000 is 1000.00, and $5 and 5% are 5. This is stricter than Tulu 2's
    comparison of text without punctuation, to which 2.5 is 25 and -3 is 3.

    Args:
      response: the model's answer.
      target: the data set's answer, with or without the steps before ####.

    Raises:
      ValueError: where the target holds no number.
    """
    expected = last_number(target)
    if expected is None:
        raise ValueError(f"the target {target[-60:]!r} holds no number.")
    found = last_number(response)
    return Score(float(found == expected), found)


def last_number(text: str) -> str | None:
    """The number behind the last ####, else the last one of the text, in plain digits: "-1234.5"; None without one."""
    if "####" in text and (found := _numbers(text.rpartition("####")[2])):
        return found[0]
    return found[-1] if (found := _numbers(text)) else None


# Big-Bench Hard

_OPTION = re.compile(r"(?:option\s+)?(?:\(([a-z])\)|([a-z])(?=\s*[).:,;]|$)\)?)", re.IGNORECASE)
_CLOSERS = re.compile(r"[)\]}>](?:[\s,]*[)\]}>])*")
_MARKUP = "*_`\"'$"
"""What models put around an answer to set it off."""

BBH_KINDS = {
    "boolean_expressions": ("true", "false"),
    "causal_judgement": ("yes", "no"),
    "date_understanding": "option",
    "disambiguation_qa": "option",
    "dyck_languages": "closers",
    "formal_fallacies": ("valid", "invalid"),
    "geometric_shapes": "option",
    "hyperbaton": "option",
    "logical_deduction_five_objects": "option",
    "logical_deduction_seven_objects": "option",
    "logical_deduction_three_objects": "option",
    "movie_recommendation": "option",
    "multistep_arithmetic_two": "number",
    "navigate": ("yes", "no"),
    "object_counting": "number",
    "penguins_in_a_table": "option",
    "reasoning_about_colored_objects": "option",
    "ruin_names": "option",
    "salient_translation_error_detection": "option",
    "snarks": "option",
    "sports_understanding": ("yes", "no"),
    "temporal_sequences": "option",
    "tracking_shuffled_objects_five_objects": "option",
    "tracking_shuffled_objects_seven_objects": "option",
    "tracking_shuffled_objects_three_objects": "option",
    "web_of_lies": ("yes", "no"),
    "word_sorting": "words",
}
"""Task -> form of its answers; a tuple holds the words that are answers."""


def bbh_score(task: str, response: str, target: str) -> Score:
    """BIG-Bench Hard exact match, by the form of the task's answers.

    The answer is what stands behind the last "So the answer is", else behind the last "the answer is", up to the end of
    the line; a response with neither is an answer if all of it is one, or if it opens with an option in brackets. What
    follows a line that opens with "Q:" is the model's own next question and is left out. (Tulu 2 takes the first such
    phrase; a model that corrects itself means the last.)

    Forms: an option counts by its letter, "(B)", "B." or "(B) 12/01/1986"; yes, no, true, false, valid and invalid in
    any case; numbers by value; sorted words, up to a period, without regard to case and commas; closing brackets
    without regard to spaces. (Tulu 2's comparison without punctuation takes any brackets for any others.)

    Args:
      task: a key of BBH_KINDS.
      response: the model's answer.
      target: of the data set. Three rows of the data name an option's text instead of its letter; there the texts are
        compared.

    Raises:
      ValueError: where the task is unknown, or the target has not the form of its answers.
    """
    if task not in BBH_KINDS:
        raise ValueError(f"task {task!r} is not one of BIG-Bench Hard: {', '.join(BBH_KINDS)}.")
    kind = BBH_KINDS[task]
    expected = _bbh_answer(kind, target)
    if expected is None and kind == "option":
        kind, expected = "text", _bbh_answer("text", target)
    if expected is None:
        raise ValueError(f"the target {target!r} is no answer to a question of the task {task!r}.")
    found = _bbh_answer_in(kind, response)
    return Score(float(found == expected), found)


def _bbh_answer_in(kind, response: str) -> str | None:
    response = re.split(r"^[ \t]*Q:", response, maxsplit=1, flags=re.MULTILINE)[0]
    for phrase in (r"\bso the answer is\b", r"\bthe answer is\b"):
        found = list(re.finditer(phrase, response, re.IGNORECASE))
        if found:
            return _bbh_answer(kind, response[found[-1].end() :], behind_phrase=True)
    return _bbh_answer(kind, response)


def _bbh_answer(kind, text: str, *, behind_phrase: bool = False) -> str | None:
    """The answer at the start of the text; without a phrase before it, the text must hold nothing else."""
    text = text.lstrip(" \t\r\n:" + _MARKUP).split("\n", 1)[0].rstrip(" \t\r.!" + _MARKUP)
    if kind in ("words", "text"):
        return " ".join(text.split(". ")[0].casefold().replace(",", " ").split()) or None
    if kind == "number":
        found = _numbers(text)
        return found[0] if found and (behind_phrase or len(text.split()) == 1) else None
    if kind == "option":
        found = _OPTION.match(text)
        answer = f"({(found[1] or found[2]).upper()})" if found else None
        behind_phrase = behind_phrase or bool(found and found[1])  # "(B) because ..." is an answer, "A, then B" is none
    elif kind == "closers":
        found = _CLOSERS.match(text)
        answer = " ".join(re.sub(r"[\s,]", "", found[0])) if found else None
    else:
        found = re.match(r"[a-z]+", text, re.IGNORECASE)
        answer = found[0].casefold() if found and found[0].casefold() in kind else None
    return answer if answer and (behind_phrase or found.end() == len(text)) else None


# TyDi QA


def tydiqa_score(response: str, targets: Sequence[str], *, multilingual: bool = False) -> TextScore:
    """F1 and exact match of SQuAD, the best over the targets: TyDi QA's gold passage task, and Tulu 2.

    F1 is over words as multisets: 2 * shared / (words of the response + words of the target).

    Args:
      response: the model's answer.
      targets: the annotated answers.
      multilingual: see `normalize_answer`. False gives the numbers that papers report.

    Raises:
      ValueError: where there are no targets.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets={targets!r}: a list of at least one annotated answer is asked for.")
    answer = normalize_answer(response, multilingual=multilingual)
    golds = [normalize_answer(target, multilingual=multilingual) for target in targets]
    f1 = max(_f1(answer.split(), gold.split()) for gold in golds)
    return TextScore(f1, float(answer in golds), answer or None)


def normalize_answer(text: str, *, multilingual: bool = False) -> str:
    """Lower case, without punctuation, English articles and needless spaces.

    SQuAD's form, which TyDi QA's gold passage task uses for all languages, knows only the punctuation of ASCII, so that
    the Arabic comma or the Bengali danda stays part of a word. With `multilingual` all punctuation of Unicode goes, and
    texts are first brought to one form (NFKC), in which a letter has one way to be written.
    """
    if multilingual:
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


# summaries


def summarize(scores: Sequence[Score], *, level: float = 0.95) -> dict:
    """Accuracy with its Wilson interval.

    Returns:
      {"accuracy", "low", "high", "n", "unparsed"}; unparsed counts the responses without an answer, which are wrong.

    Raises:
      ValueError: where there are no scores.
    """
    if not scores:
        raise ValueError("there are no scores: a summary needs at least one.")
    values = np.array([s.score for s in scores])
    return agreement.accuracy(values, np.full(values.size, 0.5), level=level) | {"unparsed": _unparsed(scores)}


def summarize_tasks(
    scores: Mapping[str, Sequence[Score]], *, num_resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> dict:
    """BIG-Bench Hard: accuracy as the mean over tasks, whatever their sizes are.

    Args:
      scores: task -> scores of its examples.
      num_resamples: of the bootstrap, which draws examples within each task.
      seed: of the resamples.
      level: coverage of the intervals.

    Returns:
      {"accuracy", "low", "high", "n", "unparsed", "tasks"}; tasks holds the `summarize` of each.

    Raises:
      ValueError: where there are no tasks, or a task has no scores.
    """
    if not scores:
        raise ValueError("there are no tasks: a summary needs at least one.")
    empty = [task for task, of_task in scores.items() if not of_task]
    if empty:
        raise ValueError(f"there are no scores for the tasks {', '.join(empty)}.")
    tasks = {task: summarize(of_task, level=level) for task, of_task in scores.items()}
    rng = np.random.default_rng(seed)
    # Scores are 0 or 1, so a resample of a task is a binomial count.
    means = [rng.binomial(t["n"], t["accuracy"], size=num_resamples) / t["n"] for t in tasks.values()]
    return _with_interval(
        "accuracy", np.mean([t["accuracy"] for t in tasks.values()]), np.mean(means, axis=0), level
    ) | {
        "n": sum(t["n"] for t in tasks.values()),
        "unparsed": sum(t["unparsed"] for t in tasks.values()),
        "tasks": tasks,
    }


def summarize_languages(
    scores: Mapping[str, Sequence[TextScore]], *, num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict:
    """TyDi QA: F1 and exact match as means over languages, as Tulu 2 takes them; one language is a mean as well.

    Args:
      scores: language -> scores of its examples.
      num_resamples: of the bootstrap, which draws examples within each language.
      seed: of the resamples.
      level: coverage of low and high, which bound F1.

    Returns:
      {"f1", "low", "high", "exact_match", "n", "unparsed", "languages"}; languages holds {"f1", "exact_match", "n",
      "unparsed"} of each.

    Raises:
      ValueError: where there are no languages, or a language has no scores.
    """
    if not scores:
        raise ValueError("there are no languages: a summary needs at least one.")
    empty = [language for language, of_language in scores.items() if not of_language]
    if empty:
        raise ValueError(f"there are no scores for the languages {', '.join(empty)}.")
    rng = np.random.default_rng(seed)
    languages, means = {}, []
    for language, of_language in scores.items():
        f1 = np.array([s.f1 for s in of_language])
        languages[language] = {
            "f1": float(f1.mean()),
            "exact_match": float(np.mean([s.exact_match for s in of_language])),
            "n": f1.size,
            "unparsed": _unparsed(of_language),
        }
        means.append([f1[rng.integers(0, f1.size, f1.size)].mean() for _ in range(num_resamples)])
    mean = lambda key: float(np.mean([row[key] for row in languages.values()]))  # noqa: E731
    return _with_interval("f1", mean("f1"), np.mean(means, axis=0), level) | {
        "exact_match": mean("exact_match"),
        "n": sum(row["n"] for row in languages.values()),
        "unparsed": sum(row["unparsed"] for row in languages.values()),
        "languages": languages,
    }


def _numbers(text: str) -> list[str]:
    return [_plain(bool(m[1] or m[2]), m[3]) for m in _NUMBER.finditer(text.replace("\u2212", "-"))]


def _plain(negative: bool, digits: str) -> str:
    """1,234.50 -> 1234.5; -0 -> 0. Equal numbers are equal text, however long they are."""
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    text = f"{whole}.{fraction}" if fraction else whole
    return f"-{text}" if negative and text != "0" else text


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)  # both empty: a target of punctuation or articles only, and a response of the same
    shared = sum((collections.Counter(answer) & collections.Counter(gold)).values())
    return 2 * shared / (len(answer) + len(gold))


def _unparsed(scores) -> int:
    return sum(s.answer is None for s in scores)


def _with_interval(name: str, value: float, resampled: np.ndarray, level: float) -> dict:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level} must be between 0 and 1.")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return {name: float(value), "low": float(low), "high": float(high)}
