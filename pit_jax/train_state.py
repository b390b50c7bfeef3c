"""The state of a learner: plain arrays only, so that it can be donated, sharded, saved and compared.

With adapters (`models/lora.py`) gradients are taken of what is trained alone: of a frozen weight there is no gradient,
no sum of gradients and no moment, and none counts in a norm.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pit_jax.models import lora
from pit_jax.models.attention import platform
from pit_jax.types import Array, Metrics, Params


class TrainState(NamedTuple):
    """Parameters and their optimizer.

    Attributes:
      step: [] int32, updates done.
      params: of the model, with its adapters where it has some.
      opt_state: of optax, for what is trained (`lora.trained`).
    """

    step: Array
    params: Params
    opt_state: optax.OptState


EIGEN = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""For a compiler of CPUs: YNNPACK gets no operations."""


def jit_step(function: Callable, **options) -> Callable:
    """`jax.jit` of a program that reads whole sequences, for the devices of the mesh that is set.

    On a CPU its products go to Eigen, and not to YNNPACK as by default: with thousands of rows Eigen's are faster, and
    with the few rows of sampling slower.

    Args:
      function: the program.
      **options: of `jax.jit`.
    """
    return jax.jit(function, compiler_options=by_eigen() if platform() == "cpu" else None, **options)


@functools.cache
def by_eigen() -> dict[str, str]:
    """EIGEN; or no options, where the compiler no longer knows these, which it calls experimental."""
    try:
        jax.jit(lambda x: x).lower(0).compile(compiler_options=EIGEN)
    except jax.errors.JaxRuntimeError:
        return {}
    return EIGEN


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0. The optimizer's moments take the sharding of the parameters."""
    return TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(lora.trained(params)))


def apply_gradients(
    state: TrainState, grads: Params, metrics: Metrics, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    Returns:
      (the new state, metrics with the norm of what is trained, "param_norm", added). Loss and gradients are those of
      the parameters before the update; the norm is how an update that is not finite is seen before it is saved.
    """
    trained = lora.trained(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    norm = optax.tree.norm(trained)
    params = lora.with_trained(state.params, trained)
    return TrainState(state.step + 1, params, opt_state), metrics | {"param_norm": (norm, jnp.float32(1.0))}


def gradients(
    loss: Callable[[Params, object], tuple[tuple[Array, Array], Metrics]], params: Params, batch, accumulation: int = 1
) -> tuple[Params, Metrics]:
    """Gradient of sum(loss) / sum(weight) over a batch, in A = `accumulation` pieces.

    The sums are divided once, by the weight of the whole batch, so A pieces equal one batch whatever their lengths.

    Args:
      loss: (params, batch) -> ((summed loss, weight), metrics); both sums are over the rows of the batch.
      params: the parameters; with adapters, the gradients are those of `lora.trained(params)`.
      batch: arrays with a leading batch axis that A divides.
      accumulation: A.

    Returns:
      (gradients, metrics with "loss" and "grad_norm" added).
    """

    def total(trained, piece):
        (value, weight), metrics = loss(lora.with_trained(params, trained), piece)
        return value, (weight, metrics | {"loss": (value, weight)})

    trained = lora.trained(params)
    if accumulation == 1:
        grads, (weight, metrics) = jax.grad(total, has_aux=True)(trained, batch)
    else:

        def split(x):  # rows i, i + A, ... stay on their device
            batch, *rest = jax.typeof(x).sharding.spec
            # Said, as of pieces of one row JAX would take the axis of the pieces for that of the batch.
            spec = None if jax.sharding.get_abstract_mesh().empty else jax.P(batch, None, *rest)
            shape = x.shape[0] // accumulation, accumulation, *x.shape[1:]
            return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=spec), 1, 0)

        pieces = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(lambda p, b: jax.grad(total, has_aux=True)(p, b), trained, first)
        # A weight that is a constant, such as a number of rows, has no sharding.
        spec = lambda s: s.sharding and s.sharding.spec  # noqa: E731
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=spec(s)), shapes)

        def add(carry, piece):
            return jax.tree.map(jnp.add, carry, jax.grad(total, has_aux=True)(trained, piece)), None

        (grads, (weight, metrics)), _ = jax.lax.scan(add, start, pieces)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), grads)
    return grads, metrics | {"grad_norm": (optax.tree.norm(grads), jnp.float32(1.0))}


def saved_part(state):
    """A state as checkpoints hold it: of frozen weights, which a stage reads again from where it started, a checksum.

    Args:
      state: a tree with TrainStates in it.
    """

    def part(x):
        if not (isinstance(x, TrainState) and lora.is_adapted(x.params)):
            return x
        return x._replace(params={**lora.trained(x.params), "frozen": lora.checksums(x.params)})

    return jax.tree.map(part, state, is_leaf=lambda x: isinstance(x, TrainState))


def restored(saved, state):
    """The state that `saved` is the `saved_part` of; `state` is the start of the same stage and has its frozen weights.

    Raises:
      ValueError: where these are not those that the adapters were trained on.
    """

    def whole(x, start):
        if not (isinstance(start, TrainState) and lora.is_adapted(start.params)):
            return x
        params = dict(x.params)
        if (params.pop("frozen") != lora.checksums(start.params)).any():
            raise ValueError(
                "the model that this stage starts from has changed since its checkpoint was written: start it again "
                "with --redo=STAGE, or bring the model back"
            )
        return x._replace(params=lora.with_trained(start.params, params))

    return jax.tree.map(whole, saved, state, is_leaf=lambda x: isinstance(x, TrainState))
