"""Sums, means and whitening over the entries that a boolean mask keeps.

Values and gradients stay finite where a mask keeps nothing: entries are replaced before they are reduced (a product
with the mask would let a NaN or an infinity of the padding through), and an empty mean is 0.
"""

import chex
import jax
import jax.numpy as jnp

from pit_jax.types import Array, Metric

Axis = int | tuple[int, ...] | None


def at_least_float32(x: Array) -> jax.Array:
    """`x` as float32; wider types are kept, so that a test can run in float64."""
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def masked_sum(x: Array, mask: Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """sum_i m_i x_i.

    Args:
      x: values, any shape.
      mask: bool, same shape, true where `x` counts.
      axis: axes to sum over; all by default.
      keepdims: keep the reduced axes with size 1.

    Returns:
      The sum, 0 where nothing counts.
    """
    chex.assert_equal_shape([x, mask])
    chex.assert_type(mask, bool)
    return jnp.sum(jnp.where(mask, at_least_float32(x), 0.0), axis=axis, keepdims=keepdims)


def masked_mean(x: Array, mask: Array, axis: Axis = None, *, keepdims: bool = False) -> jax.Array:
    """sum_i m_i x_i / max(sum_i m_i, 1): 0 where nothing counts. Arguments as in `masked_sum`."""
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    return masked_sum(x, mask, axis, keepdims=keepdims) / jnp.maximum(count, 1)


def masked_variance(x: Array, mask: Array, axis: Axis = None, *, ddof: int = 0, keepdims: bool = False) -> jax.Array:
    """sum_i m_i (x_i - mean)^2 / max(sum_i m_i - ddof, 1).

    Args:
      x, mask, axis, keepdims: as in `masked_sum`.
      ddof: 1 for the unbiased estimate.

    Returns:
      The variance, 0 where nothing counts.
    """
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    x = jnp.where(mask, at_least_float32(x), 0.0)  # before the square, whose gradient would be 0 * NaN on NaN padding
    deviation = x - masked_mean(x, mask, axis, keepdims=True)
    return masked_sum(jnp.square(deviation), mask, axis, keepdims=keepdims) / jnp.maximum(count - ddof, 1)


def masked_whiten(
    x: Array, mask: Array, axis: Axis = None, *, shift_mean: bool = True, epsilon: float = 1e-8
) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon), as for the advantages of PPO.

    Statistics are those of the entries given: whiten the advantages of a whole rollout before it is split into
    mini-batches, or the result depends on the split.

    Args:
      x: values, any shape.
      mask: bool, same shape, true where `x` counts.
      axis: axes of the statistics; all by default.
      shift_mean: False adds the mean back, so that only the scale changes.
      epsilon: keeps constant entries finite.

    Returns:
      An array like `x`: mean 0 and variance 1 over the mask, 0 elsewhere.
    """
    x = jnp.where(mask, at_least_float32(x), 0.0)
    mean = masked_mean(x, mask, axis, keepdims=True)
    variance = masked_variance(x, mask, axis, keepdims=True)
    whitened = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return jnp.where(mask, whitened, 0.0)


def masked_metric(x: Array, mask: Array) -> Metric:
    """(sum over the mask, number of entries that it keeps): the mean is taken on the host."""
    return masked_sum(x, mask), jnp.sum(mask, dtype=jnp.float32)


def kept(x: Array, mask: Array | None) -> Array:
    """`x` where a mask keeps it, and else 0; all of it where there is no mask."""
    return x if mask is None else jnp.where(mask, x, 0.0)


def row_metric(x: Array, mask: Array | None = None) -> Metric:
    """(sum, number of rows) of one value per row, [B]; of the rows that a mask keeps, where there is one."""
    chex.assert_rank(x, 1)
    if mask is not None:
        return masked_metric(x, mask)
    return jnp.sum(at_least_float32(x)), jnp.float32(x.shape[0])
