import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.losses import preference
from pit_jax.types import GAP_PAIRINGS

bradley_terry = jax.jit(preference.bradley_terry)
gap_loss = jax.jit(preference.gap_loss, static_argnames="diagonal")
gap_mse = jax.jit(preference.gap_mse)
dpo_loss = jax.jit(preference.dpo_loss, static_argnames=("beta", "kind", "label_smoothing"))


def _scores(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_bradley_terry_by_hand():
    # Margins 2 and 0: log(1 + exp(-2)) = 0.126928 and log 2. A tie is not accurate.
    loss, metrics = bradley_terry(np.array([1.0, 3.0], np.float32), np.array([-1.0, 3.0], np.float32))
    np.testing.assert_allclose(loss, [0.126928, 0.693147], atol=1e-6)
    assert metrics["accuracy"] == (1.0, 2.0)
    assert metrics["margin"] == (2.0, 2.0)
    assert metrics["chosen_score"] == (4.0, 2.0) and metrics["rejected_score"] == (2.0, 2.0)


def test_swapping_the_pair_flips_the_margin():
    chosen, rejected = _scores(6), _scores(6, seed=1)
    loss, metrics = bradley_terry(chosen, rejected)
    swapped, swapped_metrics = bradley_terry(rejected, chosen)
    np.testing.assert_allclose(swapped_metrics["margin"][0], -metrics["margin"][0], rtol=1e-6)
    # log sigmoid(m) - log sigmoid(-m) = m.
    np.testing.assert_allclose(swapped - loss, chosen - rejected, atol=1e-5)
    assert swapped_metrics["accuracy"][0] == 6 - metrics["accuracy"][0]


def test_gap_loss_by_hand():
    # The order of the columns is wl, ww, ll, lw. Differences of Equation 2: wl - ww = 2, wl - ll = 2.5, wl - lw = 4,
    # ww - lw = 2, ll - lw = 1.5, and log(1 + exp(-d)) of them:
    # 0.126928 + 0.078889 + 0.018150 + 0.126928 + 0.201413 = 0.552308.
    assert GAP_PAIRINGS == (("w", "l"), ("w", "w"), ("l", "l"), ("l", "w"))
    scores = np.array([[3.0, 1.0, 0.5, -1.0]], np.float32)
    loss, metrics = gap_loss(scores)
    np.testing.assert_allclose(loss, [0.552308], atol=1e-6)
    gaps = {name: float(metrics[f"gap_{name}"][0]) for name in ("wl", "ww", "ll", "lw")}
    assert gaps == {"wl": 3.0, "ww": 1.0, "ll": 0.5, "lw": -1.0}
    # Appendix C, without r(w, w) and r(l, l): log(1 + exp(-4)).
    np.testing.assert_allclose(gap_loss(scores, diagonal=False)[0], [0.018150], atol=1e-6)


def test_gap_loss_of_equal_gaps():
    # Five times log sigmoid(0); each pulls with 1/2: wl is the better side of 3, lw the worse of 3, ww and ll
    # each of one.
    loss, grad = jax.value_and_grad(lambda s: gap_loss(s)[0].sum())(jnp.full((1, 4), 0.3))
    np.testing.assert_allclose(loss, 5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1.5, 0.0, 0.0, 1.5]], atol=1e-6)


def test_the_diagonal_gets_no_gradient_without_its_terms():
    grad = jax.grad(lambda s: gap_loss(s, diagonal=False)[0].sum())(_scores(3, 4))
    np.testing.assert_array_equal(grad[:, 1:3], np.zeros((3, 2)))
    assert (np.abs(grad[:, [0, 3]]) > 0).all()


def test_exchanging_w_and_l_flips_the_sign_of_the_gap_margin():
    # w <-> l turns wl, ww, ll, lw into lw, ll, ww, wl. Of each term, log sigmoid(d) - log sigmoid(-d) = d; the five d
    # sum to 3 (wl - lw).
    scores = _scores(8, 4)
    loss, metrics = gap_loss(scores)
    swapped, swapped_metrics = gap_loss(scores[:, ::-1])
    np.testing.assert_allclose(swapped - loss, 3 * (scores[:, 0] - scores[:, 3]), atol=1e-5)
    assert swapped_metrics["accuracy"][0] == 8 - metrics["accuracy"][0]


def test_gap_loss_sees_differences_only():
    scores = _scores(5, 4)
    np.testing.assert_allclose(gap_loss(scores + 7)[0], gap_loss(scores)[0], rtol=1e-4)


def test_gap_accuracies():
    # Right order; a tie of wl and lw; right ends, but a model that ignores y_2 (wl == ww, ll == lw); ends exchanged.
    scores = np.array([[2, 1, 1, 0], [1, 1, 1, 1], [2, 2, 0, 0], [0, 1, 1, 2]], np.float32)
    _, metrics = gap_loss(scores)
    assert metrics["accuracy"] == (2.0, 4.0)
    assert metrics["order_accuracy"] == (1.0, 4.0)


def test_gap_mse_by_hand():
    # Targets 1, 0.5, 0.5, 0: no error; (1 + 0.25 + 0.25 + 0) / 4; 1 / 4 from the last column alone.
    scores = np.array([[1, 0.5, 0.5, 0], [0, 0, 0, 0], [1, 0.5, 0.5, 1]], np.float32)
    loss, metrics = gap_mse(scores)
    np.testing.assert_allclose(loss, [0.0, 0.375, 0.25], rtol=1e-6)
    assert metrics["accuracy"] == (1.0, 3.0)


# h = 2 - (-1) = 3.
LOG_PROBS, REF_LOG_PROBS = np.array([[-8.0, -12.0]], np.float32), np.array([[-10.0, -11.0]], np.float32)


@pytest.mark.parametrize(
    "coefficients, expected",
    [
        ({"beta": 0.1}, 0.554355),  # log(1 + exp(-0.3))
        ({"beta": 0.1, "label_smoothing": 0.3}, 0.644355),  # 0.7 * 0.554355 + 0.3 * (0.554355 + 0.3)
        ({"beta": 0.1, "kind": "hinge"}, 0.7),  # 1 - 0.3
        ({"beta": 1.0, "kind": "hinge"}, 0.0),  # 1 - 3 < 0
        ({"beta": 0.5, "kind": "ipo"}, 4.0),  # (3 - 1)^2
        ({"beta": 0.1, "lengths": np.array([[2, 1]])}, 0.598139),  # h = 2 / 2 + 1 / 1; log(1 + exp(-0.2))
    ],
)
def test_dpo_by_hand(coefficients, expected):
    loss, _ = dpo_loss(LOG_PROBS, REF_LOG_PROBS, **coefficients)
    np.testing.assert_allclose(loss, [expected], atol=1e-6)


def test_dpo_metrics_by_hand():
    # Rewards 0.1 * 2 and 0.1 * -1.
    _, metrics = dpo_loss(LOG_PROBS, REF_LOG_PROBS, beta=0.1)
    actual = [metrics[name][0] for name in ("chosen_reward", "rejected_reward", "margin", "accuracy")]
    np.testing.assert_allclose(actual, [0.2, -0.1, 0.3, 1.0], atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_starts_at_log_2(label_smoothing):
    log_probs = _scores(4, 2) - 30
    loss, metrics = dpo_loss(log_probs, log_probs, beta=0.3, label_smoothing=label_smoothing)
    np.testing.assert_allclose(loss, np.full(4, np.log(2)), rtol=1e-6)
    assert metrics["accuracy"] == (0.0, 4.0) and metrics["margin"][0] == 0


def test_dpo_swapping_the_pair_flips_the_margin():
    log_probs, ref_log_probs = _scores(5, 2), _scores(5, 2, seed=1)
    loss, metrics = dpo_loss(log_probs, ref_log_probs, beta=0.5)
    swapped, swapped_metrics = dpo_loss(log_probs[:, ::-1], ref_log_probs[:, ::-1], beta=0.5)
    np.testing.assert_allclose(swapped_metrics["margin"][0], -metrics["margin"][0], rtol=1e-5)
    np.testing.assert_allclose((swapped - loss).sum(), metrics["margin"][0], rtol=1e-5)
    # A gradient step raises the chosen and lowers the rejected one by as much.
    grad = jax.grad(lambda x: dpo_loss(x, ref_log_probs, beta=0.5)[0].sum())(log_probs)
    assert (grad[:, 0] < 0).all()
    np.testing.assert_allclose(grad[:, 0], -grad[:, 1], rtol=1e-6)


def test_an_empty_response_keeps_length_normalised_dpo_finite():
    zeros = np.zeros((1, 2), np.float32)
    loss, _ = dpo_loss(zeros, zeros, beta=0.1, lengths=np.array([[3, 0]]))
    np.testing.assert_allclose(loss, [np.log(2)], rtol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda scores, *mask: bradley_terry(scores[:, 0], scores[:, 1], *mask),
        lambda scores, *mask: preference.gap_loss(scores, *mask),
        lambda scores, *mask: preference.gap_mse(scores, *mask),
    ],
    ids=["bradley_terry", "gap", "mse"],
)
def test_rows_that_a_mask_drops_do_not_count(loss):
    scores, mask = _scores(5, 4), np.array([True, False, True, True, False])
    scores = jnp.where(mask[:, None], scores, jnp.nan)
    per_row, metrics = loss(scores, mask)
    expected, expected_metrics = loss(scores[mask])
    np.testing.assert_allclose(per_row[mask], expected, rtol=1e-6)
    np.testing.assert_array_equal(per_row[~mask], [0.0, 0.0])
    assert metrics.keys() == expected_metrics.keys()
    for name, (value, weight) in metrics.items():
        assert weight == 3 == expected_metrics[name][1]
        np.testing.assert_allclose(value, expected_metrics[name][0], rtol=1e-6)


def test_dpo_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="use sigmoid, ipo or hinge"):
        dpo_loss(LOG_PROBS, REF_LOG_PROBS, beta=0.1, kind="sigmoids")
    with pytest.raises(ValueError, match="no meaning for the ipo loss"):
        dpo_loss(LOG_PROBS, REF_LOG_PROBS, beta=0.1, kind="ipo", label_smoothing=0.1)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_margins_stay_finite(extreme):
    for loss in (
        lambda x: bradley_terry(x, jnp.zeros(1))[0].sum(),
        lambda x: gap_loss(jnp.concatenate([x, jnp.zeros(3)])[None])[0].sum(),
        lambda x: dpo_loss(jnp.concatenate([x, jnp.zeros(1)])[None], jnp.zeros((1, 2)), beta=0.1)[0].sum(),
    ):
        value, grad = jax.value_and_grad(loss)(jnp.full(1, extreme))
        assert np.isfinite(value) and np.isfinite(grad).all()
