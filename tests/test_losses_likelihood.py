import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.losses import likelihood

negative_log_likelihood = jax.jit(likelihood.negative_log_likelihood)
unlikelihood = jax.jit(likelihood.unlikelihood)


def test_negative_log_likelihood_by_hand():
    # Rows 1 + 2 and 0.5; 3 tokens in all, so the token mean is 3.5 / 3 (the mean of row means would be 1).
    log_probs = np.array([[-1.0, -2.0, -4.0], [-0.5, -8.0, -9.0]], np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    loss, metrics = negative_log_likelihood(log_probs, mask)
    np.testing.assert_array_equal(loss, [3.0, 0.5])
    np.testing.assert_array_equal(metrics["loss"], (3.5, 3.0))


def test_unlikelihood_by_hand():
    # p = 1/2 and 3/4: -log(1/2) = log 2 and -log(1/4) = 2 log 2. The gradient in log p is p / (1 - p): 1 and 3.
    log_probs = jnp.log(jnp.array([[0.5, 0.75, 0.9]]))
    mask = jnp.array([[True, True, False]])
    loss, metrics = unlikelihood(log_probs, mask)
    np.testing.assert_allclose(loss, [3 * np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (3 * np.log(2), 2.0), rtol=1e-6)
    grad = jax.grad(lambda x: unlikelihood(x, mask)[0].sum())(log_probs)
    np.testing.assert_allclose(grad, [[1.0, 3.0, 0.0]], rtol=1e-5)


def test_unlikelihood_of_a_certain_token_is_finite():
    # log p is held at -epsilon: 1 - exp(-1e-4) is 1e-4 to four digits.
    log_probs, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    loss, grad = jax.value_and_grad(lambda x: unlikelihood(x, mask, epsilon=1e-4)[0].sum())(log_probs)
    np.testing.assert_allclose(loss, -np.log(1e-4), rtol=1e-4)
    assert np.isfinite(grad).all()
    assert np.isfinite(unlikelihood(log_probs, mask)[0]).all()


def test_unlikelihood_keeps_small_probabilities():
    # -log(1 - p) = p for small p, where 1 - p has no float32.
    loss, _ = unlikelihood(np.full((1, 1), np.log(1e-12), np.float32), np.ones((1, 1), bool))
    np.testing.assert_allclose(loss, [1e-12], rtol=1e-4)
