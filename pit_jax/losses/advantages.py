"""From the score of a response to rewards per token, advantages and returns.

Masks are `Rollout.response_mask`: true up to and including EOS, contiguous from index 0. Nothing here is
differentiated: call these functions once per rollout, before the mini-batches.
"""

import chex
import jax
import jax.numpy as jnp

from pit_jax.losses.masked import at_least_float32
from pit_jax.types import Array


def kl_estimate(log_probs: Array, ref_log_probs: Array, *, kind: str = "k1") -> jax.Array:
    """Per-token estimates of KL(policy || ref_policy) on samples of the policy (Schulman 2020).

        d = log_probs - ref_log_probs
        k1   d                 unbiased, negative for some samples; summed over tokens, the term of Equations 3 to 5
        k2   d^2 / 2           biased, low variance
        k3   exp(-d) - 1 + d   unbiased, never negative

    Args:
      log_probs: [...], of sampled tokens under the policy.
      ref_log_probs: [...], the same under ref_policy.
      kind: k1, k2 or k3.

    Returns:
      [...], meaningless where the tokens are padding.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    chex.assert_type([log_probs, ref_log_probs], float)
    d = at_least_float32(log_probs) - at_least_float32(ref_log_probs)
    if kind == "k1":
        return d
    if kind == "k2":
        return jnp.square(d) / 2
    if kind == "k3":
        return jnp.expm1(-d) + d
    raise ValueError(f"KL estimator is {kind!r}: use k1, k2 or k3.")


def token_rewards(score: Array, kl: Array, mask: Array, *, kl_coef: float | Array) -> jax.Array:
    """reward_t = -beta kl_t + [t is the last token] score, the objective of PIT Equations 3 to 5 spread over tokens.

    Args:
      score: [B] float, r(x, y) or r_gap(x, y, y_ref).
      kl: [B, R], per token.
      mask: [B, R] bool, true on response tokens.
      kl_coef: beta.

    Returns:
      rewards [B, R]: their sum over a row is score - kl_coef * sum_t kl_t; 0 off the mask. A row without tokens has no
      place for its score: all of its rewards are 0.
    """
    chex.assert_rank([score, kl, mask], [1, 2, 2])
    chex.assert_equal_shape([kl, mask])
    chex.assert_equal_shape_prefix([score, kl], 1)
    chex.assert_type([score, kl, mask], [float, float, bool])
    positions = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, positions, -1), axis=1, keepdims=True)
    rewards = jnp.where(mask, -kl_coef * at_least_float32(kl), 0.0)
    return rewards + jnp.where(positions == last, at_least_float32(score)[:, None], 0.0)


def gae(
    rewards: Array, values: Array, mask: Array, *, discount: float, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation (Schulman et al. 2016, Equation 16).

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1},    returns_t = A_t + V_t

    V and A are 0 after the last response token: a response ends there, with EOS or at the length limit.

    Args:
      rewards: [B, R].
      values: [B, R], V_t before token t is emitted.
      mask: [B, R] bool, true on response tokens, contiguous from index 0.
      discount: gamma.
      gae_lambda: lambda.

    Returns:
      (advantages [B, R], returns [B, R]), 0 off the mask.
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type([rewards, values, mask], [float, float, bool])
    rewards = jnp.where(mask, at_least_float32(rewards), 0.0)
    values = jnp.where(mask, at_least_float32(values), 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = jnp.moveaxis(rewards + discount * next_values - values, 1, 0)

    def step(next_advantage, delta):
        advantage = delta + discount * gae_lambda * next_advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(deltas[0]), deltas, reverse=True)
    advantages = jnp.where(mask, jnp.moveaxis(advantages, 0, 1), 0.0)
    return advantages, advantages + values


def adaptive_kl_update(kl_coef: Array, mean_kl: Array, num_samples: int, *, target: float, horizon: float) -> jax.Array:
    """beta <- beta (1 + e n / horizon), e = clip(KL / target - 1, -0.2, 0.2) (Ziegler et al. 2019).

    Args:
      kl_coef: [], beta.
      mean_kl: [], mean over responses of the KL summed over tokens, in nats.
      num_samples: n, responses since the last update.
      target: KL to hold, in nats per response.
      horizon: responses over which beta can change by about 20%.

    Returns:
      The next beta, [].
    """
    error = jnp.clip(mean_kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * num_samples / horizon)
