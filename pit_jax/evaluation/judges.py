"""Judges behind one protocol: who wins each prompt, of two sets of answers (PIT section 4.3).

A judge that scores answers one by one (the verifier, a reward model) compares scores; one that looks at pairs (R_PIT, a
language model, people) sees each pair in both orders, or in a shuffled one. What a judge has said is kept on disk.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pit_jax.data import verifier
from pit_jax.evaluation import store, win_rate
from pit_jax.evaluation.answers import model_digest
from pit_jax.evaluation.store import AnswerSet, Spec
from pit_jax.pipelines import pit
from pit_jax.types import PreferenceExample

TIE_BAND = (0.45, 0.55)
"""sigma(r1 - r2) within it is a tie for a reward model (section 4.4)."""


class Verdicts(NamedTuple):
    """Who wins each prompt.

    Attributes:
      outcome: [n] int8: 1 the first is better, -1 the second, 0 neither.
      mask: [n] bool, false where the judge gave no verdict.
    """

    outcome: np.ndarray
    mask: np.ndarray


class Judge(NamedTuple):
    """One who compares sets of answers to the same prompts.

    Attributes:
      name: in tables.
      compare: (first, second) -> Verdicts; swapping the two changes the sign of each outcome and nothing else.
      scores: answers -> [n] float64; None where the judge looks at pairs only.
      details: (first, second) -> all that it said of pairs; None where it scores answers one by one.
      comparisons: names of the comparisons of Tables 1 and 2 that it judges, and none elsewhere; None: all, everywhere.
    """

    name: str
    compare: Callable[[AnswerSet, AnswerSet], Verdicts]
    scores: Callable[[AnswerSet], np.ndarray] | None = None
    details: Callable[[AnswerSet, AnswerSet], dict[str, Any]] | None = None
    comparisons: tuple[str, ...] | None = None


def by_scores(
    name: str,
    root: Path,
    spec: Spec,
    score: Callable[[AnswerSet], Sequence[float]],
    tie_band: tuple[float, float] | None,
) -> Judge:
    """A judge that compares scores.

    Args:
      name: of the judge.
      root: folder of the scores of a split.
      spec: what the judge is made from.
      score: of each answer of a set.
      tie_band: see `win_rate.compare`.
    """
    known: dict[str, np.ndarray] = {}

    def scores(answers: AnswerSet) -> np.ndarray:
        if answers.name not in known:
            of = spec | {"answers": store.digest(answers.spec)}
            make = lambda: {"scores": [float(x) for x in score(answers)]}  # noqa: E731
            path = root / "scores" / name / f"{answers.name}.json"
            known[answers.name] = np.asarray(store.values(path, of, make)["scores"])
        return known[answers.name]

    def compare(first: AnswerSet, second: AnswerSet) -> Verdicts:
        outcome = win_rate.compare(scores(first), scores(second), tie_band=tie_band)
        return Verdicts(outcome, np.ones(outcome.shape, np.bool_))

    return Judge(name, compare, scores)


def by_pairs(
    name: str,
    root: Path,
    spec: Spec,
    judge: Callable[[AnswerSet, AnswerSet], dict[str, Any]],
) -> Judge:
    """A judge that looks at pairs; its verdicts on (b, a) are those on (a, b) with the other sign.

    Args:
      name: of the judge.
      root: folder of the verdicts of a split.
      spec: what the judge is made from.
      judge: (first, second) -> {"outcome": 1, 0, -1 or None per prompt, and whatever else is worth keeping}.
    """

    def look(first: AnswerSet, second: AnswerSet) -> tuple[dict[str, Any], int]:
        path = lambda a, b: root / "verdicts" / name / f"{a.name}_vs_{b.name}.json"  # noqa: E731
        of = lambda a, b: spec | {"first": store.digest(a.spec), "second": store.digest(b.spec)}  # noqa: E731
        if not path(first, second).exists() and path(second, first).exists():
            return store.values(path(second, first), of(second, first), lambda: judge(second, first)), -1
        return store.values(path(first, second), of(first, second), lambda: judge(first, second)), 1

    def compare(first: AnswerSet, second: AnswerSet) -> Verdicts:
        found, sign = look(first, second)
        mask = np.asarray([x is not None for x in found["outcome"]], np.bool_)
        return Verdicts(np.asarray([sign * (x or 0) for x in found["outcome"]], np.int8), mask)

    return Judge(name, compare, details=lambda first, second: look(first, second)[0])


# ----------------------------------------------------------------------------------------------------------- our judges


def verifier_judge(root: Path, rows: Sequence[PreferenceExample]) -> Judge:
    """The share of requirements that an answer meets."""
    requirements = [[[r.kind, r.value] for r in row.requirements] for row in rows]

    def score(answers: AnswerSet) -> list[float]:
        return [verifier.share_met(row.requirements, y) for row, y in zip(rows, answers.texts, strict=True)]

    return by_scores("verifier", root, {"judge": "verifier", "requirements": store.digest(requirements)}, score, None)


def reward_model_judge(context: pit.Context, name: str, root: Path, rows: Sequence[PreferenceExample]) -> Judge:
    """R_P, or the evaluator, which was trained on all folds and is used for nothing else."""
    e = context.encoder

    def score(answers: AnswerSet) -> np.ndarray:
        groups = [[[*e.policy_prompt(row.prompt), *y, e.tokenizer.eos_id]] for row, y in zip(rows, answers.ids)]  # noqa: B905
        model = pit.model_of(context, name), pit.load_model(context, name)
        return pit.score_groups(*model, groups, batch_size=256)[:, 0]

    return by_scores(name, root, {"judge": name, "model": model_digest(context, name)}, score, TIE_BAND)


def gap_judge(context: pit.Context, root: Path, rows: Sequence[PreferenceExample]) -> Judge:
    """R_PIT, asked in both orders: y_1 is better where r_gap(x, y_1, y_2) > r_gap(x, y_2, y_1) (appendix G)."""

    def judge(first: AnswerSet, second: AnswerSet) -> dict[str, Any]:
        sides = zip(rows, first.ids, second.ids, strict=True)
        triples = [triple for row, a, b in sides for triple in ((row.prompt, a, b), (row.prompt, b, a))]
        gaps = pit.gap_scorer(context)(triples, pairings=2).astype(np.float64)
        outcome = win_rate.compare(gaps[:, 0] / 2, gaps[:, 1] / 2, tie_band=TIE_BAND)
        return {"outcome": outcome.tolist(), "gap": gaps[:, 0].tolist(), "swapped_gap": gaps[:, 1].tolist()}

    stage = "r_p" if context.config.r_pit.loss == "r_p_difference" else "r_pit"
    return by_pairs("r_pit", root, {"judge": "r_pit", "model": model_digest(context, stage)}, judge)
