"""How often a reward model agrees with the labels, and whether a gap model uses both of its responses.

PIT appendix G (Table 4), Equation 1 and Figure 2.
"""

import math
import statistics

import numpy as np

from pit_jax.types import Array

PAIRING_NAMES = ("chosen_rejected", "chosen_chosen", "rejected_rejected", "rejected_chosen")
"""(y_1, y_2) of r_gap(x, y_1, y_2) in words, in the order of `types.GAP_PAIRINGS`."""

QUANTILE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def accuracy(first_scores: Array, second_scores: Array, *, level: float = 0.95) -> dict:
    """Share of pairs whose better side is strictly ahead: the criterion of appendix G.

    R_PIT: first r_gap(x, y_w, y_l), second r_gap(x, y_l, y_w). R_P: first r(x, y_w), second r(x, y_l). A tie is an
    error.

    Args:
      first_scores: [n], of the side that the label prefers.
      second_scores: [n], of the other.
      level: coverage of the Wilson interval.

    Returns:
      {"accuracy", "low", "high", "n"}.

    Raises:
      ValueError: where there are no pairs, the shapes differ or a score is NaN.
    """
    first, second = _columns(first_scores=first_scores, second_scores=second_scores)
    if not first.size:
        raise ValueError("there are no pairs: an accuracy needs at least one.")
    return _share(float(np.mean(first > second)), first.size, level)


def pair_accuracy_excluding_ties(
    predicted_margin: Array,
    true_margin: Array,
    *,
    groups: Array | None = None,
    level: float = 0.95,
) -> dict:
    """Share of pairs that the margin orders as the truth does, among those where the truth is not a tie.

    Args:
      predicted_margin: [n], score of the first response minus that of the second; 0 is an error.
      true_margin: [n], the same from the labels; pairs with 0 are left out.
      groups: [n], the prompt of each pair. Several pairs of one prompt say less than pairs of several prompts, so the
        interval counts prompts: it is as wide as if all pairs of a prompt were right or wrong together. None: pairs.
      level: coverage of the Wilson interval.

    Returns:
      {"accuracy", "low", "high", "n"}; n is the number of pairs that count. Where it is 0 the other values are None.

    Raises:
      ValueError: where the shapes differ or a margin is NaN.
    """
    predicted, true = _columns(predicted_margin=predicted_margin, true_margin=true_margin)
    counts = true != 0
    if not counts.any():
        return {"accuracy": None, "low": None, "high": None, "n": 0}
    hits = (np.sign(predicted) == np.sign(true))[counts]
    num_prompts = hits.size if groups is None else np.unique(np.asarray(groups)[counts]).size
    return _share(float(np.mean(hits)), num_prompts, level) | {"n": int(hits.size)}


def gap_diagnostics(wl: Array, ww: Array, ll: Array, lw: Array) -> dict:
    """Whether r_gap has the shape that Equation 1 asks for, from the scores of the pairings of `types.GAP_PAIRINGS`.

    Args:
      wl: [n], r_gap(x, y_w, y_l).
      ww: [n], r_gap(x, y_w, y_w).
      ll: [n], r_gap(x, y_l, y_l).
      lw: [n], r_gap(x, y_l, y_w).

    Returns:
      gaps: pairing -> mean gap.
      order_holds: whether the means obey Equation 1, wl > ww and ll > lw.
      quantiles: pairing -> gaps at `quantile_levels`, the distributions of Figure 2.
      quantile_levels: in 0..1.
      antisymmetry_error: mean |wl + lw - ww - ll| / std(wl - lw). It is 0 for r_gap = f(x, y_1) - f(x, y_2) + c(x), a
        difference of scores; None where the standard deviation is 0.
      diagonal_offset: mean of ww and ll: the gap of equal responses. The paper sees it below 0 (section 4.3): a copy of
        ref_response is punished.

    Raises:
      ValueError: where there are no gaps, the shapes differ or a gap is NaN.
    """
    columns = _columns(wl=wl, ww=ww, ll=ll, lw=lw)
    if not columns[0].size:
        raise ValueError("there are no gaps: the diagnostics need at least one row.")
    wl, ww, ll, lw = columns
    means = {name: float(np.mean(gaps)) for name, gaps in zip(PAIRING_NAMES, columns, strict=True)}
    diagonal = means["chosen_chosen"], means["rejected_rejected"]
    return {
        "gaps": means,
        "order_holds": means["chosen_rejected"] > max(diagonal) and min(diagonal) > means["rejected_chosen"],
        "quantile_levels": list(QUANTILE_LEVELS),
        "quantiles": {
            name: np.quantile(gaps, QUANTILE_LEVELS).tolist() for name, gaps in zip(PAIRING_NAMES, columns, strict=True)
        },
        "antisymmetry_error": _ratio(np.mean(np.abs(wl + lw - ww - ll)), np.std(wl - lw)),
        "diagonal_offset": sum(diagonal) / 2,
    }


def shortcut_probe(wl: Array, lw: Array, shuffled_wl: Array, shuffled_lw: Array) -> dict:
    """What r_gap loses when ref_response comes from another prompt.

    A model that reads y_1 alone can have the full accuracy; its gaps do not move here.

    Args:
      wl: [n], r_gap(x, y_w, y_l).
      lw: [n], r_gap(x, y_l, y_w).
      shuffled_wl: [n], r_gap(x, y_w, y_l of another prompt).
      shuffled_lw: [n], r_gap(x, y_l, y_w of another prompt).

    Returns:
      change: mean |gap - shuffled gap| / std of the gaps; 0 for a model that ignores ref_response, None where the
        standard deviation is 0.
      accuracy, shuffled_accuracy: shares of rows where the gap of y_w is strictly ahead.
      accuracy_change: shuffled_accuracy - accuracy.

    Raises:
      ValueError: where there are no gaps, the shapes differ or a gap is NaN.
    """
    wl, lw, shuffled_wl, shuffled_lw = _columns(wl=wl, lw=lw, shuffled_wl=shuffled_wl, shuffled_lw=shuffled_lw)
    if not wl.size:
        raise ValueError("there are no gaps: the probe needs at least one row.")
    gaps, shuffled = np.concatenate([wl, lw]), np.concatenate([shuffled_wl, shuffled_lw])
    before, after = float(np.mean(wl > lw)), float(np.mean(shuffled_wl > shuffled_lw))
    return {
        "change": _ratio(np.mean(np.abs(gaps - shuffled)), np.std(gaps)),
        "accuracy": before,
        "shuffled_accuracy": after,
        "accuracy_change": after - before,
    }


def _columns(**arrays: Array) -> list[np.ndarray]:
    columns = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    shapes = {name: x.shape for name, x in columns.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"one number per row is asked for, the same rows everywhere; the shapes are {shapes}.")
    for name, x in columns.items():
        if np.isnan(x).any():
            raise ValueError(f"{name} is NaN in rows {np.flatnonzero(np.isnan(x))[:5].tolist()}.")
    return list(columns.values())


def _ratio(numerator, denominator) -> float | None:
    return float(numerator / denominator) if denominator > 0 else None


def _share(p: float, n: int, level: float) -> dict:
    """A share with its Wilson score interval, which stays in 0..1 and is not empty where all pairs agree."""
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {
        "accuracy": p,
        "low": max(0.0, min(center - half, p)),
        "high": min(1.0, max(center + half, p)),
        "n": int(n),
    }
