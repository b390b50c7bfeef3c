"""Reward models: R_P by Bradley-Terry, R_PIT by the five terms of Equation 2 (PIT section 3.3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pit_jax.losses import preference
from pit_jax.models.transformer import ScalarModel
from pit_jax.train_state import TrainState, apply_gradients, gradients
from pit_jax.types import Array, Metrics, Params, ScoreBatch


def group_scores(model: ScalarModel, params: Params, batch: ScoreBatch) -> Array:
    """Scores [B, C] of groups of rows, in one forward pass over what the rows of a group share and what they do not."""
    segments = (batch.members > 0).astype(jnp.int32)
    values = model.apply(params, batch.tokens, segments, batch.positions, batch.members)
    is_last = batch.last[:, :, None] == jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
    return jnp.sum(jnp.where(is_last, values[:, None, :], 0.0), axis=2)


def preference_loss(scores: Array, loss: str) -> tuple[Array, Metrics]:
    """Per-row loss of scores [B, 2] (R_P) or [B, 4] (R_PIT, order of `GAP_PAIRINGS`) by the name of the config."""
    if scores.shape[1] == 2:
        return preference.bradley_terry(scores[:, 0], scores[:, 1])
    if loss == "mse":
        return preference.gap_mse(scores)
    return preference.gap_loss(scores, diagonal=loss == "gap")


def make_train_step(
    model: ScalarModel, optimizer: optax.GradientTransformation, *, loss: str, accumulation: int = 1
) -> Callable[[TrainState, ScoreBatch], tuple[TrainState, Metrics]]:
    """The jitted step; the state is donated."""

    def summed(params, batch):
        per_row, metrics = preference_loss(group_scores(model, params, batch), loss)
        return (jnp.sum(per_row), jnp.float32(per_row.shape[0])), metrics

    def train_step(state: TrainState, batch: ScoreBatch):
        grads, metrics = gradients(summed, state.params, batch, accumulation)
        return apply_gradients(state, grads, metrics, optimizer)

    return jax.jit(train_step, donate_argnums=0)
