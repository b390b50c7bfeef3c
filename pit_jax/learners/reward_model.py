"""Reward models: R_P by Bradley-Terry, R_PIT by the five terms of Equation 2 (PIT section 3.3)."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from pit_jax.losses import preference
from pit_jax.models.transformer import ScalarModel
from pit_jax.train_state import TrainState, apply_gradients, gradients, jit_step
from pit_jax.types import Array, Metrics, Params, ScoreBatch


def group_scores(model: ScalarModel, params: Params, batch: ScoreBatch) -> Array:
    """Scores [B * E, C] of groups of rows, in one pass over what the rows of a group share and what they do not.

    Those of the groups of a sequence come one after the other; `are_groups` says which are of no group.
    """
    B, _, C = batch.last.shape
    read = jnp.reshape(batch.last, (B, -1), out_sharding=model.rules.spec("batch", None))
    scores = model.apply(params, batch.tokens, batch.segments, batch.positions, batch.members, read)
    return jnp.reshape(scores, (-1, C), out_sharding=model.rules.spec("batch", None))


def are_groups(model: ScalarModel, batch: ScoreBatch) -> Array:
    """[B * E] bool, which of the scores are those of a group: a sequence may hold less than E."""
    found = jnp.arange(batch.last.shape[1]) < jnp.max(batch.segments, axis=1, keepdims=True)
    return jnp.reshape(found, (-1,), out_sharding=model.rules.spec("batch"))


def preference_loss(scores: Array, loss: str, mask: Array | None = None) -> tuple[Array, Metrics]:
    """Per-row loss of scores [B, 2] (R_P) or [B, 4] (R_PIT, order of `GAP_PAIRINGS`) by the name of the config.

    Args:
      scores: of groups.
      loss: gap, gap_no_diagonal or mse, for R_PIT.
      mask: [B] bool, those that count; None: all.
    """
    if scores.shape[1] == 2:
        return preference.bradley_terry(scores[:, 0], scores[:, 1], mask)
    if loss == "mse":
        return preference.gap_mse(scores, mask)
    return preference.gap_loss(scores, mask, diagonal=loss == "gap")


def make_train_step(
    model: ScalarModel, optimizer: optax.GradientTransformation, *, loss: str, accumulation: int = 1
) -> Callable[[TrainState, ScoreBatch], tuple[TrainState, Metrics]]:
    """The jitted step; the state is donated."""

    def summed(params, batch):
        mask = are_groups(model, batch)
        per_row, metrics = preference_loss(group_scores(model, params, batch), loss, mask)
        return (jnp.sum(per_row), jnp.sum(mask.astype(jnp.float32))), metrics

    def train_step(state: TrainState, batch: ScoreBatch):
        grads, metrics = gradients(summed, state.params, batch, accumulation)
        return apply_gradients(state, grads, metrics, optimizer)

    return jit_step(train_step, donate_argnums=0)
