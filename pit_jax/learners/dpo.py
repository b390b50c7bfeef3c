"""Direct preference optimization: the second stage of SRT (section 3.2)."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import optax

from pit_jax import sharding
from pit_jax.data import batches, pairs
from pit_jax.data.pairs import Pair, PairBatch
from pit_jax.losses import preference
from pit_jax.losses.log_probs import token_log_probs
from pit_jax.models.transformer import Transformer
from pit_jax.train_state import TrainState, apply_gradients, gradients, jit_step
from pit_jax.types import Array, Metrics, Params


def pair_log_probs(model: Transformer, params: Params, batch: PairBatch, *, chunk_size: int = 0) -> tuple[Array, Array]:
    """log M(y | x) of both answers, in one forward pass; the unembedding is applied where answer tokens are predicted.

    Args:
      model, params: the decoder.
      batch: pairs.
      chunk_size: answer tokens at a time, see `token_log_probs`; 0: all at once.

    Returns:
      (sums over answer tokens [B, 2] float32, numbers of answer tokens [B, 2] int32).
    """
    segments = (batch.members > 0).astype(jnp.int32)
    hidden, _ = model.apply(params, batch.tokens, segments, batch.positions, members=batch.members, read=batch.sources)
    log_probs, _ = token_log_probs(
        lambda h: model.apply(params, h, method=Transformer.logits),
        hidden,
        batch.targets,
        chunk_size=chunk_size or None,
        with_entropy=False,
    )
    in_row = (batch.target_members[:, None, :] >> jnp.arange(2, dtype=jnp.int32)[:, None] & 1) == 1
    sums = jnp.sum(jnp.where(in_row, log_probs[:, None, :], 0.0), axis=2)
    return sums, jnp.sum(in_row.astype(jnp.int32), axis=2)


@functools.cache
def jitted_log_probs(model: Transformer, chunk_size: int):
    """(parameters, pairs) -> log-probs [B, 2], compiled."""
    return jit_step(lambda params, batch: pair_log_probs(model, params, batch, chunk_size=chunk_size)[0])


def reference_log_probs(
    model: Transformer, params: Params, data: Sequence[Pair], batch_size: int, *, chunk_size: int = 0
) -> np.ndarray:
    """log-probs [N, 2] under ref_policy, which does not change: computed once for all pairs, and stored with them.

    In batches of the shapes of training, so that the first step's loss is log 2.
    """
    padded, num_targets = pairs.pair_buckets(data)
    order = np.argsort(padded, kind="stable")
    batch_size = batches.round_up(batch_size, sharding.mesh_shape().get("data", 1))
    out = np.zeros((len(data), 2), np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        filled, length = np.resize(rows, batch_size), int(padded[rows].max())
        shape = {"length": length, "num_targets": num_targets[length]}
        make = lambda own: pairs.pair_rows([data[i] for i in filled[own]], **shape)  # noqa: B023, E731
        found = jitted_log_probs(model, chunk_size)(params, sharding.make_batch(batch_size, make))
        out[rows] = sharding.to_host(found)[: len(rows)]
    return out


def pair_loss(
    params: Params,
    batch: PairBatch,
    *,
    model: Transformer,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    chunk_size: int = 0,
) -> tuple[tuple[Array, Array], Metrics]:
    """The loss of `preference.dpo_loss` against the stored log-probs of ref_policy.

    A margin can grow while both answers become less likely; chosen_log_prob and rejected_log_prob, means over answer
    tokens, show it.

    Returns:
      ((sum over pairs, number of pairs), metrics).
    """
    log_probs, lengths = pair_log_probs(model, params, batch, chunk_size=chunk_size)
    per_row, metrics = preference.dpo_loss(
        log_probs,
        batch.ref_log_probs,
        beta=beta,
        kind=kind,
        label_smoothing=label_smoothing,
        lengths=lengths if length_normalized else None,
    )
    for c, name in enumerate(("chosen_log_prob", "rejected_log_prob")):
        metrics[name] = (jnp.sum(log_probs[:, c]), jnp.sum(lengths[:, c].astype(jnp.float32)))
    return (jnp.sum(per_row), jnp.float32(per_row.shape[0])), metrics


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    chunk_size: int = 0,
    accumulation: int = 1,
) -> Callable[[TrainState, PairBatch], tuple[TrainState, Metrics]]:
    """The jitted step; the state is donated. Arguments as in `pair_loss` and `gradients`."""
    loss = functools.partial(
        pair_loss,
        model=model,
        beta=beta,
        kind=kind,
        label_smoothing=label_smoothing,
        length_normalized=length_normalized,
        chunk_size=chunk_size,
    )

    def train_step(state: TrainState, batch: PairBatch):
        grads, metrics = gradients(loss, state.params, batch, accumulation)
        return apply_gradients(state, grads, metrics, optimizer)

    return jit_step(train_step, donate_argnums=0)
