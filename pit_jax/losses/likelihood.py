"""Likelihood and unlikelihood of responses (PIT section 3.2).

Both return sums over the tokens of a row. The loss is their global token mean, sum / weight of `metrics["loss"]`: rows
with few tokens do not weigh more than rows with many, and the mean does not depend on how a batch was split.
"""

import chex
import jax
import jax.numpy as jnp

from pit_jax.losses.masked import at_least_float32, masked_metric, masked_sum
from pit_jax.types import Array, Metrics


def negative_log_likelihood(log_probs: Array, mask: Array) -> tuple[jax.Array, Metrics]:
    """L_SFT = -sum_t m_t log M(y_t | y_<t, x) (PIT section 3.2: log M_P(y_w | x), log M_PIT(y_w | x, y_l)).

    Args:
      log_probs: [B, T], of the target tokens.
      mask: [B, T] bool, true on tokens that are training targets.

    Returns:
      (loss [B] summed over tokens, metrics: loss per token).
    """
    chex.assert_rank([log_probs, mask], 2)
    chex.assert_equal_shape([log_probs, mask])
    chex.assert_type([log_probs, mask], [float, bool])
    return -masked_sum(log_probs, mask, axis=1), {"loss": masked_metric(-log_probs, mask)}


def unlikelihood(log_probs: Array, mask: Array, *, epsilon: float = 1e-6) -> tuple[jax.Array, Metrics]:
    """L_UL = -sum_t m_t log(1 - p_t) (Welleck et al. 2019).

    PIT section 3.2 tries it on M_PIT(y_l | x, y_w), M_PIT(y_l | x, y_l) and M_PIT(y_w | x, y_w), and leaves it out
    of the final recipe because it makes results worse.

    Args:
      log_probs: [B, T], log p_t of the target tokens.
      mask: [B, T] bool, true on tokens to make less likely.
      epsilon: log p_t is held at most -epsilon, so that a token that is certain has a finite loss (and no gradient).

    Returns:
      (loss [B] summed over tokens, metrics: loss per token).
    """
    chex.assert_rank([log_probs, mask], 2)
    chex.assert_equal_shape([log_probs, mask])
    chex.assert_type([log_probs, mask], [float, bool])
    # Masked entries are replaced before the logarithm: its gradient there could be infinite.
    log_probs = jnp.where(mask, at_least_float32(log_probs), -1.0)
    loss = -jax.nn.log1mexp(jnp.maximum(-log_probs, epsilon))
    return masked_sum(loss, mask, axis=1), {"loss": masked_metric(loss, mask)}
