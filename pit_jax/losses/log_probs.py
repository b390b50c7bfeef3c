"""Log-probabilities of tokens without logits [B, T, V] of the whole sequence ever existing."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from pit_jax.losses.masked import at_least_float32
from pit_jax.types import Array


def token_log_probs(
    logits_fn: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """log p(target_t) and the entropy of p, with p = softmax(logits / temperature) at each position.

    Logits are computed for `chunk_size` positions at a time and computed again in the backward pass, so that at most
    [B, chunk_size, V] of them exist. Sampling and training have to use the same temperature, or the ratio of PPO is not
    1 at the first update.

    Args:
      logits_fn: [B, t, D] -> [B, t, V], e.g. the unembedding. It may close over parameters; V may be sharded.
      hidden: [B, T, D].
      targets: [B, T] int, the token that position t predicts (shifting is the caller's).
      temperature: tau > 0.
      chunk_size: positions at a time; None (or at least T) takes all at once, without recomputation.
      with_entropy: False skips the entropy.

    Returns:
      (log_probs [B, T] float32, entropy [B, T] float32 or None).
    """
    chex.assert_rank([hidden, targets], [3, 2])
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    chex.assert_type(targets, int)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: use a positive number of positions, or None for all at once.")

    def one_chunk(hidden, targets):
        logits = at_least_float32(logits_fn(hidden)) / temperature
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        # A comparison with an iota instead of a gather: it needs no communication where V is sharded.
        is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
        log_probs = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - normalizer
        if not with_entropy:
            return log_probs, None
        probs = jnp.exp(logits - normalizer[..., None])
        return log_probs, normalizer - jnp.sum(probs * logits, axis=-1)

    T = targets.shape[1]
    if chunk_size is None or chunk_size >= T:
        return one_chunk(hidden, targets)

    # Chunks of equal length, so that a T that is not a multiple of chunk_size costs little padding.
    num_chunks = -(-T // chunk_size)
    chunk = -(-T // num_chunks)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape((x.shape[0], num_chunks, chunk) + x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape((x.shape[0], num_chunks * chunk))[:, :T]

    body = jax.checkpoint(one_chunk, prevent_cse=False)  # the scan already keeps the two passes apart
    _, outputs = jax.lax.scan(lambda _, xs: (None, body(*xs)), None, (split(hidden), split(targets)))
    return jax.tree.map(join, outputs)
