import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.losses import masked

STATIC = ("axis", "keepdims")
masked_sum = jax.jit(masked.masked_sum, static_argnames=STATIC)
masked_mean = jax.jit(masked.masked_mean, static_argnames=STATIC)
masked_variance = jax.jit(masked.masked_variance, static_argnames=(*STATIC, "ddof"))
masked_whiten = jax.jit(masked.masked_whiten, static_argnames=("axis", "shift_mean"))

X = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
MASK = np.array([True, True, False, False, True])


def test_sum_mean_and_variance_by_hand():
    # Kept: 1, 2, 5. Squared deviations from 8/3: 25/9 + 4/9 + 49/9 = 26/3.
    assert masked_sum(X, MASK) == 8
    np.testing.assert_allclose(masked_mean(X, MASK), 8 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked_variance(X, MASK), 26 / 9, rtol=1e-6)
    np.testing.assert_allclose(masked_variance(X, MASK, ddof=1), 13 / 3, rtol=1e-6)


def test_axis_and_keepdims():
    x = np.array([[1.0, 3.0], [5.0, 9.0]], np.float32)
    mask = np.array([[True, True], [True, False]])
    np.testing.assert_array_equal(masked_mean(x, mask, 1), [2.0, 5.0])
    np.testing.assert_array_equal(masked_mean(x, mask, 0, keepdims=True), [[3.0, 3.0]])
    np.testing.assert_array_equal(masked_variance(x, mask, 1), [1.0, 0.0])


def test_whiten_by_hand():
    # Kept: 0, 4, with mean 2 and variance 4; without the shift the mean comes back.
    x = np.array([0.0, 100.0, 4.0], np.float32)
    mask = np.array([True, False, True])
    np.testing.assert_allclose(masked_whiten(x, mask), [-1.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(masked_whiten(x, mask, shift_mean=False), [1.0, 0.0, 3.0], atol=1e-6)
    # epsilon is added to the variance: 2 / sqrt(4 + 12) = 1/2.
    np.testing.assert_allclose(masked_whiten(x, mask, epsilon=12.0), [-0.5, 0.0, 0.5], atol=1e-6)


@pytest.mark.parametrize("axis", [None, 1])
def test_whiten_gives_mean_0_and_variance_1_over_the_mask(axis):
    rng = np.random.default_rng(0)
    x = rng.normal(7.0, 3.0, (5, 40)).astype(np.float32)
    mask = np.arange(40) < rng.integers(5, 40, (5, 1))
    white = np.asarray(masked_whiten(x, mask, axis))
    groups = [white[mask]] if axis is None else [row[m] for row, m in zip(white, mask, strict=True)]
    for group in groups:
        np.testing.assert_allclose([group.mean(), group.var()], [0.0, 1.0], atol=2e-5)
    assert not white[~mask].any()


def test_constant_entries_whiten_to_zero():
    np.testing.assert_array_equal(masked_whiten(np.full(4, 0.5, np.float32), np.ones(4, bool)), np.zeros(4))


@pytest.mark.parametrize(
    # Not jitted: XLA may turn a product with a mask into a selection, which would hide that 0 * NaN is NaN.
    "function",
    [masked.masked_sum, masked.masked_mean, masked.masked_variance, masked.masked_whiten],
)
@pytest.mark.parametrize("axis", [None, 1])
def test_an_empty_mask_has_zero_values_and_zero_gradients_whatever_the_padding_holds(function, axis):
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])
    mask = jnp.zeros((2, 2), bool)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(function(x, mask, axis)))(x)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(grad, np.zeros((2, 2)))


def test_padding_does_not_reach_values_or_gradients_of_kept_entries():
    x, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    np.testing.assert_allclose(masked_whiten(x, mask), [-1.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: masked_mean(x, mask))(x), [0.5, 0.0, 0.5])


def test_bfloat16_is_summed_in_float32():
    # 256 + 1 has no bfloat16.
    x = jnp.concatenate([jnp.full(1, 256.0, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)])
    total = masked_sum(x, jnp.ones(4, bool))
    assert total.dtype == jnp.float32 and total == 259


def test_a_mask_of_another_shape_or_type_is_refused():
    with pytest.raises(AssertionError):
        masked_sum(np.ones((2, 3), np.float32), np.ones((3,), bool))
    with pytest.raises(AssertionError):
        masked_sum(np.ones(3, np.float32), np.ones(3, np.int32))
