import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.losses import advantages as adv

kl_estimate = jax.jit(adv.kl_estimate, static_argnames="kind")
token_rewards = jax.jit(adv.token_rewards)
gae = jax.jit(adv.gae)
adaptive_kl_update = jax.jit(adv.adaptive_kl_update)


def _lengths_to_mask(lengths, R):
    return np.arange(R) < np.asarray(lengths)[:, None]


def test_kl_estimates_by_hand():
    # d = 0, 1, -1.
    log_probs, ref_log_probs = np.array([-1.0, -1.0, -3.0], np.float32), np.array([-1.0, -2.0, -2.0], np.float32)
    np.testing.assert_allclose(kl_estimate(log_probs, ref_log_probs, kind="k1"), [0, 1, -1])
    np.testing.assert_allclose(kl_estimate(log_probs, ref_log_probs, kind="k2"), [0, 0.5, 0.5])
    k3 = [0, np.exp(-1), np.exp(1) - 2]  # exp(-d) - 1 + d
    np.testing.assert_allclose(kl_estimate(log_probs, ref_log_probs, kind="k3"), k3, rtol=1e-6)
    with pytest.raises(ValueError, match="use k1, k2 or k3"):
        kl_estimate(log_probs, ref_log_probs, kind="k4")


def test_k1_and_k3_are_unbiased():
    # Both policies over three tokens; the expectation over the first is the KL, exactly.
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = np.sum(p * np.log(p / q))
    for kind in ("k1", "k3"):
        estimate = kl_estimate(np.log(p).astype(np.float32), np.log(q).astype(np.float32), kind=kind)
        np.testing.assert_allclose(np.sum(p * estimate), exact, rtol=1e-5)


def test_token_rewards_by_hand():
    # -0.1 * kl, and 0.75 on the last token; then a row of one token, a full row, and one without tokens.
    kl = np.array([[0.5, 0.25, 9.0], [1.0, 9.0, 9.0], [0.0, 0.0, 2.0], [9.0, 9.0, 9.0]], np.float32)
    score = np.array([0.75, -0.5, 1.0, 3.0], np.float32)
    rewards = token_rewards(score, kl, _lengths_to_mask([2, 1, 3, 0], 3), kl_coef=0.1)
    expected = [[-0.05, 0.725, 0.0], [-0.6, 0.0, 0.0], [0.0, 0.0, 0.8], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_token_rewards_sum_to_the_objective(kl_coef):
    # Equations 3 to 5: the score less kl_coef * KL; a fractional score survives in float32.
    rng = np.random.default_rng(0)
    B, R = 6, 9
    score = np.array([0.37, -0.25, 0.001, 1.5, -2.75, 0.5], np.float32)
    kl = rng.normal(size=(B, R)).astype(np.float32)
    mask = _lengths_to_mask(rng.integers(1, R + 1, B), R)
    rewards = token_rewards(score, kl, mask, kl_coef=kl_coef)
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards.sum(1), score - kl_coef * (kl * mask).sum(1), atol=1e-6)


def test_a_whole_number_score_is_refused():
    with pytest.raises(AssertionError):
        token_rewards(np.ones(1, np.int32), np.zeros((1, 2), np.float32), np.ones((1, 2), bool), kl_coef=0.1)


def test_padding_cannot_leak_into_rewards():
    kl = np.array([[0.5, np.nan, np.inf]], np.float32)
    rewards = token_rewards(np.ones(1, np.float32), kl, _lengths_to_mask([1], 3), kl_coef=0.1)
    np.testing.assert_allclose(rewards, [[0.95, 0.0, 0.0]], atol=1e-6)


def test_gae_by_hand():
    # Two tokens, discount 0.9, lambda 0.5: delta_1 = 1 - 0.25 = 0.75, delta_0 = 0.9 * 0.25 - 0.5 = -0.275,
    # A_0 = -0.275 + 0.45 * 0.75 = 0.0625.
    rewards = np.array([[0.0, 1.0, 99.0]], np.float32)
    values = np.array([[0.5, 0.25, 77.0]], np.float32)
    advantages, returns = gae(rewards, values, _lengths_to_mask([2], 3), discount=0.9, gae_lambda=0.5)
    np.testing.assert_allclose(advantages, [[0.0625, 0.75, 0.0]], atol=1e-6)
    np.testing.assert_allclose(returns, [[0.5625, 1.0, 0.0]], atol=1e-6)


def _gae_loop(rewards, values, lengths, discount, gae_lambda):
    advantages = np.zeros_like(rewards)
    for b, length in enumerate(lengths):
        for t in range(length):
            # The definition as a sum, not as the recursion that is under test.
            for k in range(t, length):
                next_value = values[b, k + 1] if k + 1 < length else 0.0
                delta = rewards[b, k] + discount * next_value - values[b, k]
                advantages[b, t] += (discount * gae_lambda) ** (k - t) * delta
    return advantages


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 0.95), (0.97, 0.8), (0.9, 0.0), (1.0, 1.0)])
def test_gae_equals_a_python_loop_in_float64(discount, gae_lambda):
    rng = np.random.default_rng(0)
    lengths = [0, 1, 5, 12, 11]
    rewards, values = rng.normal(size=(2, 5, 12))
    mask = _lengths_to_mask(lengths, 12)
    expected = _gae_loop(rewards, values, lengths, discount, gae_lambda)
    with jax.enable_x64(True):
        advantages, returns = gae(rewards, values, mask, discount=discount, gae_lambda=gae_lambda)
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), rtol=1e-12, atol=1e-12)


def test_gae_with_lambda_1_is_the_discounted_reward_to_go():
    rewards, values = np.random.default_rng(0).normal(size=(2, 2, 4)).astype(np.float32)
    mask = _lengths_to_mask([4, 3], 4)
    _, returns = gae(rewards, values, mask, discount=0.5, gae_lambda=1.0)
    kept = rewards * mask
    to_go = [sum(0.5 ** (k - t) * kept[:, k] for k in range(t, 4)) for t in range(4)]
    np.testing.assert_allclose(returns, np.stack(to_go, 1) * mask, atol=1e-6)


def test_a_perfect_value_function_has_no_advantage():
    # One reward of 2 at the end, discount 1: V = 2 everywhere is exact.
    rewards = np.array([[0.0, 0.0, 2.0, 0.0]], np.float32)
    mask = _lengths_to_mask([3], 4)
    advantages, returns = gae(rewards, np.full((1, 4), 2.0, np.float32), mask, discount=1.0, gae_lambda=0.95)
    np.testing.assert_array_equal(advantages, np.zeros((1, 4)))
    np.testing.assert_array_equal(returns, [[2.0, 2.0, 2.0, 0.0]])


def test_gae_ignores_padding():
    rewards, values = np.random.default_rng(0).normal(size=(2, 2, 4)).astype(np.float32)
    mask = _lengths_to_mask([3, 0], 4)
    dirty = [np.where(mask, x, np.nan).astype(np.float32) for x in (rewards, values)]
    clean = [np.where(mask, x, 0.0).astype(np.float32) for x in (rewards, values)]
    for a, b in zip(
        gae(*dirty, mask, discount=0.9, gae_lambda=0.9), gae(*clean, mask, discount=0.9, gae_lambda=0.9), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "mean_kl, expected",
    [
        (6.0, 0.1),  # on target
        (6.6, 0.100256),  # e = 0.1: 0.1 * (1 + 0.1 * 256 / 10000)
        (12.0, 0.100512),  # e clipped to 0.2
        (0.0, 0.099488),  # e clipped to -0.2
    ],
)
def test_adaptive_kl_by_hand(mean_kl, expected):
    kl_coef = adaptive_kl_update(jnp.float32(0.1), jnp.float32(mean_kl), 256, target=6.0, horizon=10_000)
    np.testing.assert_allclose(kl_coef, expected, rtol=1e-6)
    assert kl_coef.dtype == jnp.float32
