"""The decoder: a forward pass in NumPy, who sees whom, the KV cache, packing, rotary positions, its parameters."""

import dataclasses
import functools
import inspect
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax import config as config_lib, cost, programs, sampling, sharding
from pit_jax.config import ModelConfig
from pit_jax.data import batches
from pit_jax.learners import sft
from pit_jax.models import attention, transformer
from pit_jax.models.transformer import ScalarModel, Transformer, init_cache, rotary
from pit_jax.pipelines.common import init_params, shapes
from pit_jax.types import PromptBatch

pytestmark = pytest.mark.usefixtures("one_device")

TINY = ModelConfig(vocab_size=32, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
CONFIGS = Path(__file__).parent.parent / "configs"


@functools.cache
def made(config=TINY, scalar=False):
    """(module, parameters). Weights are tripled, so that layers and attention matter beside the residual stream."""
    model = ScalarModel(config) if scalar else Transformer(config)
    params = init_params(model, jax.random.key(0))
    return model, jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params)


def put(*arrays):
    return sharding.shard_batch(tuple(np.asarray(x) for x in arrays))


def plain(tokens):
    """(tokens, segments, positions) of rows without padding."""
    tokens = np.asarray(tokens, np.int32)
    return put(tokens, np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape))


def padded(rows, left, length):
    """(tokens, segments, positions) of rows with `left` slots of garbage before them, and garbage behind."""
    tokens = np.full((len(rows), length), 31, np.int32)
    segments, positions = np.zeros_like(tokens), np.full_like(tokens, 5)
    for i, row in enumerate(rows):
        here = slice(left, left + len(row))
        tokens[i, here], segments[i, here], positions[i, here] = row, 1, np.arange(len(row))
    return put(tokens, segments, positions)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, params, *arrays):
    return model.apply(params, *arrays)[0]


def hidden_of(model, params, arrays):
    return np.asarray(_hidden(model, params, *arrays))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, *arrays):
    return model.apply(params, *arrays, method=Transformer.full_logits)


def numpy_logits(c, params, tokens):
    """Logits [T, V] of one row in float64, head by head: the architecture written a second time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    length, half = len(tokens), c.head_dim // 2
    norm = lambda x, scale: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.norm_epsilon) * scale  # noqa: E731
    # Entries i and i + H/2 of a head are one complex number, which position t turns by t * theta^(-i / (H/2)).
    turn = np.exp(1j * np.outer(np.arange(length), c.rope_theta ** (-np.arange(half) / half)))

    def rotated(x):
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = p["embedding"][tokens] * np.sqrt(c.d_model)
    for i in range(c.num_layers):
        w = {name: value[i] for name, value in p["layers"].items() if not name.endswith("norm")}
        y = norm(x, p["layers"]["attention_norm"]["scale"][i])
        heads = np.zeros_like(x)
        for n in range(c.num_heads):
            shared, own = divmod(n, c.num_heads // c.num_kv_heads)
            q, k = rotated(y @ w["q"][:, shared, own]), rotated(y @ w["k"][:, shared])
            scores = np.where(np.tri(length, dtype=bool), q @ k.T / np.sqrt(c.head_dim), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            heads += weights @ (y @ w["v"][:, shared]) @ w["o"][shared, own]
        x = x + heads
        y = norm(x, p["layers"]["mlp_norm"]["scale"][i])
        gate = y @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
    table = p["embedding"] if c.tie_embeddings else p["unembedding"]
    return norm(x, p["norm"]["scale"]) @ table.T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_a_forward_pass_in_numpy(tied):
    """Every size its own, epsilon and theta large enough to show, and no scale of a norm at its start of 1."""
    config = ModelConfig(
        vocab_size=32, num_layers=2, d_model=16, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=24,
        rope_theta=50.0, norm_epsilon=1e-2, tie_embeddings=tied,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    model, params = made(config)
    params = jax.tree.map(lambda x: x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32), params)
    tokens = rng.integers(0, 32, (3, 9))
    expected = np.stack([numpy_logits(config, params, row) for row in tokens])
    assert 1.0 < np.std(expected) < 100.0
    # float32 against float64: a logit near zero is a difference of larger numbers.
    np.testing.assert_allclose(logits_of(model, params, *plain(tokens)), expected, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_targets", "chunk_size"))
def loss_and_gradients(model, params, batch, **settings):
    """((loss, weight), gradients) of a likelihood batch."""
    return jax.value_and_grad(lambda p: sft.sft_loss(p, batch, model=model, **settings)[0], has_aux=True)(params)


def influence(arrays):
    """[T, T]: how much position t depends on position s, from gradients. All tokens of the row must differ."""
    model, params = made()
    weights = jax.random.normal(jax.random.key(1), (TINY.d_model,))

    def output(embedding, position):
        changed = {"params": {**params["params"], "embedding": embedding}}
        return jnp.sum(jnp.einsum("btd,d->bt", model.apply(changed, *arrays)[0], weights) * position)

    positions = np.eye(arrays[0].shape[1], dtype=np.float32)
    gradient = jax.jit(jax.grad(output))
    jacobian = np.stack([gradient(params["params"]["embedding"], position) for position in positions])  # [T, V, D]
    return np.linalg.norm(jacobian[:, np.asarray(arrays[0])[0]], axis=-1)


def test_causality_by_gradient():
    seen = influence(plain([[3, 9, 4, 1, 7, 20]]))
    np.testing.assert_array_equal(seen > 1e-6, np.tril(np.ones((6, 6), bool)))
    assert np.all(seen[np.triu_indices(6, 1)] == 0.0)


def test_segments_do_not_see_each_other():
    segments = np.array([[0, 1, 1, 2, 2, 2, 0]], np.int32)
    tokens, positions = np.array([[30, 3, 9, 4, 1, 7, 20]], np.int32), np.array([[0, 0, 1, 0, 1, 2, 0]], np.int32)
    seen = influence(put(tokens, segments, positions))[1:6, 1:6] > 1e-6
    expected = np.zeros((5, 5), bool)
    expected[:2, :2], expected[2:, 2:] = np.tril(np.ones((2, 2))), np.tril(np.ones((3, 3)))
    np.testing.assert_array_equal(seen, expected)


def test_prefill_and_decode_equal_the_full_forward():
    """Left-padded prompts of 5, 3 and 1 tokens, then four tokens one at a time."""
    model, params = made()
    rng = np.random.default_rng(0)
    prompts = batches.prompt_rows([rng.integers(0, 32, n) for n in (5, 3, 1)], 5)
    response = rng.integers(0, 32, (3, 4)).astype(np.int32)
    rollout = sampling.append_response(PromptBatch(*map(jnp.asarray, prompts)), response, np.ones((3, 4), bool))
    tokens, segments, positions = put(rollout.tokens, rollout.segments, rollout.positions)
    expected = hidden_of(model, params, (tokens, segments, positions))

    cache = init_cache(TINY, 3, 9)
    step = jax.jit(lambda cache, *arrays: model.apply(params, *arrays, cache))
    got = []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        hidden, cache = step(cache, tokens[:, start:end], segments[:, start:end], positions[:, start:end])
        got.append(np.asarray(hidden))
    assert int(cache.index) == 9
    np.testing.assert_array_equal(cache.segments, segments)
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(np.concatenate(got, 1)[real], expected[real], rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_mates():
    model, params = made()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (4, 7))
    others = rng.integers(0, 32, (4, 7))
    others[2] = tokens[2]
    first, second = (hidden_of(model, params, plain(x)) for x in (tokens, others))
    np.testing.assert_array_equal(first[2], second[2])
    assert not np.allclose(first[1], second[1])


def test_padding_changes_nothing():
    model, params = made()
    rows = [[3, 9, 4, 1, 7], [2, 2, 5]]
    expected = [hidden_of(model, params, plain([row]))[0] for row in rows]
    for left, length in ((0, 9), (4, 9), (1, 6)):
        hidden = hidden_of(model, params, padded(rows, left, length))
        for i, row in enumerate(rows):
            np.testing.assert_allclose(hidden[i, left : left + len(row)], expected[i], rtol=1e-4, atol=1e-5)


def test_packed_segments_equal_separate_rows():
    """The same loss, weight and gradients from 2 packed sequences and from 5 rows; every token's log-prob agrees."""
    model, params = made()
    rng = np.random.default_rng(0)
    sizes = ((3, 4), (2, 2), (4, 5), (1, 3), (2, 1))
    rows = [(list(rng.integers(0, 32, p)), list(rng.integers(0, 32, r))) for p, r in sizes]
    packed, separate = batches.packed_rows(rows, 16), batches.token_rows(rows, 10)
    assert packed.tokens.shape == (2, 16) and packed.segments.max() == 3
    loss = lambda batch: loss_and_gradients(model, params, sharding.shard_batch(sft.SFTBatch(batch)))  # noqa: E731
    (total, weight), grads = loss(packed)
    (expected, count), expected_grads = loss(separate)
    assert weight == count == 15
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, expected_grads)

    read = jax.jit(lambda batch: sft.row_log_probs(model, params, batch)[0])
    logs = [np.asarray(read(sharding.shard_batch(batch))) for batch in (packed, separate)]
    values = [sorted(x[b.loss_mask[:, 1:]]) for x, b in zip(logs, (packed, separate), strict=True)]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sliding_window", [0, 6])
def test_attention_in_blocks_is_attention(sliding_window):
    """13 tokens in blocks of 4, 4, 4 and 1: hidden states and gradients as if all were looked at at once."""
    rng = np.random.default_rng(0)
    tokens, positions = rng.integers(0, 32, (3, 13)), np.broadcast_to(np.arange(13), (3, 13))
    segments = np.array([[1] * 13, [1] * 5 + [2] * 6 + [0] * 2, [0] * 3 + [1] * 10])
    members = np.array([[3] * 4 + [1] * 5 + [2] * 4, [1] * 13, [1] * 13])
    inputs = put(*(x.astype(np.int32) for x in (tokens, segments, positions, members)))
    weights = rng.normal(size=(3, 13, 16)).astype(np.float32) * (segments > 0)[..., None]
    results, square = [], []
    for block in (13, 4):
        config = dataclasses.replace(TINY, sliding_window=sliding_window, attention_block=block)
        model, params = made(config)

        def outputs(params, model=model):
            hidden, _ = model.apply(params, *inputs[:3], members=inputs[3])
            return jnp.sum(hidden * weights), hidden

        both = jax.value_and_grad(outputs, has_aux=True)
        (_, hidden), grads = jax.jit(both)(params)
        results.append((np.asarray(hidden) * (segments > 0)[..., None], grads))
        square.append("f32[3,2,2,13,13]" in re.sub("@[a-z]+", "", str(jax.make_jaxpr(both)(params))))
    assert square == [True, False]  # scores of all with all
    (whole, whole_grads), (blocks, block_grads) = results
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-5)
    # Rounding is that of the largest numbers in a sum: beside float64 both ways are off by 1e-6 of these.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())  # noqa: E731
    jax.tree.map(close, block_grads, whole_grads)


def test_blocks_in_which_nobody_sees_anybody_are_left_out(monkeypatch):
    """The seven pieces of four pairings, a block each: 1 + 2 + 3 + 3 + 2 + 3 + 3 of the 28 below the diagonal."""
    made_blocks = []

    def counted(*arguments):
        jax.debug.callback(lambda: made_blocks.append(1))
        return scores(*arguments)

    scores = attention._block_scores
    monkeypatch.setattr(attention, "_block_scores", counted)
    x, a, b = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]
    rows = batches.score_rows([[x + a + b, x + a + a, x + b + b, x + b + a]], multiple=4)
    assert rows.tokens.shape == (1, 28)
    q, k, v = (np.random.default_rng(i).normal(size=(1, 28, 1, 2, 4)).astype(np.float32) for i in range(3))
    places = attention.Places(jnp.arange(28), *put(rows.members > 0, rows.positions, rows.members))
    run = functools.partial(attention.attention_in_blocks, places=places, block=4)
    out = jax.jit(run)(*put(q, k[:, :, :, 0], v[:, :, :, 0]))
    jax.effects_barrier()
    assert len(made_blocks) == 17
    mask = attention.sight(places, places)
    expected = attention.attention(*put(q, k[:, :, :, 0], v[:, :, :, 0]), mask)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_target_positions_alone_give_the_same_loss():
    """`num_targets` and `chunk_size` are for memory: they change no number."""
    model, params = made()
    rng = np.random.default_rng(0)
    rows = [(list(rng.integers(0, 32, p)), list(rng.integers(0, 32, r))) for p, r in ((3, 4), (9, 2), (1, 6))]
    batch = sharding.shard_batch(sft.SFTBatch(batches.token_rows(rows, 12)))
    (expected, _), expected_grads = loss_and_gradients(model, params, batch)
    for settings in ({"num_targets": 6}, {"num_targets": 8, "chunk_size": 3}):
        (total, weight), grads = loss_and_gradients(model, params, batch, **settings)
        assert weight == 12
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, expected_grads)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, remat="full")], ids=["apart", "loop"])
@pytest.mark.parametrize("read", [slice(-4, -1), np.array([[0, 3, 3], [5, 1, 0]], np.int32)], ids=["slice", "slots"])
def test_what_is_read_equals_that_part_of_all(config, read):
    """Hidden states and gradients, of layers one by one and of a loop; only the first leaves out what nobody reads."""
    model, params = made(config)
    tokens = np.array([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], np.int32)
    rows = put(tokens, np.ones_like(tokens), np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape))
    read = read if isinstance(read, slice) else put(read)[0]
    weights = jax.random.normal(jax.random.key(1), (2, 3, config.d_model))

    def part(params):
        return model.apply(params, *rows, read=read)[0]

    def of_all(params):
        return transformer.picked(model.apply(params, *rows)[0], read)

    np.testing.assert_allclose(part(params), of_all(params), rtol=1e-5, atol=1e-5)
    found, expected = (jax.grad(lambda p: jnp.sum(weights * f(p)))(params) for f in (part, of_all))  # noqa: B023
    # Sums over tokens in another order: beside their largest numbers.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())  # noqa: E731
    jax.tree.map(close, found, expected)

    count = lambda f: cost.matmul_flops(jax.make_jaxpr(f)(params))  # noqa: E731
    unread = programs.unread_flops(config, 2 * (6 - 3)) if config.remat == "none" else 0
    assert count(of_all) - count(part) == unread


def test_rotary_by_hand_and_relative():
    one = rotary(jnp.array([[[1.0, 0.0]]]), jnp.array([[2]]), 10_000.0)
    np.testing.assert_allclose(one, [[[np.cos(2.0), np.sin(2.0)]]], rtol=1e-6)
    # The second of two frequencies is theta^(-1/2).
    two = rotary(jnp.array([[[0.0, 1.0, 0.0, 0.0]]]), jnp.array([[3]]), 100.0)
    np.testing.assert_allclose(two, [[[0.0, np.cos(0.3), 0.0, np.sin(0.3)]]], rtol=1e-6)

    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))
    dot = lambda i, j: float(jnp.sum(rotary(q[None], jnp.array([[i]]), 1e4) * rotary(k[None], jnp.array([[j]]), 1e4)))  # noqa: E731
    np.testing.assert_allclose(dot(5, 2), dot(105, 102), rtol=1e-4)
    assert abs(dot(5, 2) - dot(5, 3)) > 1e-3


def test_rotary_is_the_same_on_other_devices(monkeypatch):
    """The form for CPUs, whose halves are an axis, and the one that concatenates them; gradients too."""
    x, weights = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 2, 8))
    positions = jnp.array([[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]])
    total = lambda x: jnp.sum(weights * rotary(x, positions, 1e4))  # noqa: E731
    here = rotary(x, positions, 1e4), jax.grad(total)(x)
    monkeypatch.setattr(transformer, "platform", lambda: "tpu")
    there = rotary(x, positions, 1e4), jax.grad(total)(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), here, there)


def test_norm_is_the_same_on_other_devices(monkeypatch):
    """The gradient of the scale is a product on a CPU, and elsewhere a sum of rows."""
    norm = transformer.RMSNorm(1e-6, jnp.float32)
    x, weights = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8))
    params = {"params": {"scale": jnp.arange(1.0, 9.0)}}
    grads = lambda: jax.grad(lambda *of: jnp.sum(weights * norm.apply(*of)), argnums=(0, 1))(params, x)  # noqa: E731
    here = grads()
    rows = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(here[0]["params"]["scale"], np.sum(weights * rows, axis=(0, 1, 2)), rtol=1e-5)
    monkeypatch.setattr(transformer, "platform", lambda: "tpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), here, grads())


def test_only_relative_positions_matter():
    model, params = made()
    tokens, segments, positions = plain([[3, 9, 4, 1, 7]])
    first = hidden_of(model, params, (tokens, segments, positions))
    np.testing.assert_allclose(hidden_of(model, params, (tokens, segments, positions + 7)), first, rtol=1e-4, atol=1e-4)
    assert np.abs(hidden_of(model, params, (tokens, segments, positions * 2)) - first).max() > 1e-2


def test_remat_changes_memory_and_no_number():
    _, params = made()
    rng = np.random.default_rng(0)
    batch = sharding.shard_batch(sft.SFTBatch(batches.token_rows([(list(rng.integers(0, 32, 4)),) * 2] * 2, 8)))
    results, products = {}, {}
    for remat in ("none", "dots", "full"):
        model = Transformer(dataclasses.replace(TINY, remat=remat))
        results[remat] = loss_and_gradients(model, params, batch)
        products[remat] = str(jax.make_jaxpr(loss_and_gradients, 0)(model, params, batch)).count("dot_general")
    # Two attention products have batch dimensions and are done again under `dots`; under `full` so are the seven others
    # (six of them: the last one's result is not needed to go back).
    assert products["none"] < products["dots"] < products["full"], products
    for remat in ("dots", "full"):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, results[remat], results["none"])


def test_parameters_are_stacked_over_layers():
    expected = {
        "embedding": (32, 16),
        "norm": {"scale": (16,)},
        "layers": {
            "attention_norm": {"scale": (2, 16)},
            "mlp_norm": {"scale": (2, 16)},
            "q": (2, 16, 2, 2, 4),
            "k": (2, 16, 2, 4),
            "v": (2, 16, 2, 4),
            "o": (2, 2, 2, 4, 16),
            "gate": (2, 16, 24),
            "up": (2, 16, 24),
            "down": (2, 24, 16),
        },
    }
    assert jax.tree.map(lambda x: x.shape, made()[1]) == {"params": expected}
    first, second = made()[1]["params"]["layers"]["q"]
    assert not np.allclose(first, second), "layers start different from each other"


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


def test_parameter_counts_by_hand():
    # Embedding 32 * 16 = 512; a layer: q 256, k 128, v 128, o 256, MLP 3 * 384, norms 32: 1952; last norm 16.
    assert count(made()[1]) == 512 + 2 * 1952 + 16
    untied = made(dataclasses.replace(TINY, tie_embeddings=False))[1]
    assert count(untied) == 512 + 2 * 1952 + 16 + 512
    scalar = made(dataclasses.replace(TINY, tie_embeddings=False), scalar=True)[1]
    assert count(scalar) == 512 + 2 * 1952 + 16 + 17, "a head of 16 and a bias; no unembedding"


def test_untied_logits_come_from_the_unembedding():
    model, params = made(dataclasses.replace(TINY, tie_embeddings=False))
    arrays = plain([[3, 9, 4]])
    logits = logits_of(model, params, *arrays)
    expected = hidden_of(model, params, arrays) @ np.asarray(params["params"]["unembedding"]).T
    assert logits.shape == (1, 3, 32)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    tied, params = made()
    expected = hidden_of(tied, params, arrays) @ np.asarray(params["params"]["embedding"]).T
    np.testing.assert_allclose(logits_of(tied, params, *arrays), expected, rtol=1e-4, atol=1e-5)


def test_scalar_model_has_no_unembedding():
    for tied in (True, False):
        model, params = made(dataclasses.replace(TINY, tie_embeddings=tied), scalar=True)
        assert set(params["params"]) == {"backbone", "head", "bias"}
        assert set(params["params"]["backbone"]) == {"embedding", "layers", "norm"}
    shifted = {"params": {**params["params"], "bias": params["params"]["bias"] + 2.5}}
    arrays = plain([[3, 9, 4]])
    values = jax.jit(model.apply)
    np.testing.assert_allclose(values(shifted, *arrays), values(params, *arrays) + 2.5, rtol=1e-5)


def test_bfloat16_is_for_activations():
    model, params = made(dataclasses.replace(TINY, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    arrays = plain([[3, 9, 4, 1]])
    assert hidden_of(model, params, arrays).dtype == jnp.bfloat16
    logits, exact = logits_of(model, params, *arrays), logits_of(made()[0], params, *arrays)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_copy_init_adds_v_transposed_to_o():
    start = lambda c: init_params(Transformer(dataclasses.replace(TINY, copy_init=c)), jax.random.key(0))  # noqa: E731
    with_copy, without = start(0.5)["params"]["layers"], start(0.0)["params"]["layers"]
    v = np.asarray(without["v"]).transpose(0, 2, 3, 1)  # [L, K, H, D]
    difference = np.asarray(with_copy["o"]) - np.asarray(without["o"])  # [L, K, G, H, D]
    for group in range(2):
        np.testing.assert_allclose(difference[:, :, group], 0.5 * v, rtol=1e-4, atol=1e-6)


def config_files():
    """(name, resolved config) of every file under configs/ and each of its variants."""
    for path in sorted(CONFIGS.glob("*.py")):
        if path.stem == "synthesize":  # trains nothing
            continue
        get_config = runpy.run_path(str(path))["get_config"]
        parameters = inspect.signature(get_config).parameters
        variants = {parameters["variant"].default, "smoke"} if parameters else {None}
        several = {"srt_tulu2": {"7b", "13b", "70b"}, "pit_llama2": {"7b", "13b"}, "pit_smollm": {"135m", "360m"}}
        variants = several.get(path.stem, variants)
        for variant in sorted(variants, key=str):
            made_config = get_config() if variant is None else get_config(variant)
            yield (
                f"{path.stem}:{variant or ''}",
                config_lib.from_config_dict(config_lib.class_of(made_config), made_config),
            )


def matrices(c: ModelConfig) -> int:
    """Parameters by the formula of the architecture, biases and heads apart."""
    attention = c.d_model * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = attention + 3 * c.d_model * c.mlp_dim + 2 * c.d_model
    return c.vocab_size * c.d_model + c.num_layers * layer + c.d_model


@pytest.mark.parametrize(("name", "config"), list(config_files()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_model_of_the_configs(name, config):
    """Shapes only: nothing is allocated, so a model of any size is checked."""
    models = (getattr(config, field, None) for field in ("policy_model", "pit_model", "reward_model"))
    for c in {c for c in models if c is not None}:
        model, scalar = Transformer(c), ScalarModel(c)
        params = shapes(model)
        unembedding = 0 if c.tie_embeddings else c.vocab_size * c.d_model
        assert count(params) == matrices(c) + unembedding
        assert count(shapes(scalar)) == matrices(c) + c.d_model + 1
        row = jax.device_put(jnp.zeros((1, 8), jnp.int32), sharding.RULES.spec("batch", None))
        logits = jax.eval_shape(lambda p, m=model, r=row: m.apply(p, r, r, r, method=Transformer.full_logits), params)
        assert logits.shape == (1, 8, c.vocab_size) and logits.dtype == jnp.float32
    # As published for Llama 2 of 7B, 13B and 70B, and for SmolLM2; without the rows of the control symbols and padding.
    published = {"pit_llama2:7b": 6_738_415_616, "pit_llama2:13b": 13_015_864_320, "srt_tulu2:7b": 6_738_415_616}
    published |= {"srt_tulu2:13b": 13_015_864_320, "srt_tulu2:70b": 68_976_648_192}
    published |= {"pit_smollm:135m": 134_515_008, "pit_smollm:360m": 361_821_120}
    if name in published:
        c = config.policy_model
        added = (c.vocab_size - c.num_tokens + 2) * c.d_model * (1 if c.tie_embeddings else 2)
        assert count(shapes(Transformer(c))) - added == published[name]
