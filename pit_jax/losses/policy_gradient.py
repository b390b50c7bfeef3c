"""The two losses of PPO (Schulman et al. 2017).

Normalisation: a loss is a sum over the tokens of a row, and its mean is taken over all response tokens of a mini-batch:
sum / weight of `metrics["loss"]`. A micro-batch must not divide by its own token count, because rows differ in length:
the mean of means is not the mean. Since the weight (a count of mask entries) does not depend on parameters,

    grad(mean loss) = (sum over micro-batches of grad(sum of per_example)) / (sum over micro-batches of weight),

so A micro-batches are one batch when gradients of `per_example.sum()` and all (sum, weight) metrics are added up, and
the gradients are divided once, at the end. The same holds for every loss of this package.
"""

import chex
import jax
import jax.numpy as jnp

from pit_jax.losses.advantages import kl_estimate
from pit_jax.losses.masked import at_least_float32, masked_metric, masked_sum, masked_variance
from pit_jax.types import Array, Metrics


def ppo_policy_loss(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    epsilon: float,
    entropy: Array | None = None,
    entropy_coef: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """-sum_t min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t) - c sum_t H_t, rho = pi / pi_old
    (Schulman et al. 2017, Equations 7 and 9).

    Args:
      log_probs: [B, R], of the sampled tokens under the policy.
      old_log_probs: [B, R], under the policy that sampled them.
      advantages: [B, R], taken as constants.
      mask: [B, R] bool, true on response tokens.
      epsilon: clip of the ratio.
      entropy: [B, R], H_t, where it is measured.
      entropy_coef: c; needs `entropy`.

    Returns:
      (loss [B] summed over tokens, metrics: loss, clip_fraction (tokens whose gradient the clip removes), approx_kl (k3
      from the old policy to this one), ratio, ratio_max (the largest ratio of a row, averaged over rows with tokens),
      and entropy where it is given).
    """
    chex.assert_rank([log_probs, old_log_probs, advantages, mask], 2)
    chex.assert_equal_shape([log_probs, old_log_probs, advantages, mask])
    chex.assert_type([log_probs, old_log_probs, advantages, mask], [float, float, float, bool])
    if entropy is None and entropy_coef:
        raise ValueError(f"entropy_coef={entropy_coef} needs the entropy: pass entropy=, or set the coefficient to 0.")
    # Padding is replaced before the exponential, which may overflow there.
    log_probs = jnp.where(mask, at_least_float32(log_probs), 0.0)
    old_log_probs = jnp.where(mask, at_least_float32(old_log_probs), 0.0)
    advantages = jax.lax.stop_gradient(at_least_float32(advantages))

    ratio = jnp.exp(log_probs - old_log_probs)
    unclipped = ratio * advantages
    clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * advantages
    loss = -jnp.minimum(unclipped, clipped)
    metrics = {
        "clip_fraction": masked_metric(clipped < unclipped, mask),
        "approx_kl": masked_metric(kl_estimate(old_log_probs, log_probs, kind="k3"), mask),
        "ratio": masked_metric(ratio, mask),
        "ratio_max": masked_metric(jnp.max(jnp.where(mask, ratio, 0.0), axis=1), jnp.any(mask, axis=1)),
    }
    if entropy is not None:
        chex.assert_equal_shape([entropy, mask])
        loss = loss - entropy_coef * at_least_float32(entropy)
        metrics["entropy"] = masked_metric(entropy, mask)
    metrics["loss"] = masked_metric(loss, mask)
    return masked_sum(loss, mask, axis=1), metrics


def ppo_value_loss(
    values: Array, old_values: Array, returns: Array, mask: Array, *, value_epsilon: float | None
) -> tuple[jax.Array, Metrics]:
    """1/2 sum_t max((V_t - R_t)^2, (V_clip_t - R_t)^2), V_clip = clip(V, V_old - epsilon_v, V_old + epsilon_v)
    (the clipped value loss of OpenAI's baselines, as in lm-human-preferences).

    Args:
      values: [B, R], V.
      old_values: [B, R], V_old, those of the rollout.
      returns: [B, R], R, taken as constants.
      mask: [B, R] bool, true on response tokens.
      value_epsilon: epsilon_v, a Python number; None or 0: no clip.

    Returns:
      (loss [B] summed over tokens, metrics: loss, clip_fraction, value, return).
    """
    chex.assert_rank([values, old_values, returns, mask], 2)
    chex.assert_equal_shape([values, old_values, returns, mask])
    chex.assert_type([values, old_values, returns, mask], [float, float, float, bool])
    # Padding is replaced first: its square may overflow.
    values = jnp.where(mask, at_least_float32(values), 0.0)
    old_values = jnp.where(mask, jax.lax.stop_gradient(at_least_float32(old_values)), 0.0)
    returns = jnp.where(mask, jax.lax.stop_gradient(at_least_float32(returns)), 0.0)

    error = jnp.square(values - returns)
    clipped_error = error
    if value_epsilon:
        # Not V_old + clip(V - V_old): rounding there would count values inside the bounds as clipped.
        clipped = jnp.clip(values, old_values - value_epsilon, old_values + value_epsilon)
        clipped_error = jnp.square(clipped - returns)
    loss = jnp.maximum(error, clipped_error) / 2
    return masked_sum(loss, mask, axis=1), {
        "loss": masked_metric(loss, mask),
        "clip_fraction": masked_metric(clipped_error > error, mask),
        "value": masked_metric(values, mask),
        "return": masked_metric(returns, mask),
    }


def explained_variance(values: Array, returns: Array, mask: Array) -> jax.Array:
    """1 - Var(R - V) / Var(R) over the tokens of a whole rollout: 1 is perfect, 0 no better than a constant.

    Args:
      values: [B, R], V.
      returns: [B, R], R.
      mask: [B, R] bool, true on response tokens.

    Returns:
      [], 0 where all returns are equal and nothing is there to explain.
    """
    chex.assert_rank([values, returns, mask], 2)
    chex.assert_equal_shape([values, returns, mask])
    values, returns = at_least_float32(values), at_least_float32(returns)
    variance = masked_variance(returns, mask)
    explained = 1 - masked_variance(returns - values, mask) / jnp.where(variance > 0, variance, 1.0)
    return jnp.where(variance > 0, explained, 0.0)
