import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.losses import log_probs as lp

token_log_probs = jax.jit(lp.token_log_probs, static_argnums=0, static_argnames=("chunk_size", "with_entropy"))

B, T, D, V = 2, 7, 3, 50


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    unembed = rng.normal(size=(D, V)).astype(np.float32)
    return hidden, unembed, rng.integers(0, V, (B, T), dtype=np.int32)


def _identity(x):
    return x


def test_by_hand():
    # Logits 0 and log 3 are probabilities 1/4 and 3/4; entropy = log(4) / 4 + 3 log(4/3) / 4.
    hidden = jnp.array([[[0.0, np.log(3)], [0.0, np.log(3)]]])
    log_probs, entropy = token_log_probs(_identity, hidden, jnp.array([[0, 1]]))
    np.testing.assert_allclose(log_probs, [[np.log(0.25), np.log(0.75)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[0.562335, 0.562335]], rtol=1e-5)


def test_gradients_by_hand():
    # p = 1/4, 3/4. Of log p_1: -p_0 = -1/4 and 1 - p_1 = 1/4. Of the entropy H = 0.562335: -p_i (log p_i + H), which is
    # -(-1.386294 + 0.562335) / 4 = 0.205990 and its negative.
    hidden, targets = jnp.array([[[0.0, np.log(3)]]]), jnp.array([[1]])
    grad = jax.grad(lambda h: token_log_probs(_identity, h, targets)[0].sum())(hidden)
    np.testing.assert_allclose(grad, [[[-0.25, 0.25]]], rtol=1e-6)
    grad = jax.grad(lambda h: token_log_probs(_identity, h, targets)[1].sum())(hidden)
    np.testing.assert_allclose(grad, [[[0.205990, -0.205990]]], rtol=1e-5)


def test_temperature_by_hand():
    # Logits / 0.5 are 0 and log 9: probabilities 0.1 and 0.9.
    hidden = jnp.array([[[0.0, np.log(3)]]])
    log_probs, entropy = token_log_probs(_identity, hidden, jnp.array([[1]]), temperature=0.5)
    np.testing.assert_allclose(log_probs, [[np.log(0.9)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[-0.1 * np.log(0.1) - 0.9 * np.log(0.9)]], rtol=1e-6)


def test_every_token_of_the_vocabulary_sums_to_one():
    hidden, unembed, _ = _inputs()

    def logits_fn(x):
        return x @ unembed

    total = sum(np.exp(token_log_probs(logits_fn, hidden, np.full((B, T), v, np.int32))[0]) for v in range(V))
    np.testing.assert_allclose(total, np.ones((B, T)), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_chunks_change_neither_values_nor_gradients(chunk_size):
    hidden, unembed, targets = _inputs()

    def loss(hidden, unembed, chunk_size):
        outputs = token_log_probs(lambda x: x @ unembed, hidden, targets, temperature=0.7, chunk_size=chunk_size)
        weight = jnp.arange(1.0, T + 1)  # positions must not be exchanged either
        return jnp.sum(weight * outputs[0]) + jnp.sum(weight * outputs[1]), outputs

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    expected, actual = grad(hidden, unembed, None), grad(hidden, unembed, chunk_size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)
    assert actual[1][0].shape == actual[1][1].shape == (B, T)


def _sizes(jaxpr):
    """Sizes of all arrays that a jaxpr and those within it compute."""
    for eqn in jaxpr.eqns:
        yield from (np.prod(v.aval.shape) for v in eqn.outvars)
        for parameter in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(parameter, "eqns"):
                yield from _sizes(parameter)
            elif hasattr(parameter, "jaxpr"):
                yield from _sizes(parameter.jaxpr)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_logits_of_the_whole_sequence_never_exist(with_entropy):
    hidden, unembed, targets = _inputs()

    def loss(hidden, unembed, chunk_size):
        outputs = token_log_probs(
            lambda x: x @ unembed, hidden, targets, chunk_size=chunk_size, with_entropy=with_entropy
        )
        return sum(jnp.sum(x) for x in jax.tree.leaves(outputs))

    def largest(chunk_size):
        return max(_sizes(jax.make_jaxpr(jax.grad(lambda h, u: loss(h, u, chunk_size), (0, 1)))(hidden, unembed).jaxpr))

    assert largest(None) == B * T * V
    assert largest(2) == B * 2 * V  # nor as residuals of the scan, which would be as large as all logits


def test_no_scan_and_no_recomputation_in_one_piece():
    hidden, unembed, targets = _inputs()
    for chunk_size in (None, T):
        text = str(
            jax.make_jaxpr(lambda h, c=chunk_size: token_log_probs(lambda x: x @ unembed, h, targets, chunk_size=c))(
                hidden
            )
        )
        assert "scan" not in text and "checkpoint" not in text and "remat" not in text


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_without_entropy(chunk_size):
    hidden, unembed, targets = _inputs()
    both = token_log_probs(lambda x: x @ unembed, hidden, targets, chunk_size=chunk_size)
    alone = token_log_probs(lambda x: x @ unembed, hidden, targets, chunk_size=chunk_size, with_entropy=False)
    np.testing.assert_array_equal(alone[0], both[0])
    assert alone[1] is None


def test_large_logits_stay_finite():
    hidden = jnp.array([[[1e4, -1e4, 0.0]]])
    value, grad = jax.value_and_grad(
        lambda h: sum(jnp.sum(x) for x in token_log_probs(_identity, h, jnp.array([[1]])))
    )(hidden)
    assert value == -2e4 and np.isfinite(grad).all()


def test_bfloat16_logits_are_normalised_in_float32():
    hidden = jnp.zeros((1, 1, 1000), jnp.bfloat16)
    log_probs, entropy = token_log_probs(_identity, hidden, jnp.array([[5]]))
    assert log_probs.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose([log_probs[0, 0], entropy[0, 0]], [-np.log(1000), np.log(1000)], rtol=1e-6)


def test_chunk_size_zero_is_refused_with_the_remedy():
    hidden, unembed, targets = _inputs()
    with pytest.raises(ValueError, match="None for all at once"):
        token_log_probs(lambda x: x @ unembed, hidden, targets, chunk_size=0)
