"""Laws that hold for every loss: padding, empty rows, accumulation, dtypes, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.losses import advantages, masked
from pit_jax.losses.likelihood import negative_log_likelihood, unlikelihood
from pit_jax.losses.log_probs import token_log_probs
from pit_jax.losses.policy_gradient import ppo_policy_loss, ppo_value_loss
from pit_jax.losses.preference import bradley_terry, dpo_loss, gap_loss, gap_mse

B, T = 8, 6


def _policy(x, old, advantages, entropy, mask):
    return ppo_policy_loss(x, old, advantages, mask, epsilon=0.2, entropy=entropy, entropy_coef=0.01)


def _value(x, old, returns, mask):
    return ppo_value_loss(x, old, returns, mask, value_epsilon=0.2)


# Loss, number of [B, T] arrays before the mask; the gradient is taken in the first.
TOKEN_LOSSES = {
    "negative_log_likelihood": (negative_log_likelihood, 1),
    "unlikelihood": (unlikelihood, 1),
    "policy": (_policy, 4),
    "value": (_value, 3),
}
# Loss, width of a row of each argument.
ROW_LOSSES = {
    "bradley_terry": (lambda x, y: bradley_terry(x[:, 0], y[:, 0]), (1, 1)),
    "gap": (gap_loss, (4,)),
    "gap_no_diagonal": (lambda x: gap_loss(x, diagonal=False), (4,)),
    "gap_mse": (gap_mse, (4,)),
    "dpo": (lambda x, y: dpo_loss(x, y, beta=0.3, label_smoothing=0.1), (2, 2)),
    "dpo_ipo": (lambda x, y: dpo_loss(x, y, beta=0.3, kind="ipo"), (2, 2)),
}


def _token_arguments(count, lengths, seed=0):
    arrays = np.random.default_rng(seed).normal(size=(count, len(lengths), T)).astype(np.float32)
    arrays[0] = -0.1 - np.abs(arrays[0])  # a log-probability where one is expected
    return [*arrays, np.arange(T) < np.array(lengths)[:, None]]


def _arguments(name):
    if name in TOKEN_LOSSES:
        loss, count = TOKEN_LOSSES[name]
        return loss, _token_arguments(count, [6, 1, 0, 3, 5, 2, 6, 4])
    loss, widths = ROW_LOSSES[name]
    rng = np.random.default_rng(0)
    return loss, [rng.normal(size=(B, width)).astype(np.float32) for width in widths]


@functools.cache  # one compilation per loss and shape for all laws
def _jitted(loss):
    def total(*arguments):
        per_example, metrics = loss(*arguments)
        return per_example.sum(), (per_example, metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def _sum_and_grad(loss, arguments):
    """((sum of per_example, (per_example, metrics)), gradient in the first argument)."""
    return jax.device_get(_jitted(loss)(*arguments))


def _assert_equal(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30, -200.0])
def test_padding_changes_nothing(name, garbage):
    loss, arguments = _arguments(name)
    mask = arguments[-1]
    clean = [np.where(mask, x, 0.0).astype(np.float32) for x in arguments[:-1]]
    padded = [np.pad(np.where(mask, x, garbage), ((0, 0), (0, 3)), constant_values=garbage) for x in arguments[:-1]]
    padded = [x.astype(np.float32) for x in padded]
    value, grad = _sum_and_grad(loss, [*clean, mask])
    padded_value, padded_grad = _sum_and_grad(loss, [*padded, np.pad(mask, ((0, 0), (0, 3)))])
    _assert_equal(padded_value, value)
    np.testing.assert_allclose(padded_grad[:, :T], grad, rtol=1e-5)
    np.testing.assert_array_equal(padded_grad[:, T:], np.zeros((B, 3)))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_fully_masked_batch_has_loss_0_and_zero_gradients(name):
    loss, count = TOKEN_LOSSES[name]
    (_, (per_example, metrics)), grad = _sum_and_grad(loss, _token_arguments(count, [0, 0]))
    np.testing.assert_array_equal(per_example, np.zeros(2))
    assert all(total == 0 and weight == 0 for total, weight in metrics.values())
    np.testing.assert_array_equal(grad, np.zeros((2, T)))


@pytest.mark.parametrize("name", [*TOKEN_LOSSES, *ROW_LOSSES])
def test_accumulated_micro_batches_equal_one_batch(name):
    num_micro_batches = 4
    loss, arguments = _arguments(name)
    (_, (per_example, metrics)), grad = _sum_and_grad(loss, arguments)
    np.testing.assert_allclose(per_example.sum(), metrics["loss"][0], rtol=1e-5)
    whole = grad / metrics["loss"][1]

    parts = [
        _sum_and_grad(loss, part) for part in zip(*(np.split(x, num_micro_batches) for x in arguments), strict=True)
    ]
    part_metrics = [aux[1] for (_, aux), _ in parts]
    totals = jax.tree.map(lambda *xs: sum(xs), *part_metrics)
    _assert_equal(totals, metrics)
    weight = totals["loss"][1]
    _assert_equal(np.concatenate([g for _, g in parts]) / weight, whole)
    if name in TOKEN_LOSSES:
        # Means of means are something else here: the law above can fail.
        means = [g / m["loss"][1] / num_micro_batches for (_, g), m in zip(parts, part_metrics, strict=True)]
        assert not np.allclose(np.concatenate(means), whole, rtol=1e-2)


@pytest.mark.parametrize("name", [*TOKEN_LOSSES, *ROW_LOSSES])
def test_rows_do_not_see_each_other(name):
    loss, arguments = _arguments(name)
    (_, (whole, _)), _ = _sum_and_grad(loss, arguments)
    order = np.random.default_rng(1).permutation(B)
    (_, (permuted, _)), _ = _sum_and_grad(loss, [x[order] for x in arguments])
    assert whole.shape == (B,)
    np.testing.assert_allclose(permuted, whole[order], rtol=1e-6)


@pytest.mark.parametrize("name", [*TOKEN_LOSSES, *ROW_LOSSES])
def test_bfloat16_goes_in_and_float32_comes_out(name):
    loss, arguments = _arguments(name)
    half = [x if x.dtype == bool else x.astype(jnp.bfloat16) for x in arguments]
    exact = [x if x.dtype == bool else x.astype(np.float32) for x in half]
    actual, _ = _sum_and_grad(loss, half)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(actual))
    _assert_equal(actual, _sum_and_grad(loss, exact)[0])


# Everything at once, as a step would compose it.
D, V = 4, 16
SHAPES = {"hidden": (B, T, D), "values": (B, T), "ref_log_probs": (B, T), "scores": (B, 4)}


def _everything(unembed, hidden, values, ref_log_probs, scores, targets, mask, chunk_sizes=(4,)):
    def total(unembed, hidden, scores):
        with_metrics = []
        for chunk_size in chunk_sizes:
            log_probs, entropy = token_log_probs(
                lambda x: jnp.einsum("btd,vd->btv", x, unembed), hidden, targets, temperature=0.7, chunk_size=chunk_size
            )
            kl = advantages.kl_estimate(log_probs, ref_log_probs, kind="k3")
            rewards = advantages.token_rewards(scores[:, 0], kl, mask, kl_coef=0.1)
            advantage, returns = advantages.gae(rewards, values, mask, discount=0.9, gae_lambda=0.8)
            advantage = masked.masked_whiten(advantage, mask)
            with_metrics += [
                ppo_policy_loss(
                    log_probs, ref_log_probs, advantage, mask, epsilon=0.2, entropy=entropy, entropy_coef=0.1
                ),
                ppo_value_loss(values, returns, returns, mask, value_epsilon=0.2),
                negative_log_likelihood(log_probs, mask),
                unlikelihood(log_probs, mask),
            ]
        with_metrics += [gap_loss(scores), gap_mse(scores), bradley_terry(scores[:, 0], scores[:, 1])]
        with_metrics += [dpo_loss(scores[:, :2], scores[:, 2:], beta=0.1)]
        return sum(per_example.sum() for per_example, _ in with_metrics), [metrics for _, metrics in with_metrics]

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(unembed, hidden, scores)


def _everything_inputs():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in SHAPES.values()]
    targets = rng.integers(0, V, (B, T), dtype=np.int32)
    mask = np.arange(T) < np.array([6, 1, 0, 3, 5, 2, 6, 4])[:, None]
    return rng.normal(size=(V, D)).astype(np.float32), [*arrays, targets, mask]


EXPLICIT = (jax.sharding.AxisType.Explicit,) * 2


def test_sharded_types_go_through():
    """Explicit types of a 4 x 2 mesh, batch on `data` and vocabulary on `model`, traced without any device."""
    unembed, batch = _everything_inputs()
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"), EXPLICIT)

    def abstract(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    with jax.sharding.use_abstract_mesh(mesh):
        arguments = [abstract(x, jax.P("data", *[None] * (x.ndim - 1))) for x in batch]
        (_, metrics), grads = jax.eval_shape(
            functools.partial(_everything, chunk_sizes=(None, 4)), abstract(unembed, jax.P("model", None)), *arguments
        )
    assert [g.sharding.spec for g in grads] == [jax.P("model", None), jax.P("data", None, None), jax.P("data", None)]
    assert all(x.shape == () for x in jax.tree.leaves(metrics))


@pytest.mark.skipif(
    "jax.device_count() < 8", reason="XLA_FLAGS=--xla_force_host_platform_device_count=8 gives 8 devices"
)
def test_a_mesh_changes_no_number():
    unembed, batch = _everything_inputs()
    expected = jax.device_get(jax.jit(_everything)(unembed, *batch))
    mesh = jax.make_mesh((4, 2), ("data", "model"), EXPLICIT, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, jax.P("data", *[None] * (x.ndim - 1))) for x in batch]
        actual = jax.device_get(jax.jit(_everything)(jax.device_put(unembed, jax.P("model", None)), *sharded))
    _assert_equal(actual, expected, rtol=1e-4, atol=1e-5)
