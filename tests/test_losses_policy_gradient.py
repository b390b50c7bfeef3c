import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.losses import policy_gradient

ppo_policy_loss = jax.jit(policy_gradient.ppo_policy_loss, static_argnames=("epsilon", "entropy_coef"))
ppo_value_loss = jax.jit(policy_gradient.ppo_value_loss, static_argnames="value_epsilon")
explained_variance = jax.jit(policy_gradient.explained_variance)

# Ratios 1.5 and 0.5 with advantages of both signs, and a masked token. With epsilon 0.2 and A = 2, 2, -2, -2:
# min(3, 2.4) = 2.4 clipped; min(1, 1.6) = 1; min(-3, -2.4) = -3; min(-1, -1.6) = -1.6 clipped.
LOG_PROBS = np.log([[1.5, 0.5, 1.5, 0.5, 9.0]]).astype(np.float32) - 1
OLD_LOG_PROBS = np.full((1, 5), -1.0, np.float32)
ADVANTAGES = np.array([[2.0, 2.0, -2.0, -2.0, 5.0]], np.float32)
MASK = np.array([[True, True, True, True, False]])


def test_policy_loss_by_hand():
    loss, metrics = ppo_policy_loss(LOG_PROBS, OLD_LOG_PROBS, ADVANTAGES, MASK, epsilon=0.2)
    np.testing.assert_allclose(loss, [-2.4 - 1 + 3 + 1.6], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (1.2, 4.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], (2.0, 4.0))
    np.testing.assert_allclose(metrics["ratio"], (4.0, 4.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio_max"], (1.5, 1.0), rtol=1e-6)
    # rho - 1 - log rho: 0.5 - log 1.5 = 0.094535 and -0.5 + log 2 = 0.193147, twice each.
    np.testing.assert_allclose(metrics["approx_kl"], (0.575364, 4.0), rtol=1e-5)
    assert "entropy" not in metrics


def test_policy_gradient_by_hand():
    # -rho A where the unclipped side is the minimum, else 0.
    grad = jax.grad(lambda x: ppo_policy_loss(x, OLD_LOG_PROBS, ADVANTAGES, MASK, epsilon=0.2)[0].sum())(LOG_PROBS)
    np.testing.assert_allclose(grad, [[0.0, -1.0, 3.0, 0.0, 0.0]], rtol=1e-5)


def test_at_ratio_1_the_loss_is_minus_the_mean_advantage():
    rng = np.random.default_rng(0)
    log_probs, advantages = rng.normal(size=(2, 4, 6)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 1, 0, 3])[:, None]

    def loss(x):
        return ppo_policy_loss(x, log_probs, advantages, mask, epsilon=0.2)

    _, metrics = loss(log_probs)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], -advantages[mask].mean(), rtol=1e-5)
    assert metrics["clip_fraction"] == (0.0, 10.0)
    assert metrics["approx_kl"][0] == 0
    assert metrics["ratio"] == (10.0, 10.0) and metrics["ratio_max"] == (3.0, 3.0)
    # There the gradient is the plain policy gradient: -A for every token.
    grad = jax.grad(lambda x: loss(x)[0].sum())(log_probs)
    np.testing.assert_allclose(grad, -advantages * mask, rtol=1e-6)


def test_entropy_bonus_by_hand():
    # Entropies 1 + 2 + 3 + 4 over the mask, coefficient 0.1: the loss falls by 1 from 1.2.
    entropy = np.array([[1.0, 2.0, 3.0, 4.0, 50.0]], np.float32)
    loss, metrics = ppo_policy_loss(
        LOG_PROBS, OLD_LOG_PROBS, ADVANTAGES, MASK, epsilon=0.2, entropy=entropy, entropy_coef=0.1
    )
    np.testing.assert_allclose(loss, [0.2], atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (0.2, 4.0), atol=1e-5)
    assert metrics["entropy"] == (10.0, 4.0)


def test_an_entropy_coefficient_without_entropy_is_refused():
    with pytest.raises(ValueError, match="needs the entropy"):
        ppo_policy_loss(LOG_PROBS, OLD_LOG_PROBS, ADVANTAGES, MASK, epsilon=0.2, entropy_coef=0.1)


def test_advantages_get_no_gradient():
    grad = jax.grad(lambda a: ppo_policy_loss(LOG_PROBS, OLD_LOG_PROBS, a, MASK, epsilon=0.2)[0].sum())(ADVANTAGES)
    np.testing.assert_array_equal(grad, np.zeros((1, 5)))


VALUES = np.array([[2.0, 1.2, 2.0, 9.0]], np.float32)
OLD_VALUES = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)
RETURNS = np.array([[1.9, 2.0, 0.0, 0.0]], np.float32)
VALUE_MASK = np.array([[True, True, True, False]])


def test_value_loss_by_hand():
    # epsilon 0.5. V = 2 is held at 1.5: max(0.1^2, 0.4^2) = 0.16 by the clip; V = 1.2 is within: 0.8^2 = 0.64;
    # V = 2 held at 1.5, R = 0: max(4, 2.25) = 4, not by the clip. Halves: 0.08 + 0.32 + 2.
    loss, metrics = ppo_value_loss(VALUES, OLD_VALUES, RETURNS, VALUE_MASK, value_epsilon=0.5)
    np.testing.assert_allclose(loss, [2.4], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (2.4, 3.0), rtol=1e-5)
    assert metrics["clip_fraction"] == (1.0, 3.0)
    np.testing.assert_allclose(metrics["value"], (5.2, 3.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["return"], (3.9, 3.0), rtol=1e-6)


@pytest.mark.parametrize("value_epsilon", [None, 0.0])
def test_value_loss_without_clip(value_epsilon):
    # Halves of 0.01, 0.64 and 4.
    loss, metrics = ppo_value_loss(VALUES, OLD_VALUES, RETURNS, VALUE_MASK, value_epsilon=value_epsilon)
    np.testing.assert_allclose(loss, [2.325], rtol=1e-5)
    assert metrics["clip_fraction"] == (0.0, 3.0)


def test_value_gradient_by_hand():
    # V - R, and 0 where the clip holds the value.
    grad = jax.grad(lambda v: ppo_value_loss(v, OLD_VALUES, RETURNS, VALUE_MASK, value_epsilon=0.5)[0].sum())(VALUES)
    np.testing.assert_allclose(grad, [[0.0, -0.8, 2.0, 0.0]], atol=1e-6)


def test_values_within_the_bounds_are_never_counted_as_clipped():
    # V_old + (V - V_old) differs from V by rounding where V is small against V_old; that is not clipping.
    rng = np.random.default_rng(0)
    old_values = rng.uniform(-0.1, 0.1, (4, 50)).astype(np.float32)
    values, returns = rng.uniform(-0.01, 0.01, (2, 4, 50)).astype(np.float32)
    _, metrics = ppo_value_loss(values, old_values, returns, np.ones((4, 50), bool), value_epsilon=0.2)
    assert metrics["clip_fraction"] == (0.0, 200.0)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1.0, 3.0, 70.0], 1.0),
        ([2.0, 2.0, 70.0], 0.0),
        ([101.0, 103.0, 70.0], 1.0),  # a constant offset is not variance
        ([3.0, 1.0, 70.0], -3.0),  # R - V = -2, 2: variance 4 against 1
    ],
)
def test_explained_variance_by_hand(values, expected):
    mask = jnp.array([[True, True, False]])
    actual = explained_variance(np.array([values], np.float32), np.array([[1.0, 3.0, -50.0]], np.float32), mask)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_explained_variance_of_equal_returns_is_zero():
    ones = np.ones((2, 3), np.float32)
    assert explained_variance(ones * 5, ones, np.ones((2, 3), bool)) == 0
    assert explained_variance(ones * 5, ones, np.zeros((2, 3), bool)) == 0
