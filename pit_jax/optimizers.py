"""Optimizers from configs."""

import jax
import optax

from pit_jax.config import OptimizerConfig


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
    """AdamW with a global-norm clip; norms, biases and scalar heads are not decayed."""

    def decayed(params):
        names = ("scale", "bias", "head")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in names, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
