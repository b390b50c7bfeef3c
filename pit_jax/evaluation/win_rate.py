"""Win rate, lose rate and their difference (delta) of two sets of answers to the same prompts (PIT section 4.4)."""

from typing import NamedTuple

import numpy as np

from pit_jax.types import Array


class Verdicts(NamedTuple):
    """Who wins each prompt.

    Attributes:
      outcome: [n] int8: 1 the first is better, -1 the second, 0 neither or no verdict.
      mask: [n] bool, false where there is no verdict.
      asked: [n] bool, false for prompts that the judge was not asked about.
    """

    outcome: np.ndarray
    mask: np.ndarray
    asked: np.ndarray


def compare(scores_a: Array, scores_b: Array, *, tie_band: tuple[float, float] | None = None) -> np.ndarray:
    """Who wins each prompt.

    Args:
      scores_a: [n], the judge's score of answer a.
      scores_b: [n], of answer b to the same prompt.
      tie_band: (low, high): a tie where sigma(r_a - r_b) is in [low, high], for the scores of a Bradley-Terry reward
        model; (0.45, 0.55) in section 4.4. None: a tie where the scores are equal.

    Returns:
      [n] int8: 1 where a wins, -1 where b wins, 0 for a tie.

    Raises:
      ValueError: where the shapes differ or are not [n], a score is NaN, or the band does not hold 0.5.
    """
    a, b = _scores("scores_a", scores_a), _scores("scores_b", scores_b)
    if a.shape != b.shape:
        raise ValueError(f"scores_a has {a.shape[0]} entries and scores_b {b.shape[0]}: one score per prompt in both.")
    if tie_band is None:
        return np.greater(a, b).astype(np.int8) - np.less(a, b).astype(np.int8)
    low, high = tie_band
    if not 0.0 <= low <= 0.5 <= high <= 1.0:
        raise ValueError(
            f"tie_band={tie_band} does not hold 0.5, so equal scores would not tie; the paper's is 0.45, 0.55."
        )
    probability = np.exp(-np.logaddexp(0.0, b - a))  # sigma(a - b), without overflow
    return (probability > high).astype(np.int8) - (probability < low).astype(np.int8)


def summarize(outcomes: Array, *, seed: int = 0, num_resamples: int = 10_000, level: float = 0.95) -> dict:
    """Shares of wins, losses and ties, and delta with a percentile bootstrap interval over prompts.

    A resample of n prompts holds multinomial numbers of wins, losses and ties, so it is drawn as three counts.

    Args:
      outcomes: [n] of 1, 0, -1, as `compare` returns them.
      seed: of the resamples.
      num_resamples: their number.
      level: coverage of the interval.

    Returns:
      {"win", "lose", "tie", "delta", "low", "high", "n"}: shares in 0..1; low and high bound delta = win - lose.

    Raises:
      ValueError: where there are no outcomes, or one is not 1, 0 or -1.
    """
    outcomes = np.asarray(outcomes)
    if outcomes.ndim != 1 or not outcomes.size:
        raise ValueError(
            f"outcomes have the shape {outcomes.shape}: a win rate needs at least one prompt, in one axis."
        )
    if not np.isin(outcomes, (-1, 0, 1)).all():
        raise ValueError(f"outcomes hold {np.setdiff1d(outcomes, (-1, 0, 1))[:5]}: each is 1, 0 or -1, see `compare`.")
    if not 0.0 < level < 1.0 or num_resamples < 1:
        raise ValueError(f"level={level} must be between 0 and 1, and num_resamples={num_resamples} at least 1.")
    n = outcomes.size
    win, lose = np.count_nonzero(outcomes == 1), np.count_nonzero(outcomes == -1)
    tie = n - win - lose
    counts = np.random.default_rng(seed).multinomial(n, np.array([win, lose, tie]) / n, size=num_resamples)
    deltas = (counts[:, 0] - counts[:, 1]) / n
    low, high = np.quantile(deltas, [(1 - level) / 2, (1 + level) / 2])
    shares = {"win": win / n, "lose": lose / n, "tie": tie / n, "delta": (win - lose) / n}
    return {name: float(x) for name, x in shares.items()} | {"low": float(low), "high": float(high), "n": n}


def _scores(name: str, scores: Array) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1:
        raise ValueError(f"{name} has the shape {scores.shape}: one score per prompt is asked for.")
    if np.isnan(scores).any():
        raise ValueError(
            f"{name} is NaN for prompts {np.flatnonzero(np.isnan(scores))[:5].tolist()}: nobody wins there."
        )
    return scores
