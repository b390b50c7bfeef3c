"""The decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP; scanned over layers.

What Llama, Mistral, Qwen and Gemma add to that are fields of `ModelConfig`, whose defaults leave it away. Low-rank
adapters (`models/lora.py`) are no field: where variables have a collection "lora" beside "params", it is read.

Flax Linen is used thinly: a module is a pure `apply(params, ...)`, and policy, reference, value and reward models are
the same stateless modules with different parameter trees. Weights are stored with `AxisRules` specs and gathered over
the FSDP axis just before use (`_weight`), which on a mesh with one device is free.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pit_jax.config import LAYER_MATRICES, ModelConfig
from pit_jax.models.attention import Places, attention, attention_to_cache, platform, reach_of, self_attention, sight
from pit_jax.sharding import RULES, AxisRules, gather_weights
from pit_jax.types import Array, Params


class KVCache(NamedTuple):
    """Keys and values of all layers, updated in place.

    The slots of keys stand last, so that the product with a query reads along them; on a CPU in n blocks of s, each of
    which is read from one end to the other.

    Attributes:
      k: [L, B, K, n, H, s] with n * s = S; or L arrays, where the layers are apart.
      v: [L, B, K, S, H]; or L arrays.
      segments: [B, S] int32, 0 where nothing valid is stored.
      positions: [B, S] int32, which say how far back a key is: slots are in any order.
      index: [] int32, the slot that the next token is written to, the same for all rows.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    segments: Array
    positions: Array
    index: Array


SLOTS = 64
"""In a block of keys on a CPU: of 32 and 64 each is read three times as fast as of all slots."""


def init_cache(
    config: ModelConfig, batch_size: int, length: int, rules: AxisRules = RULES, apart: bool = False
) -> KVCache:
    """An empty cache for at least `length` slots; `apart` where the layers are (`layers_apart`)."""
    K, H = config.num_kv_heads, config.head_dim
    size = SLOTS if apart else length
    n = -(-length // size)

    def zeros(*shape: int):
        spec = rules.spec("batch", "heads", *[None] * (len(shape) - 2))
        if apart:
            return tuple(jnp.zeros(shape, config.dtype, out_sharding=spec) for _ in range(config.num_layers))
        return jnp.zeros((config.num_layers, *shape), config.dtype, out_sharding=jax.P(None, *spec))

    slots = lambda: jnp.zeros((batch_size, n * size), jnp.int32, out_sharding=rules.spec("batch", None))  # noqa: E731
    k, v = zeros(batch_size, K, n, H, size), zeros(batch_size, K, n * size, H)
    return KVCache(k, v, slots(), slots(), jnp.int32(0))


def layers_apart(params: Params, config: ModelConfig, length: int) -> Params:
    """Variables with "layers" as a tuple of the trees of each layer, for a decoder that goes through them one by one.

    On a CPU a loop over stacked layers copies the weights and the cache of each layer for every token; the compiler of
    other devices reads them where they are, and a loop has less to compile. Matrices come to a collection "rows", in
    which outputs stand first (`times_rows`), and those of one input are one; and so do the cosines and sines of
    positions, which fusions would make again for every entry of a query.

    Args:
      params: of a Transformer.
      config: its sizes.
      length: positions that rows have at most.
    """

    def apart(tree):
        stacked = tree["layers"]
        length = len(jax.tree.leaves(stacked)[0])
        return {**tree, "layers": tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(length))}

    def rows(layer, w):
        qkv = jnp.concatenate([w["q"], w["k"][:, :, None], w["v"][:, :, None]], axis=2)
        gate_up = jnp.stack([w["gate"], w["up"]], axis=-1)
        return {
            "qkv": jnp.moveaxis(qkv, 0, -1), "o": jnp.moveaxis(w["o"], -1, 0),
            "gate_up": jnp.moveaxis(gate_up, 0, -1), "down": w["down"].T,
            "turns": _turns(jnp.arange(length), _kind(config, layer)[1]),
        }  # fmt: skip

    found = {name: apart(tree) if "layers" in tree else tree for name, tree in params.items()}
    layers = found["params"]["layers"]
    rest = tuple({name: x for name, x in layer.items() if name not in LAYER_MATRICES} for layer in layers)
    of_rows = tuple(rows(i, layer) for i, layer in enumerate(layers))
    return found | {"params": {**found["params"], "layers": rest}, "rows": {"layers": of_rows}}


def rotary(x: Array, positions: Array, theta: float | Array) -> Array:
    """Rotary position embedding (Su et al. 2021), halves convention.

    Args:
      x: [B, T, ..., H].
      positions: [B, T].
      theta: the base, or the frequencies themselves, [H / 2] (`rotary_frequencies`).
    """
    return _turned(x, *_turns(positions, _powers(theta, x.shape[-1] // 2) if isinstance(theta, float) else theta))


def _turns(positions: Array, frequency: Array) -> tuple[Array, Array]:
    """Cosines and sines, [..., H / 2]."""
    angle = positions.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    """x [B, T, ..., H] by cos and sin [B, T, H / 2]."""
    half, between = x.shape[-1] // 2, (1,) * (x.ndim - 3)
    if platform() == "cpu":
        # What a concatenation is fused with is computed entry by entry there, as each could be of either half.
        shape = *cos.shape[:2], *between, 2, half
        cos, sin = jnp.stack([cos, cos], -2).reshape(shape), jnp.stack([-sin, sin], -2).reshape(shape)
        halves = x.reshape(*x.shape[:-1], 2, half)
        return (halves * cos.astype(x.dtype) + jnp.flip(halves, -2) * sin.astype(x.dtype)).reshape(x.shape)
    shape = *cos.shape[:2], *between, half
    cos, sin = cos.reshape(shape).astype(x.dtype), sin.reshape(shape).astype(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def _powers(theta: float, half: int) -> Array:
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def rotary_frequencies(config: ModelConfig) -> tuple[Array, Array]:
    """Radians per position, [H / 2], of layers that see everything and of layers with a sliding window.

    rope_scaling=linear divides all by the factor (Chen et al. 2023). llama3 (Llama 3.1) divides those whose wave is
    longer than rope_original_length / rope_low_freq_factor, leaves those shorter than rope_original_length /
    rope_high_freq_factor, and blends in between.
    """
    c, half = config, config.head_dim // 2
    plain = frequency = _powers(c.rope_theta, half)
    if c.rope_scaling == "linear":
        frequency = plain / c.rope_factor
    if c.rope_scaling == "llama3":
        waves = c.rope_original_length * plain / (2 * jnp.pi)  # that fit into the length of pretraining
        kept = (waves - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor)
        kept = jnp.clip(kept, 0.0, 1.0)
        frequency = plain * (kept + (1.0 - kept) / c.rope_factor)
    return frequency, _powers(c.local_rope_theta, half) if c.local_rope_theta else frequency


def project(x: Array, weight: Array, spec: jax.P, dtype=None) -> Array:
    """x [B, T, ...] times weight [..., ...]: contracts all of x behind T with as many leading axes of the weight.

    One product of two matrices: on CPU the gradient of the einsum over (B, T) costs twice as much.

    Args:
      x: activations, contracted over everything behind [B, T].
      weight: its leading axes are those of x behind [B, T].
      spec: layout of the result.
      dtype: of the sums and of the result; None: that of x.
    """
    B, T = x.shape[:2]
    inner = x.ndim - 2
    of_x, of_weight = jax.typeof(x).sharding.spec, jax.typeof(weight).sharding.spec
    rows = jnp.reshape(x, (B * T, -1), out_sharding=jax.P(of_x[0], of_x[2]))
    columns = jnp.reshape(weight, (rows.shape[1], -1), out_sharding=jax.P(of_weight[0], of_weight[inner]))
    out = jnp.dot(rows, columns, preferred_element_type=dtype, out_sharding=jax.P(spec[0], spec[2]))
    return jnp.reshape(out, (B, T, *weight.shape[inner:]), out_sharding=spec)


def times_rows(x: Array, weight: Array, spec: jax.P) -> Array:
    """`project`, to float32, with a weight [outputs ..., inputs ...].

    Where there is one token per row, a weight is read once for few of them, and on a CPU fastest along its rows: it is
    multiplied by columns of x. The barriers keep the compiler from turning that round.
    """
    B, T = x.shape[:2]
    outer = weight.ndim - x.ndim + 2
    of_x, of_weight = jax.typeof(x).sharding.spec, jax.typeof(weight).sharding.spec
    shape = weight.shape[:outer]
    x = jnp.reshape(x, (B * T, -1), out_sharding=jax.P(of_x[0], of_x[2]))
    weight = jnp.reshape(weight, (-1, x.shape[1]), out_sharding=jax.P(of_weight[0], of_weight[outer]))
    times = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    if T == 1:
        column = jax.lax.optimization_barrier(x.T)
        out = times(weight, column, (((1,), (0,)), ((), ())), out_sharding=jax.P(spec[2], spec[0]))
        out = jax.lax.optimization_barrier(out).T
    else:
        out = times(x, weight, (((1,), (1,)), ((), ())), out_sharding=jax.P(spec[0], spec[2]))
    return jnp.reshape(out, (B, T, *shape), out_sharding=spec)


@jax.custom_vjp
def _scaled(x: Array, scale: Array) -> Array:
    """x [..., D] times scale [D]. The gradient of the scale is a product, as a CPU is slow at sums of rows."""
    return x * scale


def _scaled_forward(x: Array, scale: Array):
    return x * scale, (x, scale)


def _scaled_backward(kept, d: Array):
    x, scale = kept
    rows = tuple(range(x.ndim - 1))
    spec = jax.typeof(scale).sharding.spec
    return d * scale, jax.lax.dot_general(jnp.ones_like(x[..., 0]), d * x, ((rows, rows), ((), ())), out_sharding=spec)


_scaled.defvjp(_scaled_forward, _scaled_backward)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), in float32, times `offset` + scale."""

    epsilon: float
    dtype: Any
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],), jnp.float32)
        scale = scale + self.offset if self.offset else scale
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (_scaled(x, scale) if platform() == "cpu" else x * scale).astype(self.dtype)


def picked(x: Array, read: Array | slice | None) -> Array:
    """x [B, T, ...] at slots that are [B, R] int32, the same in all rows, or (None) all."""
    if read is None:
        return x
    return x[:, read] if isinstance(read, slice) else jax.vmap(lambda row, at: row[at])(x, read)


def _kind(config: ModelConfig, layer: Array | int) -> tuple[Array | None, Array]:
    """(whether it sees all, of `reach_of`; rotary frequencies): all in which layers with a window differ."""
    c = config
    far, near = rotary_frequencies(c)
    if not c.sliding_window:
        return None, far
    if not c.global_every:
        return None, near
    is_global = (layer + 1) % c.global_every == 0
    return is_global, jnp.where(is_global, far, near)


class Block(nn.Module):
    """One layer. The carry is (x [B, T, D], keys and values of all layers or None, layer number).

    `queries` are where the tokens of x stand. They see each other; or `keys`, what is in the cache. Of `read`, see
    `picked`, is what it returns; the others are seen by these all the same.
    """

    config: ModelConfig
    rules: AxisRules
    last_only: bool = False  # whether what it adds to tokens before the last one is left out

    def _weight(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        fan_in: int,
        scale: float = 1.0,
        start: Array | None = None,
    ):
        """A weight stored in its FSDP layout, gathered for use; `start` is added to its random start."""
        random = _normal(scale * fan_in**-0.5, self.rules.spec(*axes))

        def init(key, shape, dtype):
            value = random(key, shape, dtype)
            return value if start is None else value + jax.sharding.reshard(start, self.rules.spec(*axes))

        weight = self.param(name, init, shape, jnp.float32)
        gathered = dataclasses.replace(self.rules, embed=None).spec(*axes)
        return jax.sharding.reshard(weight.astype(self.config.dtype), gathered)

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_epsilon, self.config.dtype, self.config.norm_offset, name=name)

    def _biased(self, name: str, x: Array, axes: tuple[str | None, ...]) -> Array:
        """x [B, T, ...] plus a bias of the axes behind [B, T]."""
        zeros = lambda _, shape, dtype: jnp.zeros(shape, dtype, out_sharding=self.rules.spec(*axes))  # noqa: E731
        return x + self.param(name, zeros, x.shape[2:], jnp.float32).astype(self.config.dtype)

    def _rows(self, name: str, x: Array, axes: tuple[str | None, ...], spec: jax.P) -> Array:
        """`_project` with a weight of `layers_apart`."""
        weight = self.get_variable("rows", name).astype(self.config.dtype)
        weight = jax.sharding.reshard(weight, dataclasses.replace(self.rules, embed=None).spec(*axes))
        return self._adapted(name, x, times_rows(x, weight, spec).astype(self.config.dtype), spec)

    def _project(self, name: str, x: Array, weight: Array, spec: jax.P) -> Array:
        """`project`, plus what adapters add."""
        return self._adapted(name, x, project(x, weight, spec), spec)

    def _adapted(self, name: str, x: Array, out: Array, spec: jax.P) -> Array:
        """out + scale * (x A) B where the variables have adapters for the weight of this name."""
        if not self.has_variable("lora", name):
            return out
        cast = lambda v: v.astype(self.config.dtype)  # noqa: E731
        adapter = gather_weights(jax.tree.map(cast, self.get_variable("lora", name)), self.rules)
        low = project(x, adapter["a"], self.rules.spec("batch", None, None))
        return out + project(low * cast(self.get_variable("lora", "scale")), adapter["b"], spec)

    @nn.compact
    def __call__(self, carry, queries: Places, keys: Places | None, read: Array | slice | None = None):
        x, cache, layer = carry
        c, rules = self.config, self.rules
        D, F, K, H = c.d_model, c.mlp_dim, c.num_kv_heads, c.head_dim
        G = c.num_heads // K
        out_scale = (2 * c.num_layers) ** -0.5
        is_global, frequency = _kind(c, layer)
        in_rows = self.has_variable("rows", "qkv")

        with jax.named_scope("attention"):
            y = self._norm("attention_norm")(x)
            heads = rules.spec("batch", None, "heads", None)
            grouped = rules.spec("batch", None, "heads", None, None)
            if in_rows:
                qkv = self._rows("qkv", y, ("heads", None, None, "embed"), grouped)
                q, k, v = qkv[:, :, :, :G], qkv[:, :, :, G], qkv[:, :, :, G + 1]
                q = self._adapted("q", y, q, grouped)
                k, v = self._adapted("k", y, k, heads), self._adapted("v", y, v, heads)
            else:
                q = self._weight("q", (D, K, G, H), ("embed", "heads", None, None), D)
                q = self._project("q", y, q, grouped)
                k = self._project("k", y, self._weight("k", (D, K, H), ("embed", "heads", None), D), heads)
                v_weight = self._weight("v", (D, K, H), ("embed", "heads", None), D)
                v = self._project("v", y, v_weight, heads)
            if c.qkv_bias:
                q = self._biased("q_bias", q, ("heads", None, None))
                k, v = self._biased("k_bias", k, ("heads", None)), self._biased("v_bias", v, ("heads", None))
            if c.qk_norm:
                q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
            if in_rows:
                by_row = rules.spec("batch", None, None)
                turns = (
                    table.at[queries.positions].get(out_sharding=by_row) for table in self.get_variable("rows", "turns")
                )
            else:
                turns = _turns(queries.positions, frequency)
            cos, sin = turns
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
            how = {"query_scale": c.query_scale, "softcap": c.attention_softcap}
            if cache is not None:
                cache = _write(cache, layer, k, v)
            if self.last_only and keys is None:
                mask = sight(queries.cut(-1, None), queries, reach_of(c.sliding_window, is_global))
                x, y = x[:, -1:], attention(q[:, -1:], k, v, mask, **how)
            elif keys is None:
                how |= {"kind": c.attention, "window": c.sliding_window, "block": c.attention_block}
                y = self_attention(q, k, v, queries, is_global, **how)
            else:
                mask = sight(queries, keys, reach_of(c.sliding_window, is_global))
                y = attention_to_cache(q, _of_layer(cache.k, layer), _of_layer(cache.v, layer), mask, **how)
            x, y = picked(x, read), picked(y, read)
            narrow = rules.spec("batch", None, None)
            if in_rows:
                y = self._rows("o", y, ("embed", "heads", None, None), narrow)
            else:
                start = None
                if c.copy_init:
                    # Heads that pass on what they attend to: without this a small model needs several times the steps
                    # before it copies a word of the prompt (Trockman and Kolter 2023, mimetic initialization).
                    transposed = c.copy_init * v_weight.astype(jnp.float32).transpose(1, 2, 0)
                    start = jnp.broadcast_to(transposed[:, None], (K, G, H, D))
                axes = ("heads", None, None, "embed")
                o = self._weight("o", (K, G, H, D), axes, c.num_heads * H, out_scale, start)
                y = self._project("o", y, o, narrow)
            x = x + (self._norm("attention_post_norm")(y) if c.post_norms else y)
        with jax.named_scope("mlp"):
            y = self._norm("mlp_norm")(x)
            wide = rules.spec("batch", None, "mlp")
            if in_rows:
                both = self._rows("gate_up", y, ("mlp", None, "embed"), rules.spec("batch", None, "mlp", None))
                gate, up = (self._adapted(name, y, both[..., i], wide) for i, name in enumerate(("gate", "up")))
            else:
                gate = self._project("gate", y, self._weight("gate", (D, F), ("embed", "mlp"), D), wide)
                up = self._project("up", y, self._weight("up", (D, F), ("embed", "mlp"), D), wide)
                down = self._weight("down", (F, D), ("mlp", "embed"), F, out_scale)
            # The gradient makes the activation again: it is soon made, and kept it would be as large as all of this.
            activation = nn.silu if c.activation == "silu" else functools.partial(nn.gelu, approximate=True)
            y = jax.checkpoint(lambda gate, up: activation(gate) * up)(gate, up)
            y = self._rows("down", y, ("embed", "mlp"), narrow) if in_rows else self._project("down", y, down, narrow)
            x = x + (self._norm("mlp_post_norm")(y) if c.post_norms else y)
        return (x, cache, layer + 1), None


def _normal(stddev: float, spec: jax.P):
    """Normal initializer whose array is born with `spec`, never whole on one device."""

    def init(key, shape, dtype):
        return stddev * jax.random.normal(key, shape, dtype, out_sharding=spec)

    return init


def _write(cache: KVCache, layer: Array | int, k: Array, v: Array) -> KVCache:
    """The cache with k, v [B, T, K, H] at (layer, index), or at its beginning where T > 1."""
    B, T, K, H = k.shape
    size = jax.tree.leaves(cache.k)[0].shape[-1]
    if T == 1:
        block, slot, size = cache.index // size, cache.index % size, 1
    else:
        block, slot = 0, 0
        k = jnp.pad(k, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
    rows, _, heads, _ = jax.typeof(k).sharding.spec
    k = jnp.reshape(k, (B, -1, size, K, H), out_sharding=jax.P(rows, None, None, heads, None))
    k, v = k.transpose(0, 3, 1, 4, 2), v.transpose(0, 2, 1, 3)
    at_k, at_v = (0, 0, block, 0, slot), (0, 0, cache.index, 0)
    if isinstance(cache.k, tuple):
        put = lambda all, new, at: (  # noqa: E731
            *all[:layer], jax.lax.dynamic_update_slice(all[layer], new, at), *all[layer + 1 :],
        )  # fmt: skip
    else:
        put = lambda all, new, at: jax.lax.dynamic_update_slice(all, new[None], (layer, *at))  # noqa: E731
    return cache._replace(k=put(cache.k, k, at_k), v=put(cache.v, v, at_v))


def _of_layer(all: Array | tuple[Array, ...], layer: Array | int) -> Array:
    return all[layer] if isinstance(all, tuple) else jax.lax.dynamic_index_in_dim(all, layer, 0, keepdims=False)


def _unrolled(config: ModelConfig) -> int:
    """Layers at a time: all of a few on a CPU, where a loop copies what is kept for the gradient of each; else one.

    What is made again for the gradient must stay in a loop.
    """
    c = config
    return c.num_layers if platform() == "cpu" and c.remat == "none" and c.num_layers <= 8 else 1


def _each(stacked: Params, length: int) -> list[Params]:
    """The tree of each layer. Parts and not slices, each of whose gradients would be as large as all layers."""
    parts = jax.tree.map(lambda x: [jnp.squeeze(part, 0) for part in jax.lax.split(x, [1] * length)], stacked)
    return [jax.tree.map(lambda _, of, i=i: of[i], stacked, parts) for i in range(length)]


class Transformer(nn.Module):
    """A decoder-only language model.

    Attributes:
      config: sizes.
      rules: layout of parameters and activations.
      with_unembed: False where only hidden states are read and no untied unembedding should exist.
    """

    config: ModelConfig
    rules: AxisRules = RULES
    with_unembed: bool = True

    def setup(self):
        c = self.config
        # Token rows of the embedding have unit scale after the multiplication in `__call__`.
        init = _normal(c.d_model**-0.5, self.rules.spec("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.float32)
        if self.with_unembed and not c.tie_embeddings:
            self.unembedding = self.param("unembedding", init, (c.vocab_size, c.d_model), jnp.float32)
        block = Block
        if c.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=_unrolled(c),
        )(c, self.rules)
        self.norm = RMSNorm(c.norm_epsilon, c.dtype, c.norm_offset)

    def __call__(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        cache: KVCache | None = None,
        members: Array | None = None,
        last_only: bool = False,
        read: Array | slice | None = None,
    ):
        """Hidden states before the unembedding.

        Args:
          tokens: [B, T] int32.
          segments: [B, T] int32; positions attend within their own segment only, 0 is padding.
          positions: [B, T] int32, place in the segment, or in the row: for the rotary embedding and sliding windows
            (where a kernel attends, a window counts slots: see `self_attention`).
          cache: keys and values of earlier tokens, to which one per row is added at `cache.index`; or an empty one, to
            which all T are. Then tokens see each other, and else what the cache holds.
          members: [B, T] int32 sets of rows as bits, for rows that share what they begin with (`ScoreBatch`): a token
            attends to those that stand in all of its rows. Not with a cache.
          last_only: whether T is 1 in what is returned: the last token.
          read: the slots whose hidden states are returned, of `picked`. Where layers are not a loop, the last one makes
            no more than that. Not with a cache.

        Returns:
          (hidden [B, T, D] or [B, R, D], the cache with the new tokens, or None).
        """
        c, T = self.config, tokens.shape[1]
        assert cache is None or members is None, "rows that share tokens are read in one go"
        assert cache is None or read is None, "a cache is read for the next token"
        queries, keys = Places(jnp.arange(T), segments, positions, members), None
        if cache is not None:
            write = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, cache.index))  # noqa: E731
            cache = cache._replace(
                segments=write(cache.segments, segments), positions=write(cache.positions, positions)
            )
            if T == 1:
                S = cache.segments.shape[1]
                keys = Places(jnp.arange(S), cache.segments, cache.positions)
                queries = queries._replace(slots=jnp.full(1, S))  # behind all that is stored

        # The whole table is gathered for the look-up: rows of a table that is sharded over the vocabulary cannot be
        # picked by index without either this or a one-hot product over V.
        table = jax.sharding.reshard(self.embedding.astype(self.config.dtype), jax.P(None, None))
        x = table.at[tokens].get(out_sharding=self.rules.spec("batch", None, None))
        if c.embedding_scale:
            x = x * c.d_model**0.5
        of_layers = {name: tree["layers"] for name, tree in self.variables.items() if "layers" in tree}
        if "rows" in self.variables or (read is not None and _unrolled(c) > 1 and not self.is_initializing()):
            if "rows" not in self.variables:
                of_layers = {name: _each(tree, c.num_layers) for name, tree in of_layers.items()}
            for layer in range(c.num_layers):
                own = {name: layers[layer] for name, layers in of_layers.items()}
                is_last = layer == c.num_layers - 1
                block = Block(c, self.rules, last_only and is_last, parent=None)
                (x, cache, _), _ = block.apply(own, (x, cache, layer), queries, keys, read if is_last else None)
        else:
            (x, cache, _), _ = self.layers((x, cache, jnp.int32(0)), queries, keys)
            x = x[:, -1:] if last_only else picked(x, read)
        if cache is not None:
            cache = cache._replace(index=cache.index + T)
        return self.norm(x), cache

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> float32 [..., V]; -1e30 for ids that do not exist (`num_tokens`)."""
        c = self.config
        table = self.embedding if self.config.tie_embeddings else self.unembedding
        spec = dataclasses.replace(self.rules, embed=None).spec("vocab", "embed")
        table = jax.sharding.reshard(table.astype(self.config.dtype), spec)
        if "rows" in self.variables:
            wide = self.rules.spec("batch", None, "vocab")
            logits = times_rows(hidden[:, None], table, wide)[:, 0]
        elif hidden.ndim == 3:
            logits = project(hidden, table.T, self.rules.spec("batch", None, "vocab"), jnp.float32)
        else:
            logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        if c.logit_softcap:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        if 0 < c.num_tokens < c.vocab_size:
            logits = jnp.where(jnp.arange(c.vocab_size) < c.num_tokens, logits, -1e30)
        return logits

    def full_logits(self, tokens: Array, segments: Array, positions: Array) -> Array:
        """[B, T, V]: for tests and for initialisation; training goes through chunks (losses.log_probs)."""
        return self.logits(self(tokens, segments, positions)[0])


class ScalarModel(nn.Module):
    """A decoder with one number per token: a value model as it is, a reward model where the last token is read."""

    config: ModelConfig
    rules: AxisRules = RULES

    def setup(self):
        self.backbone = Transformer(self.config, self.rules, with_unembed=False)
        init = _normal(self.config.d_model**-0.5, jax.P(None))
        self.head = self.param("head", init, (self.config.d_model,), jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, (), jnp.float32)

    def __call__(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        members: Array | None = None,
        read: Array | slice | None = None,
    ) -> Array:
        """[B, T] float32, or [B, R] of those that are read; arguments as in `Transformer.__call__`."""
        hidden, _ = self.backbone(tokens, segments, positions, members=members, read=read)
        return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), self.head) + self.bias
