"""Losses on pairs of responses: Bradley-Terry (R_P), the gap loss (R_PIT, Equation 2) and DPO.

A row is one pair, and the loss is the mean over rows: sum / weight of `metrics["loss"]`. An accuracy counts a row only
where the better side is strictly ahead; a tie is an error. Rows that a mask drops have loss 0 and no weight.
"""

import chex
import jax
import jax.numpy as jnp

from pit_jax.losses.masked import at_least_float32, kept, row_metric
from pit_jax.types import GAP_PAIRINGS, Array, Metrics


def bradley_terry(chosen_scores: Array, rejected_scores: Array, mask: Array | None = None) -> tuple[jax.Array, Metrics]:
    """L_RM_P = -log sigmoid(r_w - r_l) (PIT section 3.3).

    Args:
      chosen_scores: [B], r_w = R_P(x, y_w).
      rejected_scores: [B], r_l = R_P(x, y_l).
      mask: [B] bool, rows that count; None: all.

    Returns:
      (loss [B], metrics: loss, accuracy, margin, chosen_score, rejected_score).
    """
    chex.assert_rank([chosen_scores, rejected_scores], 1)
    chex.assert_equal_shape([chosen_scores, rejected_scores])
    chex.assert_type([chosen_scores, rejected_scores], float)
    chosen_scores, rejected_scores = at_least_float32(chosen_scores), at_least_float32(rejected_scores)
    margin = chosen_scores - rejected_scores
    loss = kept(-jax.nn.log_sigmoid(margin), mask)
    return loss, {
        "loss": row_metric(loss, mask),
        "accuracy": row_metric(margin > 0, mask),
        "margin": row_metric(margin, mask),
        "chosen_score": row_metric(chosen_scores, mask),
        "rejected_score": row_metric(rejected_scores, mask),
    }


def _gap_metrics(loss: Array, scores: Array, mask: Array | None) -> Metrics:
    gaps = {"".join(pairing): scores[:, i] for i, pairing in enumerate(GAP_PAIRINGS)}
    metrics = {f"gap_{name}": row_metric(gap, mask) for name, gap in gaps.items()}
    metrics["loss"] = row_metric(loss, mask)
    metrics["accuracy"] = row_metric(gaps["wl"] > gaps["lw"], mask)
    # Equation 1 asks for the whole order; a model that ignores y_2 has the right accuracy and wl == ww here.
    diagonal = jnp.maximum(gaps["ww"], gaps["ll"]), jnp.minimum(gaps["ww"], gaps["ll"])
    metrics["order_accuracy"] = row_metric((gaps["wl"] > diagonal[0]) & (diagonal[1] > gaps["lw"]), mask)
    return metrics


def gap_loss(scores: Array, mask: Array | None = None, *, diagonal: bool = True) -> tuple[jax.Array, Metrics]:
    """L_RM_PIT of PIT Equation 2, with log s for log sigmoid and wl for r_gap(x, y_w, y_l):

        -[log s(wl - ww) + log s(wl - ll) + log s(wl - lw) + log s(ww - lw) + log s(ll - lw)]

    Args:
      scores: [B, 4], r_gap of the pairings in the order of `GAP_PAIRINGS`: wl, ww, ll, lw.
      mask: [B] bool, rows that count; None: all.
      diagonal: False keeps only -log s(wl - lw), the first objective of appendix C: a model can minimise it while it
        ignores y_2.

    Returns:
      (loss [B], metrics: loss, accuracy (wl > lw), order_accuracy (wl > ww, ll > lw), gap_wl, gap_ww, gap_ll, gap_lw).
    """
    chex.assert_shape(scores, (None, len(GAP_PAIRINGS)))
    chex.assert_type(scores, float)
    scores = at_least_float32(scores)
    wl, ww, ll, lw = (scores[:, i] for i in range(len(GAP_PAIRINGS)))
    differences = [wl - ww, wl - ll, wl - lw, ww - lw, ll - lw] if diagonal else [wl - lw]
    loss = kept(-sum(jax.nn.log_sigmoid(difference) for difference in differences), mask)
    return loss, _gap_metrics(loss, scores, mask)


def gap_mse(scores: Array, mask: Array | None = None) -> tuple[jax.Array, Metrics]:
    """Mean squared error to r_gap = 1, 0.5, 0.5, 0 for wl, ww, ll, lw (PIT appendix C, the pointwise option).

    Args:
      scores: [B, 4], in the order of `GAP_PAIRINGS`.
      mask: [B] bool, rows that count; None: all.

    Returns:
      (loss [B], metrics as in `gap_loss`).
    """
    chex.assert_shape(scores, (None, len(GAP_PAIRINGS)))
    chex.assert_type(scores, float)
    scores = at_least_float32(scores)
    targets = jnp.array([1.0, 0.5, 0.5, 0.0], scores.dtype)
    loss = kept(jnp.mean(jnp.square(scores - targets), axis=1), mask)
    return loss, _gap_metrics(loss, scores, mask)


def dpo_loss(
    log_probs: Array,
    ref_log_probs: Array,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Direct preference optimization (Rafailov et al. 2023, Equation 7), with its reward r_i = beta log(pi_i / ref_i):

        h = log(pi_w / ref_w) - log(pi_l / ref_l)
        sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing (Mitchell 2023)
        ipo       (h - 1 / (2 beta))^2 (Azar et al. 2023)
        hinge     max(0, 1 - beta h) (Zhao et al. 2023)

    Args:
      log_probs: [B, 2], sums over response tokens under the policy; index 0 chosen, 1 rejected.
      ref_log_probs: [B, 2], the same under ref_policy.
      beta: strength of the KL anchor.
      kind: sigmoid, ipo or hinge.
      label_smoothing: probability that a label is wrong; sigmoid only.
      lengths: [B, 2] int, numbers of response tokens: log-probabilities become means over tokens.

    Returns:
      (loss [B], metrics: loss, accuracy, margin, chosen_reward, rejected_reward).
    """
    chex.assert_shape([log_probs, ref_log_probs], (None, 2))
    chex.assert_equal_shape([log_probs, ref_log_probs])
    chex.assert_type([log_probs, ref_log_probs], float)
    if kind not in ("sigmoid", "ipo", "hinge"):
        raise ValueError(f"DPO loss is {kind!r}: use sigmoid, ipo or hinge.")
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"label_smoothing={label_smoothing} has no meaning for the {kind} loss: use sigmoid or set 0.")
    log_ratios = at_least_float32(log_probs) - at_least_float32(ref_log_probs)
    if lengths is not None:
        chex.assert_equal_shape([log_probs, lengths])
        log_ratios = log_ratios / jnp.maximum(lengths, 1)
    rewards = beta * log_ratios
    h = log_ratios[:, 0] - log_ratios[:, 1]
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(beta * h) - label_smoothing * jax.nn.log_sigmoid(-beta * h)
    elif kind == "ipo":
        loss = jnp.square(h - 1 / (2 * beta))
    else:
        loss = jnp.maximum(0.0, 1 - beta * h)
    return loss, {
        "loss": row_metric(loss),
        "accuracy": row_metric(h > 0),
        "margin": row_metric(beta * h),
        "chosen_reward": row_metric(rewards[:, 0]),
        "rejected_reward": row_metric(rewards[:, 1]),
    }
