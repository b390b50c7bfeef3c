"""The state of a learner: plain arrays only, so that it can be donated, sharded, saved and compared."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pit_jax.types import Array, Metrics, Params


class TrainState(NamedTuple):
    """Parameters and their optimizer.

    Attributes:
      step: [] int32, updates done.
      params: of the model.
      opt_state: of optax.
    """

    step: Array
    params: Params
    opt_state: optax.OptState


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0. The optimizer's moments take the sharding of the parameters."""
    return TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))


def apply_gradients(
    state: TrainState, grads: Params, metrics: Metrics, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    Returns:
      (the new state, metrics with the norm of the new parameters, "param_norm", added). Loss and gradients are those of
      the parameters before the update; the norm is how an update that is not finite is seen before it is saved.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optax.tree.norm(params)
    return TrainState(state.step + 1, params, opt_state), metrics | {"param_norm": (norm, jnp.float32(1.0))}


def gradients(
    loss: Callable[[Params, object], tuple[tuple[Array, Array], Metrics]], params: Params, batch, accumulation: int = 1
) -> tuple[Params, Metrics]:
    """Gradient of sum(loss) / sum(weight) over a batch, in A = `accumulation` pieces.

    The sums are divided once, by the weight of the whole batch, so A pieces equal one batch whatever their lengths.

    Args:
      loss: (params, batch) -> ((summed loss, weight), metrics); both sums are over the rows of the batch.
      params: the parameters.
      batch: arrays with a leading batch axis that A divides.
      accumulation: A.

    Returns:
      (gradients, metrics with "loss" and "grad_norm" added).
    """

    def total(params, piece):
        (value, weight), metrics = loss(params, piece)
        return value, (weight, metrics | {"loss": (value, weight)})

    if accumulation == 1:
        grads, (weight, metrics) = jax.grad(total, has_aux=True)(params, batch)
    else:

        def split(x):  # rows i, i + A, ... stay on their device
            return jnp.moveaxis(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 1, 0)

        pieces = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(lambda p, b: jax.grad(total, has_aux=True)(p, b), params, first)
        # A weight that is a constant, such as a number of rows, has no sharding.
        spec = lambda s: s.sharding and s.sharding.spec  # noqa: E731
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=spec(s)), shapes)

        def add(carry, piece):
            return jax.tree.map(jnp.add, carry, jax.grad(total, has_aux=True)(params, piece)), None

        (grads, (weight, metrics)), _ = jax.lax.scan(add, start, pieces)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), grads)
    return grads, metrics | {"grad_norm": (optax.tree.norm(grads), jnp.float32(1.0))}
