"""Sampling from a decoder with a KV cache.

The forward function and the temperature are those of training (`Transformer.__call__`, `losses.token_log_probs`), and
the log-probs of the sampled tokens come back with them, so a PPO ratio is 1 at the first update of every rollout.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.config import SamplingConfig
from pit_jax.models.transformer import Transformer, init_cache
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


def generate(
    params: Params,
    prompts: PromptBatch,
    key: Array,
    *,
    model: Transformer,
    config: SamplingConfig,
    eos_id: int,
    stop: tuple[int, ...] = (),
) -> Rollout:
    """Samples one response per prompt.

    The noise of a row depends on its key and the step only, so a row does not depend on its batch-mates.

    Args:
      params: of `model`, in the layout of `model.rules` (DECODE_RULES gathers weights once, not once per token).
      prompts: left-padded prompts.
      key: typed PRNG key, of which each row takes its own by its number; or one key per row, [B].
      model: the decoder.
      config: sampling settings; temperature 0 is greedy, and log_probs are then those of temperature 1.
      eos_id: ends a response; it is part of the response and of its mask.
      stop: ids that end a response as well where it ends with all of them; they are part of it too.

    Returns:
      A Rollout with R = config.max_new_tokens; the loop ends early when all rows have ended.
    """
    B, P = prompts.tokens.shape
    R = config.max_new_tokens
    rules = model.rules
    rows = rules.spec("batch", None)
    segments, positions = prompt_layout(prompts)
    cache = init_cache(model.config, B, P + R, rules)
    hidden, cache = model.apply(params, prompts.tokens, segments, positions, cache)
    logits_of = lambda h: model.apply(params, h, method=Transformer.logits)  # noqa: E731
    row_keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))

    def pick(logits: Array, step: Array) -> tuple[Array, Array]:
        logits = jax.sharding.reshard(logits, rows)  # top_k and argmax want the whole vocabulary of a row
        if config.temperature == 0.0:
            token = jnp.argmax(logits, -1)
        else:
            logits = restrict(logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
            keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
            noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32))(keys)
            token = jnp.argmax(logits + jax.sharding.reshard(noise, rows), -1)
        chosen = jnp.arange(logits.shape[-1])[None, :] == token[:, None]
        log_prob = jnp.sum(jnp.where(chosen, logits, 0.0), -1) - jax.nn.logsumexp(logits, -1)
        return token.astype(jnp.int32), log_prob

    zeros = lambda dtype: jnp.zeros((B, R), dtype, out_sharding=rows)  # noqa: E731
    initial = (
        jnp.int32(0),
        cache,
        logits_of(hidden[:, -1]),
        zeros(jnp.int32),
        zeros(jnp.float32),
        zeros(jnp.bool_),
        jnp.zeros((B,), jnp.bool_, out_sharding=rules.spec("batch")),
    )

    def unfinished(carry):
        step, *_, done = carry
        return (step < R) & ~jnp.all(done)

    def body(carry):
        step, cache, logits, tokens, log_probs, mask, done = carry
        token, log_prob = pick(logits, step)
        here = (jnp.arange(R) == step)[None, :] & ~done[:, None]
        tokens = jnp.where(here, token[:, None], tokens)
        log_probs = jnp.where(here, log_prob[:, None], log_probs)
        mask = mask | here
        alive = (~done).astype(jnp.int32)[:, None]
        ended = token == eos_id
        if stop:
            n = len(stop)
            last = jax.lax.dynamic_slice_in_dim(tokens, step - (n - 1), n, axis=1)  # clamped before step n - 1
            ended |= (step >= n - 1) & jnp.all(last == jnp.asarray(stop, jnp.int32), axis=1)
        hidden, cache = model.apply(params, token[:, None], alive, (prompts.lengths + step)[:, None], cache)
        return step + 1, cache, logits_of(hidden[:, 0]), tokens, log_probs, mask, done | ended

    _, _, _, tokens, log_probs, mask, _ = jax.lax.while_loop(unfinished, body, initial)
    return append_response(prompts, tokens, mask, log_probs)
