"""Optimizers from configs."""

import jax
import optax
import optax.contrib

from pit_jax.config import OptimizerConfig
from pit_jax.models.lora import INPUTS


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_fraction` of the steps, then constant, linear or cosine decay to zero."""
    warmup = round(config.warmup_fraction * num_steps)
    rest = max(num_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    # Starts at 1/warmup of the peak: a first step with learning rate 0 would be a step lost.
    start = config.learning_rate / warmup
    return optax.join_schedules([optax.linear_schedule(start, config.learning_rate, warmup - 1 or 1), after], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW, or Muon for the matrices of the layers and NAdam for the rest, with a global-norm clip.

    Norms, biases and scalar heads are not decayed. Adapters are, each of A and B towards 0, and Muon takes each for a
    matrix. Weights that adapters leave as they are have no place in its state: see `train_state`.
    """

    def decayed(params):
        names = ("scale", "bias", "head")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in names, params)

    schedule = make_schedule(config, num_steps)
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.name == "muon":
        muon = optax.contrib.muon(
            schedule,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,  # updates as large as Adam's, so that both share a learning rate
        )
        return optax.chain(clip, _laid_out_by_compiler(muon))
    adamw = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=config.weight_decay, mask=decayed
    )
    return optax.chain(clip, adamw)


def _laid_out_by_compiler(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with layouts inside it left to the compiler: products of a sharded matrix with itself need a gather."""

    def update(updates, state, params=None):
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(inner.update, out_sharding=specs)(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _matrices(params):
    """Which axes of each weight Muon takes for rows and columns; None for what Adam updates."""

    def axes(path, leaf):
        name = path[-1].key
        if name in INPUTS:
            inner = 1 + INPUTS[name]
        elif len(path) > 1 and path[-2].key in INPUTS:  # A [L, inputs, rank] or B [L, rank, outputs] of an adapter
            inner = leaf.ndim - 1 if name == "a" else 2
        else:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, inner)), tuple(range(inner, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)
