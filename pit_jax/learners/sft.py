"""Likelihood training: M_pre, and the supervised fine-tuning of M_P and M_PIT (PIT section 3.2)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from pit_jax.losses import likelihood
from pit_jax.losses.log_probs import token_log_probs
from pit_jax.models.transformer import Transformer, picked
from pit_jax.train_state import TrainState, apply_gradients, gradients, jit_step
from pit_jax.types import Array, Metrics, Params, TokenBatch


class SFTBatch(NamedTuple):
    """Rows to make likely, and rows to make unlikely.

    Attributes:
      likely: (x, y) rows; for M_PIT (x, y_l) -> y_w.
      unlikely: rows of section 3.2's unlikelihood terms, or None.
    """

    likely: TokenBatch
    unlikely: TokenBatch | None = None


def row_log_probs(
    model: Transformer, params: Params, batch: TokenBatch, *, num_targets: int = 0, chunk_size: int = 0
) -> tuple[Array, Array]:
    """Log-probs of the training targets given what stands before them.

    Args:
      model, params: the decoder.
      batch: rows.
      num_targets: at most so many targets are in any row, so the unembedding is applied to that many positions only
        (most tokens of a row are read and not learnt); 0: to all positions.
      chunk_size: see `token_log_probs`.

    Returns:
      (log-probs, mask), both [B, num_targets], or [B, T - 1] for token t + 1.
    """
    targets, mask, read = batch.tokens[:, 1:], batch.loss_mask[:, 1:], None
    if 0 < num_targets < mask.shape[1]:
        # Targets first, in order; a stable sort keeps padding out of reach of the mask.
        read = jnp.argsort(~mask, axis=1, stable=True)[:, :num_targets]
        targets, mask = picked(targets, read), picked(mask, read)
    hidden, _ = model.apply(params, batch.tokens, batch.segments, batch.positions, read=read)
    hidden = hidden[:, :-1] if read is None else hidden
    log_probs, _ = token_log_probs(
        lambda h: model.apply(params, h, method=Transformer.logits),
        hidden,
        targets,
        chunk_size=chunk_size or None,
        with_entropy=False,
    )
    return log_probs, mask


def sft_loss(
    params: Params,
    batch: SFTBatch,
    *,
    model: Transformer,
    unlikelihood: float = 0.0,
    num_targets: int = 0,
    chunk_size: int = 0,
) -> tuple[tuple[Array, Array], Metrics]:
    """-sum log M(y | x), the L^SFT of section 3.2, with the unlikelihood terms at weight `unlikelihood`.

    Returns:
      ((sum over tokens, number of target tokens), metrics).
    """
    read = functools.partial(row_log_probs, model, params, num_targets=num_targets, chunk_size=chunk_size)
    log_probs, mask = read(batch.likely)
    per_row, metrics = likelihood.negative_log_likelihood(log_probs, mask)
    total, weight = jnp.sum(per_row), jnp.sum(mask.astype(jnp.float32))
    if unlikelihood and batch.unlikely is not None:
        log_probs, mask = read(batch.unlikely)
        per_row, more = likelihood.unlikelihood(log_probs, mask)
        total, metrics = total + unlikelihood * jnp.sum(per_row), metrics | more
    return (total, weight), metrics


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    unlikelihood: float = 0.0,
    num_targets: int = 0,
    chunk_size: int = 0,
    accumulation: int = 1,
) -> Callable[[TrainState, SFTBatch], tuple[TrainState, Metrics]]:
    """The jitted step; the state is donated. Arguments as in `sft_loss`, `row_log_probs` and `gradients`."""
    loss = functools.partial(
        sft_loss, model=model, unlikelihood=unlikelihood, num_targets=num_targets, chunk_size=chunk_size
    )

    def train_step(state: TrainState, batch: SFTBatch):
        grads, metrics = gradients(loss, state.params, batch, accumulation)
        return apply_gradients(state, grads, metrics, optimizer)

    return jit_step(train_step, donate_argnums=0)
