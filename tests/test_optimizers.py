"""Optimizers from configs: schedules by hand, what is decayed, and what Muon does to a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax import optimizers, sharding
from pit_jax.config import ModelConfig, OptimizerConfig
from pit_jax.models.transformer import Transformer
from pit_jax.pipelines.common import init_params

SIZES = ModelConfig(vocab_size=16, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16)
MODEL = Transformer(SIZES)
MUON = OptimizerConfig(name="muon", learning_rate=0.1, clip_norm=1e9)


def gradients_like(params, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32), jax.typeof(x).sharding.spec)  # noqa: E731
    return jax.tree.map(draw, params)


def updates_of(config, shape):
    with jax.set_mesh(sharding.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])):
        params = init_params(MODEL, jax.random.key(0))
        optimizer = optimizers.make_optimizer(config, 10)
        state = jax.jit(optimizer.init)(params)
        before = jax.tree.map(jax.typeof, state)
        updates, state = jax.jit(optimizer.update)(gradients_like(params), state, params)
        assert jax.tree.map(jax.typeof, state) == before, "a state that changes its layout cannot be carried"
        return jax.device_get(updates)["params"]


@pytest.fixture(scope="module")
def muon():
    return updates_of(MUON, (1, 1))


@pytest.mark.parametrize(
    ("name", "inputs"), [("q", 1), ("k", 1), ("v", 1), ("o", 3), ("gate", 1), ("up", 1), ("down", 1)]
)
def test_muon_makes_the_singular_values_of_a_matrix_alike(muon, name, inputs):
    """Each layer's inputs x outputs matrix: five Newton-Schulz steps bring all singular values near one number."""
    update = muon["layers"][name]
    rows = int(np.prod(update.shape[1 : 1 + inputs]))
    for layer in update:
        matrix = layer.reshape(rows, -1)
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / values.min() < 3, name
        # consistent_rms: 0.2 sqrt(max(rows, columns)) times the learning rate times about 1.
        expected = 0.1 * 0.2 * np.sqrt(max(matrix.shape))
        assert 0.6 * expected < np.median(values) < 1.3 * expected
    random = np.random.default_rng(0).normal(size=(rows, update[0].size // rows))
    spread = np.linalg.svd(random, compute_uv=False)
    assert min(random.shape) < 8 or spread.max() / spread.min() > 3, "which a gradient by itself does not have"


def test_muon_leaves_embeddings_and_norms_to_adam(muon):
    """NAdam's first update, m = 0.1 g: lr (0.9 m / (1 - 0.9^2) + 0.1 g / (1 - 0.9)) / |g|."""
    expected = 0.1 * (0.9 * 0.1 / (1 - 0.9**2) + 1)
    for update in (muon["embedding"], muon["norm"]["scale"], muon["layers"]["mlp_norm"]["scale"]):
        # Roundings of float32: of m, of its corrections and of the square root.
        np.testing.assert_allclose(np.abs(update), expected, rtol=5e-6)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (4, 2)])
def test_muon_does_not_depend_on_the_mesh(muon, shape):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), updates_of(MUON, shape), muon)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_spares_norms(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, clip_norm=1e9)
    plain, decayed = (
        updates_of(config, (1, 1)),
        updates_of(OptimizerConfig(**vars(config) | {"weight_decay": 0.5}), (1, 1)),
    )
    with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        params = jax.device_get(init_params(MODEL, jax.random.key(0)))["params"]
    np.testing.assert_array_equal(plain["norm"]["scale"], decayed["norm"]["scale"])
    q = lambda tree: tree["layers"]["q"]  # noqa: E731
    np.testing.assert_allclose(q(decayed) - q(plain), -0.1 * 0.5 * q(params), rtol=0, atol=3e-8)


def test_schedules_by_hand():
    at = lambda **kw: optimizers.make_schedule(OptimizerConfig(learning_rate=1.0, **kw), 10)  # noqa: E731
    cosine = at(schedule="cosine", warmup_fraction=0.2)
    assert float(cosine(0)) == pytest.approx(0.5) and float(cosine(1)) == pytest.approx(1.0)
    assert float(cosine(6)) == pytest.approx(0.5) and float(cosine(10)) == pytest.approx(0.0, abs=1e-6)
    linear = at(schedule="linear")
    assert [float(linear(i)) for i in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert float(at()(7)) == 1.0


def test_the_clip_is_of_the_global_norm():
    """SGD-like: with Adam's epsilon huge, the update is the clipped gradient over epsilon."""
    config = OptimizerConfig(learning_rate=1.0, clip_norm=1.0, b1=0.0, b2=0.0, epsilon=1e6)
    with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        optimizer = optimizers.make_optimizer(config, 1)
        params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        updates, _ = optimizer.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, optimizer.init(params), params)
    np.testing.assert_allclose([updates["a"][0] * 1e6, updates["b"][0] * 1e6], [-0.6, -0.8], rtol=2e-6)
