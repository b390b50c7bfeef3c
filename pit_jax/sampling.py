"""Sampling from a decoder with a KV cache.

The forward function and the temperature are those of training (`Transformer.__call__`, `losses.token_log_probs`), and
the log-probs of the sampled tokens come back with them, so a PPO ratio is 1 at the first update of every rollout.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax import sharding
from pit_jax.config import SamplingConfig
from pit_jax.data import batches
from pit_jax.models import attention
from pit_jax.models.transformer import KVCache, Transformer, init_cache, layers_apart
from pit_jax.sharding import AxisRules
from pit_jax.types import Array, Params, PromptBatch, Rollout


def prompt_layout(prompts: PromptBatch) -> tuple[Array, Array]:
    """(segments, positions), both [B, P] int32, of left-padded prompts."""
    slots = jnp.arange(prompts.tokens.shape[1])[None, :]
    first = prompts.tokens.shape[1] - prompts.lengths[:, None]
    return (slots >= first).astype(jnp.int32), jnp.maximum(slots - first, 0).astype(jnp.int32)


def append_response(prompts: PromptBatch, tokens: Array, mask: Array, log_probs: Array | None = None) -> Rollout:
    """A Rollout of given responses (tokens [B, R], mask [B, R] true on a prefix) behind left-padded prompts."""
    segments, positions = prompt_layout(prompts)
    response_positions = prompts.lengths[:, None] + jnp.arange(tokens.shape[1])[None, :]
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, jnp.where(mask, tokens, 0)], 1),
        segments=jnp.concatenate([segments, mask.astype(jnp.int32)], 1),
        positions=jnp.concatenate([positions, response_positions.astype(jnp.int32)], 1),
        log_probs=jnp.zeros(mask.shape, jnp.float32) if log_probs is None else jnp.where(mask, log_probs, 0.0),
        response_mask=mask,
    )


def append_ids(prompts: PromptBatch, responses: Sequence[Sequence[int]], length: int, eos_id: int) -> Rollout:
    """A Rollout of NumPy arrays from response ids without EOS, each followed by EOS where it fits in `length`."""
    tokens = np.zeros((len(responses), length), np.int32)
    mask = np.zeros(tokens.shape, np.bool_)
    for i, ids in enumerate(responses):
        row = [*ids, eos_id][:length]
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return jax.tree.map(np.asarray, append_response(prompts, tokens, mask))


def restrict(logits: Array, *, temperature: float, top_k: int, top_p: float) -> Array:
    """Logits [B, V] of the sampling distribution: tempered, then cut to the top k and to the nucleus p."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
        last_kept = jnp.sum(mass_before < top_p, -1, keepdims=True) - 1  # the token that crosses p stays in
        threshold = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == last_kept, ordered, 0.0), -1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def first_of_largest(x: Array) -> Array:
    """argmax of [B, V] along V, int32: two plain reductions, which a CPU does in a fifth of the time."""
    V = x.shape[-1]
    return jnp.min(jnp.where(x == jnp.max(x, -1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1), -1)


class _Slots(NamedTuple):
    """Rows that are being written; [B] unless said.

    Attributes:
      row: int32, which of the prompts.
      prompt_length: int32.
      age: int32, tokens written.
      token: int32, the last of them, which the model has not read yet.
      tokens, log_probs: [B, R].
      recent: [B, n] int32, the last tokens, as many as there are in a stop sequence.
      done: bool.
    """

    row: Array
    prompt_length: Array
    age: Array
    token: Array
    tokens: Array
    log_probs: Array
    recent: Array
    done: Array


def generate(
    params: Params,
    prompts: PromptBatch,
    key: Array,
    *,
    model: Transformer,
    config: SamplingConfig,
    eos_id: int,
    stop: tuple[int, ...] = (),
    samples: int = 1,
) -> Rollout:
    """Samples one response per prompt.

    The noise of a row depends on its key and the step only, so a row does not depend on its batch-mates.

    With fewer slots than prompts (`config.slots`), slots whose rows have ended take prompts that wait, several at a
    time. All slots write their next token to the same place of the cache, which is a ring behind the prompts: what a
    row sees is said by its segments and positions, not by places. Of three slots, R = 4 and time to the right:

        slot 0   a a a . c c c c      a ends after 3 tokens, then its slot waits for a second one
        slot 1   b b b b d d          that is free, and c and d are read together
        ring     0 1 2 3 0 1 2 3

    Args:
      params: of `model`, in the layout of `model.rules` (DECODE_RULES gathers weights once, not once per token).
      prompts: left-padded prompts, [N].
      key: typed PRNG key, of which each row takes its own by its number; or one key per row, [N].
      model: the decoder.
      config: sampling settings; temperature 0 is greedy, and log_probs are then those of temperature 1.
      eos_id: ends a response; it is part of the response and of its mask.
      stop: ids that end a response as well where it ends with all of them; they are part of it too.
      samples: so many prompts, one after the other, are the same: it is read once.

    Returns:
      A Rollout with R = config.max_new_tokens; the loop ends early when all rows have ended.
    """
    N, P = prompts.tokens.shape
    R, rules = config.max_new_tokens, model.rules
    B = min(config.slots or N, N)
    num_shards = sharding.mesh_shape().get(rules.batch, 1)
    if B % num_shards:
        raise ValueError(f"{B} rows at a time are no multiple of the {num_shards} devices of the mesh's axis data")
    if N % samples or (N // samples) % num_shards:
        samples = 1
    # Prompts are read so many at a time: the more, the longer free slots wait for each other.
    F = B if B == N else min(batches.round_up(-(-B // 8), samples * num_shards), B)
    if F % (samples * num_shards):
        samples = 1
    apart = attention.platform() == "cpu"
    params = layers_apart(params, model.config, P + R) if apart else params
    row_keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(N))
    row_keys = jax.sharding.reshard(row_keys, rules.spec("batch") if B == N else jax.P(None))

    def along_batch(x: Array) -> Array:
        return jax.sharding.reshard(x, rules.spec("batch", *[None] * (x.ndim - 1)))

    def pick(hidden: Array, keys: Array, age: Array) -> tuple[Array, Array]:
        """(token, log-prob) of rows [B] whose hidden states [B, D] are given, at their ages."""
        logits = model.apply(params, hidden, method=Transformer.logits)
        logits = along_batch(logits)  # top_k and argmax want the whole vocabulary of a row
        if config.temperature == 0.0:
            token = first_of_largest(logits)
        else:
            logits = restrict(logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
            keys = jax.vmap(jax.random.fold_in)(keys, age)
            noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32))(keys)
            token = first_of_largest(logits + along_batch(noise))
        chosen = jnp.arange(logits.shape[-1])[None, :] == token[:, None]
        log_prob = jnp.sum(jnp.where(chosen, logits, 0.0), -1) - jax.nn.logsumexp(logits, -1)
        return token, log_prob

    def write(slots: _Slots, token: Array, log_prob: Array) -> _Slots:
        """Adds a token to every row that is not done."""
        alive = ~slots.done
        here = (jnp.arange(R) == slots.age[:, None]) & alive[:, None]
        recent = jnp.concatenate([slots.recent, token[:, None]], 1)[:, 1:]
        ended = token == eos_id
        if stop:
            ended |= jnp.all(recent == jnp.asarray(stop, jnp.int32), axis=1)
        age = slots.age + alive
        return slots._replace(
            age=age, token=token, recent=recent, done=slots.done | ended | (age == R),
            tokens=jnp.where(here, token[:, None], slots.tokens),
            log_probs=jnp.where(here, log_prob[:, None], slots.log_probs),
        )  # fmt: skip

    def empty(rows: int) -> _Slots:
        spec = rules.spec("batch", None)
        zeros = lambda *shape: jnp.zeros(shape, jnp.int32, out_sharding=jax.P(*spec[: len(shape)]))  # noqa: E731
        one, none = zeros(rows), jnp.ones((rows,), jnp.bool_, out_sharding=jax.P(spec[0]))
        table, recent = zeros(rows, R), zeros(rows, len(stop)) - 1
        return _Slots(one, one, one, one, table, table.astype(jnp.float32), recent, none)

    def read(some: PromptBatch, rows: Array) -> tuple[KVCache, _Slots]:
        """Prompts and their first tokens; of each `samples` the first is read."""
        count = some.tokens.shape[0]
        first = jax.tree.map(lambda x: _each(x, samples, rules), some)
        segments, positions = prompt_layout(first)
        cache = init_cache(model.config, count // samples, P, rules, apart)
        hidden, cache = model.apply(params, first.tokens, segments, positions, cache, last_only=True)
        again = functools.partial(_repeat, times=samples)
        cache = cache._replace(
            k=jax.tree.map(lambda x: again(x, axis=x.ndim - 5), cache.k),
            v=jax.tree.map(lambda x: again(x, axis=x.ndim - 4), cache.v),
            segments=again(cache.segments), positions=again(cache.positions),
        )  # fmt: skip
        start = empty(count)._replace(row=along_batch(rows), prompt_length=some.lengths)
        start = start._replace(done=~start.done)
        return cache, write(start, *pick(again(hidden[:, -1]), keys_of(rows), start.age))

    def keys_of(rows: Array) -> Array:
        return row_keys if B == N else row_keys.at[rows].get(out_sharding=rules.spec("batch"))

    def decode(carry: tuple[Array, KVCache, _Slots]) -> tuple[Array, KVCache, _Slots]:
        clock, cache, slots = carry
        alive = (~slots.done).astype(jnp.int32)[:, None]
        at = (slots.prompt_length + slots.age - 1)[:, None]
        hidden, cache = model.apply(params, slots.token[:, None], alive, at, cache._replace(index=P + clock % R))
        return clock + 1, cache, write(slots, *pick(hidden[:, 0], keys_of(slots.row), slots.age))

    cache = init_cache(model.config, B, P + R, rules, apart)
    if B == N:
        fresh, slots = read(prompts, jnp.arange(N))
        start = jnp.int32(0), _put(cache, fresh), slots
        _, _, slots = jax.lax.while_loop(lambda carry: ~jnp.all(carry[2].done), decode, start)
        mask = jnp.arange(R) < slots.age[:, None]
        return append_response(prompts, slots.tokens, mask, slots.log_probs)

    def wanted(next_row: Array) -> Array:
        return jnp.minimum(F, N - next_row)

    def refill(next_row: Array, cache: KVCache, slots: _Slots) -> tuple[KVCache, _Slots]:
        order = jnp.argsort(~sharding.replicate(slots.done), stable=True)[:F]  # free slots first
        rows = jnp.minimum(next_row + jnp.arange(F), N - 1)
        fresh = read(sharding.take_rows(prompts, rows, rules), rows)
        if num_shards == 1:
            return jax.lax.fori_loop(
                0, wanted(next_row), lambda i, old: _replace(old, fresh, i, order[i]), (cache, slots)
            )
        taken = (order == jnp.arange(B)[:, None]) & (jnp.arange(F) < wanted(next_row))  # [B, F]
        new, source = along_batch(jnp.any(taken, 1)), jnp.argmax(taken, 1)
        return _merge((cache, slots), fresh, new, source, rules)

    def fill(carry):
        clock, next_row, cache, slots, out = carry
        cache, slots = refill(next_row, cache, slots)
        next_row = next_row + wanted(next_row)

        def busy(carry):
            free = jnp.sum(carry[2].done.astype(jnp.int32))
            enough = (next_row < N) & (free >= wanted(next_row))
            return (free < B) & ~enough

        clock, cache, slots = jax.lax.while_loop(busy, decode, (clock, cache, slots))
        held = sharding.replicate(slots)
        here = held.row == jnp.arange(N)[:, None]  # [N, B]
        place, known = jnp.argmax(here, 1), along_batch(jnp.any(here, 1))
        found = sharding.take_rows((held.tokens, held.log_probs, held.age), place, rules)
        out = jax.tree.map(lambda new, old: jnp.where(_wide(known, old.ndim, 0), new, old), found, out)
        return clock, next_row, cache, slots, out

    def unfinished(carry):
        _, next_row, _, slots, _ = carry
        return (next_row < N) | ~jnp.all(slots.done)

    nothing = empty(N)
    slots = empty(B)._replace(row=empty(B).row + N)
    carry = jnp.int32(0), jnp.int32(0), cache, slots, (nothing.tokens, nothing.log_probs, nothing.age)
    *_, (tokens, log_probs, age) = jax.lax.while_loop(unfinished, fill, carry)
    return append_response(prompts, tokens, jnp.arange(R) < age[:, None], log_probs)


def _each(x: Array, samples: int, rules: AxisRules) -> Array:
    """Every `samples`-th row of [N, ...]."""
    if samples == 1:
        return x
    rest = x.shape[1:]
    spec = rules.spec("batch", None, *[None] * len(rest))
    return jnp.reshape(x, (x.shape[0] // samples, samples, *rest), out_sharding=spec)[:, 0]


def _repeat(x: Array, times: int, axis: int = 0) -> Array:
    """Every row so many times, one after the other."""
    if times == 1:
        return x
    spec = jax.typeof(x).sharding.spec
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*x.shape[: axis + 1], times, *x.shape[axis + 1 :]))
    return jnp.reshape(wide, (*x.shape[:axis], -1, *x.shape[axis + 1 :]), out_sharding=spec)


def _wide(mask: Array, ndim: int, axis: int) -> Array:
    """mask [B] as [1, .., B, .., 1]."""
    return mask.reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1))


def _put(cache: KVCache, fresh: KVCache) -> KVCache:
    """A cache with one of fewer slots and the same rows at its beginning."""
    put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)  # noqa: E731
    return jax.tree.map(put, cache._replace(index=fresh.index), fresh)


def _replace(old, fresh, source: Array, place: Array):
    """`_merge` of one row, the fresh one of number `source`, on devices that hold all: others are not touched.

    Args:
      old, fresh: of `_merge`.
      source, place: [] int32, its slot there and here.
    """

    def one(old: Array, fresh: Array, axis: int = 0) -> Array:
        row = jax.lax.dynamic_slice_in_dim(fresh, source, 1, axis)
        return jax.lax.dynamic_update_slice(old, row, (0,) * axis + (place,) + (0,) * (old.ndim - axis - 1))

    segments = old[0].segments
    empty = jax.lax.dynamic_update_slice(segments, jnp.zeros_like(segments[:1]), (place, 0))
    return _each_array(one, old, fresh, empty)


def _merge(old, fresh, new: Array, source: Array, rules: AxisRules):
    """Slots that begin with new rows.

    Args:
      old, fresh: (cache of P + R, slots) [B], and (cache of P, slots) [F].
      new: [B] bool.
      source: [B] int32, their rows among the fresh ones.
      rules: the layout.
    """

    def taken(x: Array, axis: int) -> Array:
        spec = jax.typeof(x).sharding.spec
        x = jax.sharding.reshard(x, jax.P(*spec[:axis], None, *spec[axis + 1 :]))
        at = (slice(None),) * axis + (source,)
        return x.at[at].get(out_sharding=spec)

    def one(old: Array, fresh: Array, axis: int = 0) -> Array:
        """`fresh` may have fewer slots: what stands behind them stays."""
        part = jax.lax.slice(old, (0,) * old.ndim, (*old.shape[: axis + 1], *fresh.shape[axis + 1 :]))
        mixed = jnp.where(_wide(new, old.ndim, axis), taken(fresh, axis), part)
        return jax.lax.dynamic_update_slice(old, mixed, (0,) * old.ndim)

    empty = jnp.where(new[:, None], 0, old[0].segments)  # what the row before has left
    return _each_array(one, old, fresh, empty)


def _each_array(one, old, fresh, segments: Array):
    """(cache, slots) by `one(old, fresh, axis of the rows)` of each array; `segments` stand for those of the cache."""
    (cache, slots), (few, begun) = old, fresh
    of_layers = lambda old, new, row: jax.tree.map(lambda x, y: one(x, y, x.ndim - row), old, new)  # noqa: E731
    cache = KVCache(
        of_layers(cache.k, few.k, 5), of_layers(cache.v, few.v, 4), one(segments, few.segments),
        one(cache.positions, few.positions), cache.index,
    )  # fmt: skip
    return cache, jax.tree.map(one, slots, begun)
