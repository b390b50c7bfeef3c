"""Likelihood training: M_pre, and the supervised fine-tuning of M_P and M_PIT (PIT section 3.2)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pit_jax.losses import likelihood
from pit_jax.losses.log_probs import token_log_probs
from pit_jax.models.transformer import Transformer
from pit_jax.train_state import TrainState, apply_gradients, gradients
from pit_jax.types import Array, Metrics, Params, TokenBatch


class SFTBatch(NamedTuple):
    """Rows to make likely, and rows to make unlikely.

    Attributes:
      likely: (x, y) rows; for M_PIT (x, y_l) -> y_w.
      unlikely: rows of section 3.2's unlikelihood terms, or None.
    """

    likely: TokenBatch
    unlikely: TokenBatch | None = None


def row_log_probs(model: Transformer, params: Params, batch: TokenBatch, chunk_size: int = 0) -> tuple[Array, Array]:
    """(log-probs, mask), both [B, T - 1]: of token t + 1 given the ones up to t, where it is a training target."""
    hidden, _ = model.apply(params, batch.tokens, batch.segments, batch.positions)
    log_probs, _ = token_log_probs(
        lambda h: model.apply(params, h, method=Transformer.logits),
        hidden[:, :-1],
        batch.tokens[:, 1:],
        chunk_size=chunk_size or None,
        with_entropy=False,
    )
    return log_probs, batch.loss_mask[:, 1:]


def sft_loss(
    params: Params, batch: SFTBatch, *, model: Transformer, unlikelihood: float = 0.0, chunk_size: int = 0
) -> tuple[tuple[Array, Array], Metrics]:
    """-sum log M(y | x), the L^SFT of section 3.2, with the unlikelihood terms at weight `unlikelihood`.

    Returns:
      ((sum over tokens, number of target tokens), metrics).
    """
    log_probs, mask = row_log_probs(model, params, batch.likely, chunk_size)
    per_row, metrics = likelihood.negative_log_likelihood(log_probs, mask)
    total, weight = jnp.sum(per_row), jnp.sum(mask.astype(jnp.float32))
    if unlikelihood and batch.unlikely is not None:
        log_probs, mask = row_log_probs(model, params, batch.unlikely, chunk_size)
        per_row, more = likelihood.unlikelihood(log_probs, mask)
        total, metrics = total + unlikelihood * jnp.sum(per_row), metrics | more
    return (total, weight), metrics


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    unlikelihood: float = 0.0,
    chunk_size: int = 0,
    accumulation: int = 1,
) -> Callable[[TrainState, SFTBatch], tuple[TrainState, Metrics]]:
    """The jitted step; the state is donated."""

    def loss(params, batch):
        return sft_loss(params, batch, model=model, unlikelihood=unlikelihood, chunk_size=chunk_size)

    def train_step(state: TrainState, batch: SFTBatch):
        grads, metrics = gradients(loss, state.params, batch, accumulation)
        return apply_gradients(state, grads, optimizer), metrics

    return jax.jit(train_step, donate_argnums=0)
