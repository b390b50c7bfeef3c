"""Who sees whom, and attention in the ways that a CPU, a TPU and a GPU are fast at.

`attention` is the definition: one square of scores. `self_attention` takes it in halves on a CPU, and of long sequences
another way to the same numbers, up to rounding:

    blocks   blocks of queries and keys, without those in which nobody sees anybody: the fastest on a CPU
    stripes  blocks of queries in four loops, each to all keys before its end: no branches
    splash   Pallas kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`): scores never leave the chip
    cudnn    cuDNN's fused kernel for NVIDIA GPUs
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pit_jax.types import Array


class Places(NamedTuple):
    """Where tokens stand, which decides who sees whom.

    Attributes:
      slots: [T] int32, place in the sequence: nothing sees what comes behind it.
      segments, positions, members: [B, T] int32, as in `Transformer.__call__`.
    """

    slots: Array
    segments: Array
    positions: Array
    members: Array | None = None

    def cut(self, start: int, stop: int | None) -> "Places":
        """Those of the tokens from start to stop."""
        rows = (None if x is None else x[:, start:stop] for x in self[1:])
        return Places(self.slots[start:stop], *rows)


def sight(queries: Places, keys: Places, reach: Array | None = None) -> Array:
    """[B, T, S] bool: which keys a query sees.

    Args:
      queries: T of them.
      keys: S of them.
      reach: a key is seen where it stands less than this before the query; None: however far. By positions: between a
        token and its past may lie padding, or what other rows go on with.
    """
    by_query = lambda x: x[:, :, None]  # noqa: E731
    by_key = lambda x: x[:, None, :]  # noqa: E731
    seen = queries.slots[:, None] >= keys.slots[None, :]
    seen &= (by_query(queries.segments) == by_key(keys.segments)) & (by_key(keys.segments) > 0)
    if queries.members is not None:
        seen &= (by_query(queries.members) & ~by_key(keys.members)) == 0
    if reach is not None:
        seen &= by_query(queries.positions) - by_key(keys.positions) < reach
    return seen


def sums(dtype):
    """What scores of queries of this type, and sums of their values, are kept in: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def attention(q: Array, k: Array, v: Array, mask: Array, query_scale: float = 0.0, softcap: float = 0.0) -> Array:
    """Grouped-query attention.

    Args:
      q: [B, T, K, G, H].
      k, v: [B, S, K, H].
      mask: [B, T, S], true where a query sees a key.
      query_scale: queries are divided by its square root; 0: by that of H.
      softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); 0: they stay.

    Returns:
      [B, T, K, G, H].
    """
    B, T, K, G, H = q.shape
    # The queries of a group are rows of one product with their shared keys: [B, K, G * T, H] x [B, K, H, S].
    q = (q * (query_scale or H) ** -0.5).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bkqh,bskh->bkqs", q, k, preferred_element_type=sums(q.dtype)).reshape(B, K, G, T, -1)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, -1)
    out = jnp.einsum("bkqs,bskh->bkqh", weights, v).reshape(B, K, G, T, H)
    return out.transpose(0, 3, 1, 2, 4)


def attention_to_cache(
    q: Array, k: Array, v: Array, mask: Array, query_scale: float = 0.0, softcap: float = 0.0
) -> Array:
    """`attention` of one token per row to a cache.

    Args:
      q: [B, 1, K, G, H].
      k: [B, K, n, H, s], n blocks of slots.
      v: [B, K, S, H].
      mask: [B, 1, S].
      query_scale, softcap: of `attention`.

    Returns:
      [B, 1, K, G, H].
    """
    B, _, K, G, H = q.shape
    n = k.shape[2]
    q = (q[:, 0] * (query_scale or H) ** -0.5)[:, :, None]
    q = jnp.broadcast_to(q, (B, K, n, G, H))  # else the blocks of keys would be transposed for the product
    scores = jnp.einsum("bkngh,bknhs->bkngs", q, k, preferred_element_type=sums(q.dtype))
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask.reshape(B, 1, n, 1, -1), scores, -1e30).swapaxes(2, 3)
    spec = jax.typeof(scores).sharding.spec
    scores = jnp.reshape(scores, (B, K, G, -1), out_sharding=jax.P(*spec[:3], None))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, v)[:, None]


# ------------------------------------------------------------------------------------------------------ one entrance


def reach_of(window: int, is_global: Array | None) -> Array | None:
    """`reach` of `sight`.

    Args:
      window: a token sees itself and those less than this before it; 0: all before it.
      is_global: [] bool, whether this layer sees all even so; None: no layer does.
    """
    if not window:
        return None
    if is_global is None:
        return jnp.int32(window)
    return jnp.where(is_global, jnp.iinfo(jnp.int32).max, window)


def self_attention(
    q: Array,
    k: Array,
    v: Array,
    places: Places,
    is_global: Array | None = None,
    *,
    kind: str = "auto",
    window: int = 0,
    block: int = 128,
    query_scale: float = 0.0,
    softcap: float = 0.0,
) -> Array:
    """`attention` of a whole sequence to itself; of up to two blocks as it is written there, on a CPU in halves.

    Args:
      q: [B, T, K, G, H].
      k, v: [B, T, K, H].
      places: of the T tokens, whose slots are 0, 1, ... The kernels read windows off the slots, so where there is one,
        the tokens of a segment stand side by side.
      is_global: of `reach_of`.
      kind: auto, blocks, stripes, splash or cudnn: see the top of this file.
      window: of `reach_of`.
      block: queries at a time, for blocks and stripes.
      query_scale, softcap: of `attention`.

    Raises:
      ValueError: for a kernel that cannot do this.
    """
    T, form = q.shape[1], {"query_scale": query_scale, "softcap": softcap}
    if 2 * block >= T:
        one_square = attention_in_halves if platform() == "cpu" and T >= HALVED else _of_all
        return one_square(q, k, v, places, reach_of(window, is_global), **form)
    kind = choose(
        kind, platform(), q.dtype, head_dim=q.shape[-1], softcap=softcap, is_even=T % 2 == 0,
        is_tree=places.members is not None, has_window=0 < window < T,
    )  # fmt: skip
    if kind == "splash":
        return splash_attention(q, k, v, places, is_global, window=window, **form)
    reach = reach_of(window, is_global)
    if kind == "cudnn":
        return cudnn_attention(q, k, v, sight(places, places, reach), query_scale)
    by_parts = attention_in_stripes if kind == "stripes" else attention_in_blocks
    return by_parts(q, k, v, places, reach, block, **form)


def platform() -> str:
    """cpu, tpu or gpu: what the mesh that is set is of.

    Its devices need not be there (a plan for a slice): while tracing, the mesh is abstract, but says what it is of.
    `jax.default_backend()` is this machine's, and asked only where no mesh says anything.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def choose(
    kind: str, platform: str, dtype, *, head_dim: int, softcap: float, is_even: bool, is_tree: bool, has_window: bool
) -> str:
    """blocks, stripes, splash or cudnn: what "auto" comes to, or what else is named.

    Args:
      kind: of `self_attention`.
      platform: of the devices.
      dtype: of queries, keys and values.
      head_dim, softcap: of the model.
      is_even: whether the length is.
      is_tree: whether tokens have `members`.
      has_window: whether a window is shorter than the sequence.

    Raises:
      ValueError: for a kernel that cannot do this.
    """
    against_splash = against_cudnn = ""
    if is_tree and (softcap or has_window):
        # A tree comes to splash as scores far below the others (`_apart`), which a cap would bring back; and a window
        # counts the tokens of a row, between which others may lie.
        against_splash = "rows that share tokens have no attention_softcap and no sliding_window there"
    if softcap:
        against_cudnn = "it has no attention_softcap"
    elif dtype != jnp.bfloat16:
        against_cudnn = "it is for dtype=bfloat16"
    elif head_dim % 8 or head_dim > 128:
        against_cudnn = f"head_dim={head_dim} is no multiple of 8 up to 128"
    elif not is_even:
        against_cudnn = "sequences must have an even number of tokens"
    if kind == "auto":
        if platform == "tpu":
            return "stripes" if against_splash else "splash"
        if platform == "gpu":
            return "stripes" if against_cudnn else "cudnn"
        return "blocks"
    advice = "attention=auto takes what can"
    if kind == "splash" and against_splash:
        raise ValueError(f"attention=splash: {against_splash}: {advice}")
    if kind == "cudnn" and platform != "gpu":
        raise ValueError(f"attention=cudnn is for NVIDIA GPUs, but the mesh is of {platform} devices: {advice}")
    if kind == "cudnn" and against_cudnn:
        raise ValueError(f"attention=cudnn: {against_cudnn}: {advice}")
    return kind


# ------------------------------------------------------------------------------------------------ other ways to do it


def attention_in_blocks(
    q: Array,
    k: Array,
    v: Array,
    places: Places,
    reach: Array | None = None,
    block: int = 128,
    query_scale: float = 0.0,
    softcap: float = 0.0,
) -> Array:
    """`attention` of a sequence to itself by blocks of queries and keys, without those in which nobody sees anybody.

    Of a prompt x, two candidates a and b, and two answers behind each of them (`ScoreBatch`), with one block for each:

                 keys
                 x  a aa ab  b ba bb
           x     #
           a     #  #
      q    aa    #  #  #                 # made, all others not
      u    ab    #  #  .  #              . in the triangle, but in no row together
      e    b     #  .  .  .  #
      r    ba    #  .  .  .  #  #
      y    bb    #  .  .  .  #  .  #

    Weights are kept as running sums (Dao et al. 2022) and made again for the gradient, so memory grows with T. A query
    that sees nothing, which is padding, gets zeros.

    Args:
      q: [B, T, K, G, H].
      k, v: [B, T, K, H].
      places: of the T tokens, whose slots ascend.
      reach: of `sight`.
      block: queries, and keys, at a time.
      query_scale, softcap: of `attention`.
    """
    T = q.shape[1]
    count = -(-T // block)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, count * block - T)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    cut = lambda x: jnp.moveaxis(pad(x).reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)  # noqa: E731
    slots = jnp.arange(count * block, dtype=jnp.int32).reshape(count, block)
    cut_places = Places(slots, *(None if x is None else cut(x) for x in places[1:]))  # padding has segment 0
    # [n, B, K, G, block, H] and [n, B, K, block, H].
    queries = cut(q).transpose(0, 1, 3, 4, 2, 5)
    keys, values = cut(k).transpose(0, 1, 3, 2, 4), cut(v).transpose(0, 1, 3, 2, 4)
    form = (query_scale or q.shape[-1]) ** -0.5, softcap
    reach = jnp.int32(jnp.iinfo(jnp.int32).max) if reach is None else reach
    out = _by_sight(form, queries, keys, values, cut_places, reach)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape[0], count * block, *q.shape[2:])[:, :T]


def _at(tree, i: Array):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def _over_blocks(count: int, add: Callable, start):
    """`add(j, carry)` for each block of keys.

    A `while`, which JAX takes whole: of a loop of known length it parts what depends on the gradient that comes in from
    what does not, as the gradient of a scan over layers is made, and would keep the scores of all blocks for that.
    """
    begun = jnp.int32(0), start
    return jax.lax.while_loop(lambda state: state[0] < count, lambda state: (state[0] + 1, add(*state)), begun)[1]


def _block_scores(form: tuple[float, float], q: Array, k: Array) -> Array:
    """[B, K, G, t, H] and [B, K, s, H] -> [B, K, G, t, s]."""
    scale, softcap = form
    B, K, G, t, H = q.shape
    scores = jnp.einsum("bkqh,bksh->bkqs", (q * scale).reshape(B, K, G * t, H), k, preferred_element_type=sums(q.dtype))
    scores = scores.reshape(B, K, G, t, -1)
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_sight(form, queries, keys, values, places, reach):
    return _forward(form, queries, keys, values, places, reach)[0]


def _forward(form, queries, keys, values, places, reach):
    """(what queries get, [n, B, K, G, t, H]; log of the sum of their weights, [n, B, K, G, t])."""

    def of_queries(_, row):
        q, mine = row

        def add(j, carry):
            seen = sight(mine, _at(places, j), reach)[:, None, None]

            def seen_by_some(carry):
                largest, total, mixed = carry
                scores = _block_scores(form, q, _at(keys, j))
                new = jnp.maximum(largest, jnp.max(jnp.where(seen, scores, -1e30), -1))
                weights = jnp.where(seen, jnp.exp(scores - new[..., None]), 0.0)
                shrink = jnp.exp(largest - new)
                more = _mixed(weights, _at(values, j))
                return new, total * shrink + jnp.sum(weights, -1), mixed * shrink[..., None] + more

            return jax.lax.cond(jnp.any(seen), seen_by_some, lambda carry: carry, carry)

        zeros = jnp.zeros_like(q, sums(q.dtype))
        start = zeros[..., 0] - 1e30, zeros[..., 0], zeros
        largest, total, mixed = _over_blocks(len(queries), add, start)  # nobody sees what is behind i
        total = jnp.where(total > 0, total, 1.0)
        return None, ((mixed / total[..., None]).astype(q.dtype), largest + jnp.log(total))

    return jax.lax.scan(of_queries, None, (queries, places))[1]


def _mixed(weights: Array, values: Array) -> Array:
    """[B, K, G, t, s] and [B, K, s, H] -> [B, K, G, t, H] of `sums`."""
    B, K, G, t, s = weights.shape
    weights = weights.astype(values.dtype).reshape(B, K, G * t, s)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, values, preferred_element_type=sums(values.dtype))
    return out.reshape(B, K, G, t, -1)


def _forward_and_kept(form, queries, keys, values, places, reach):
    out, logs = _forward(form, queries, keys, values, places, reach)
    return out, (queries, keys, values, places, reach, out, logs)


def _backward(form, kept, d_out):
    queries, keys, values, places, reach, out, logs = kept

    def of_queries(carry, row):
        q, mine, log, d, o = row
        d = d.astype(sums(q.dtype))
        drop = jnp.sum(d * o, -1, keepdims=True)

        def add(j, carry):
            seen = sight(mine, _at(places, j), reach)[:, None, None]

            def seen_by_some(carry):
                d_q, d_keys, d_values = carry
                k, v = _at(keys, j), _at(values, j)
                scores, back = jax.vjp(functools.partial(_block_scores, form), q, k)
                weights = jnp.where(seen, jnp.exp(scores - log[..., None]), 0.0)
                mixed, back_mixed = jax.vjp(_mixed, weights, v)
                d_weights, d_v = back_mixed(d.astype(mixed.dtype))
                more, d_k = back(weights * (d_weights - drop))
                put = lambda all, new: jax.lax.dynamic_update_index_in_dim(all, _at(all, j) + new, j, 0)  # noqa: E731
                return d_q + more, put(d_keys, d_k), put(d_values, d_v)

            return jax.lax.cond(jnp.any(seen), seen_by_some, lambda carry: carry, carry)

        d_q, *carry = _over_blocks(len(queries), add, (jnp.zeros_like(q, sums(q.dtype)), *carry))
        return tuple(carry), d_q.astype(q.dtype)

    start = tuple(jnp.zeros_like(x, sums(x.dtype)) for x in (keys, values))
    rows = queries, places, logs, d_out, out
    (d_keys, d_values), d_queries = jax.lax.scan(of_queries, start, rows)
    return d_queries, d_keys.astype(keys.dtype), d_values.astype(values.dtype), None, None


_by_sight.defvjp(_forward_and_kept, _backward)


HALVED = 128
"""Tokens of the shortest sequence that a CPU attends to in halves: a quarter of the scores is not made."""


def _of_all(q: Array, k: Array, v: Array, places: Places, reach: Array | None, **kwargs) -> Array:
    return attention(q, k, v, sight(places, places, reach), **kwargs)


def attention_in_halves(q: Array, k: Array, v: Array, places: Places, reach: Array | None = None, **kwargs) -> Array:
    """`attention` of a sequence to itself: its first half to that half, and the second to all.

    Args: as for `attention_in_blocks`. What sees nothing, which is padding, gets a mean of the values of its half.
    """
    half = q.shape[1] // 2
    first, second = places.cut(0, half), places.cut(half, None)
    of_first = _of_all(q[:, :half], k[:, :half], v[:, :half], first, reach, **kwargs)
    of_second = attention(q[:, half:], k, v, sight(second, places, reach), **kwargs)
    return jnp.concatenate([of_first, of_second], axis=1)


STRIPES = 4


def attention_in_stripes(
    q: Array, k: Array, v: Array, places: Places, reach: Array | None = None, block: int = 128, **kwargs
) -> Array:
    """`attention` of a sequence to itself, blocks of queries at a time; those of each quarter are one loop.

    A compiler sees four blocks. All of a quarter attend to as many keys as its last one: 1.25 times the scores of the
    triangle, and nothing is decided while it runs. Scores are made again for the gradient.

    Args: as for `attention_in_blocks`, of blocks at most.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(q, k, v, queries, keys, reach):
        return attention(q, k, v, sight(queries, keys, reach), **kwargs)

    T = q.shape[1]
    count = -(-T // (STRIPES * block))
    size = -(-T // (STRIPES * count * 8)) * 8  # the same number of blocks, with as little padding as there can be
    length = STRIPES * count * size
    padded = lambda x: jnp.pad(x, [(0, 0), (0, length - T)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    in_blocks = lambda x: jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)  # noqa: E731
    all_q, rows = padded(q), [None if x is None else padded(x) for x in places[1:]]
    out = []
    for a in range(0, min(T, length), count * size):
        b = a + count * size
        keys, stop = places.cut(0, min(b, T)), min(b, T)

        def one(_, of_stripe, k=k[:, :stop], v=v[:, :stop], keys=keys):
            q, queries = of_stripe
            return None, of_block(q, k, v, queries, keys, reach)

        slots = jnp.arange(a, b).reshape(count, size)
        queries = Places(slots, *(None if x is None else in_blocks(x[:, a:b]) for x in rows))
        _, y = jax.lax.scan(one, None, (in_blocks(all_q[:, a:b]), queries))
        out.append(jnp.moveaxis(y, 0, 1).reshape(q.shape[0], count * size, *q.shape[2:]))
    return jnp.concatenate(out, axis=1)[:, :T]


# A step of the kernel's grid takes as long as this many scores, by published rates of chips and rules of thumb.
_STEP = 300**2
_LARGEST = 640


def splash_block(length: int, largest: int = _LARGEST) -> int:
    """Queries and keys at a time, a multiple of 128: large ones make few steps, small ones little padding."""

    def time(size: int) -> int:
        n = -(-length // size)
        return n * (n + 1) // 2 * (size**2 + _STEP)

    return min(range(128, largest + 1, 128), key=time)


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    places: Places,
    is_global: Array | None = None,
    *,
    window: int = 0,
    query_scale: float = 0.0,
    softcap: float = 0.0,
    block: int = 0,
) -> Array:
    """`self_attention` by the Pallas kernel; what padding sees is other padding. On devices that are no TPUs it is
    interpreted, for tests.

    Args: as there, and
      block: queries and keys at a time, a multiple of 128; 0: by `splash_block`.
    """
    T, H = q.shape[1], q.shape[-1]
    block = block or splash_block(T)
    window = window if window < T else 0
    interpret = platform() != "tpu"

    def on_device(q, k, v, places, is_global):
        B, _, K, G, _ = q.shape
        q = q * (query_scale or H) ** -0.5
        if places.members is not None:
            q, k = _apart(q, k, places.members)
        pad = lambda x: jnp.pad(x, [(0, 0), (0, -T % block)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
        q, k, v, segments = (pad(x) for x in (q, k, v, places.segments))
        q = q.transpose(0, 2, 3, 1, 4).reshape(B, K * G, q.shape[1], -1)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        through = lambda window: functools.partial(  # noqa: E731
            _splash, window=window, block=block, softcap=softcap, interpret=interpret
        )
        if is_global is None or not window:
            out = through(window)(q, k, v, segments)
        else:
            out = jax.lax.cond(is_global, through(0), through(window), q, k, v, segments)
        return out[:, :, :T].reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)

    # A kernel is for one device; rows and heads do not meet in it. Specs are those of the types.
    spec = jax.typeof(q).sharding.spec
    return jax.shard_map(on_device, out_specs=spec, check_vma=False)(q, k, v, places, is_global)


def _splash(q: Array, k: Array, v: Array, segments: Array, *, window: int, block: int, softcap: float, interpret: bool):
    """q [B, N, T, E], k [B, K, T, E], v [B, K, T, H] with T a multiple of `block` -> [B, N, T, H]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and for TPUs alone

    B, N, T, _ = q.shape
    mask = splash.LocalMask((T, T), (window - 1, 0), 0) if window else splash.CausalMask((T, T))
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask]),  # the same for all heads
        block_sizes=splash.BlockSizes(*[block] * 8),
        head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap or None, interpret=interpret,
    )  # fmt: skip
    n = T // block
    seen = sum(not window or (i - j - 1) * block + 1 < window for i in range(n) for j in range(i + 1))
    with jax.named_scope(f"kernel_runs_{B * N * seen}"):  # for cost.matmul_flops
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))


_APART = 2.0**15
_MOST_ROWS = 32  # bits of `members`


def _apart(q: Array, k: Array, members: Array) -> tuple[Array, Array]:
    """Queries and keys with 32 more entries, whose product is 0 where a key stands in all rows of a query, and else
    -2**15 for each in which it does not: of such a score the exponential is 0, behind any other.

    The kernel has no mask that depends on the values of both sides, but for segments that are equal. The products are
    of powers of two, and so are exact in every dtype.

    Args:
      q: [B, T, K, G, H].
      k: [B, T, K, H].
      members: [B, T] int32.
    """
    B, T, K, G, _ = q.shape
    stands = (members[:, :, None] >> jnp.arange(_MOST_ROWS) & 1).astype(q.dtype)
    of_q = jnp.broadcast_to((-_APART * stands)[:, :, None, None], (B, T, K, G, _MOST_ROWS))
    of_k = jnp.broadcast_to((1 - stands)[:, :, None], (B, T, K, _MOST_ROWS))
    return jnp.concatenate([q, of_q], -1), jnp.concatenate([k, of_k], -1)


def cudnn_attention(q: Array, k: Array, v: Array, mask: Array, query_scale: float = 0.0) -> Array:
    """`attention` by cuDNN, for bfloat16 on NVIDIA GPUs: no score is in memory but the mask is, as a number each.

    Args: as there; `mask` shows no key that comes behind its query.
    """
    H = q.shape[-1]

    def on_device(q, k, v, mask):
        B, T, K, G, _ = q.shape
        out = jax.nn.dot_product_attention(
            q.reshape(B, T, K * G, H), k, v, mask=mask[:, None], scale=(query_scale or H) ** -0.5, is_causal=True,
            implementation="cudnn",
        )  # fmt: skip
        return out.reshape(B, T, K, G, H)

    spec = jax.typeof(q).sharding.spec
    return jax.shard_map(on_device, out_specs=spec, check_vma=False)(q, k, v, mask)
