"""DPO: a pair laid out once gives the numbers of its two rows, and the step keeps the laws of the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pit_jax import sharding, train_state
from pit_jax.config import ModelConfig
from pit_jax.data import batches, pairs
from pit_jax.learners import dpo, sft
from pit_jax.models.transformer import Transformer
from pit_jax.pipelines.common import init_params, shapes

V, EOS, LENGTH = 32, 2, 32
SIZES = ModelConfig(vocab_size=V, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16)
POLICY = Transformer(SIZES)
SGD = optax.sgd(1.0)  # the change of the parameters is minus the gradient


def mesh_of(data, model):
    return jax.set_mesh(sharding.make_mesh(data, model, devices=jax.devices()[: data * model]))


@functools.cache
def host_parameters(seed):
    """Twice the usual scale, so that answers differ in likelihood."""
    with mesh_of(1, 1):
        return jax.tree.map(lambda x: 2 * x, jax.device_get(init_params(POLICY, jax.random.key(seed))))


def parameters(seed=0):
    """Parameters of their own on the mesh that is set: steps donate what they are given."""
    put = lambda x, like: jax.device_put(x, like.sharding.spec if x.ndim else jax.P())  # noqa: E731
    return jax.tree.map(put, host_parameters(seed), shapes(POLICY))


def ids(rng, low, high):
    return [int(i) for i in rng.integers(3, V, rng.integers(low, high))]


def random_pairs(count, seed=0):
    """Pairs of many lengths; every third begins alike."""
    rng = np.random.default_rng(seed)
    starts = [ids(rng, 1, 3) if i % 3 == 0 else [] for i in range(count)]
    return [([1, *ids(rng, 0, 6)], *([*s, *ids(rng, 0, 7), EOS] for _ in range(2))) for s in starts]


KINDS_OF_PAIRS = {
    "plain": ([1, 5, 6], [7, 8, 9, EOS], [10, 11, EOS]),
    "begin alike": ([1, 5], [7, 8, 9, 10, EOS], [7, 8, 11, EOS]),
    "one is how the other begins": ([1, 5, 6, 7], [8, 9, EOS], [8, 9, 10, 11, EOS]),
    "empty": ([1, 5], [EOS], [6, EOS]),
    "goes on behind the other's EOS": ([1, 5], [6, EOS], [6, EOS, 7, EOS]),
    "repeats the prompt": ([1, 5, 1, 5], [1, 5, EOS], [5, EOS]),
    "one token of prompt": ([1], [6, 7, 8, 9, 10, 11, EOS], [EOS]),
    "alike": ([1, 9, 8], [7, 6, EOS], [7, 6, EOS]),
}
PAIRS = list(KINDS_OF_PAIRS.values())
LENGTHS = np.array([[len(y) for y in answers] for _, *answers in PAIRS])
MANY = PAIRS + random_pairs(8)


def laid_out(rows, multiple=LENGTH):
    """Of one shape, so that tests share programs."""
    return pairs.pair_rows(rows, multiple)


def with_reference(data, rows=None, seed=None):
    """Stored log-probs of a model, or random ones near those of an untrained one."""
    if seed is not None:
        return data._replace(ref_log_probs=dpo.reference_log_probs(POLICY, parameters(seed), rows, 8))
    lengths = np.stack([np.sum(data.target_members >> c & 1, axis=1) for c in range(2)], axis=1)
    noise = np.random.default_rng(0).normal(size=lengths.shape)
    return data._replace(ref_log_probs=(-4 * lengths + noise).astype(np.float32))


def mean(metric):
    return float(metric[0]) / float(metric[1])


def assert_close(a, b, rtol=1e-3, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def assert_gradients_close(a, b, atol=1e-5):
    """Float32 sums that run in another order: relative to the largest entry of a leaf."""
    assert all(np.abs(y).max() > 1e-3 for y in jax.tree.leaves(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol * np.abs(y).max()), a, b)


@functools.partial(jax.jit, static_argnames="chunk_size")
def of_pairs(params, batch, weights, chunk_size=0):
    """(log-probs [B, 2], lengths [B, 2]) and the gradient of the weighted sum of log-probs."""

    def total(p):
        sums, lengths = dpo.pair_log_probs(POLICY, p, batch, chunk_size=chunk_size)
        return jnp.sum(sums * weights), (sums, lengths)

    gradient, outputs = jax.grad(total, has_aux=True)(params)
    return outputs, gradient


@jax.jit
def _of_rows(params, batch, weights):
    def total(p):
        log_probs, mask = sft.row_log_probs(POLICY, p, batch)
        sums = jnp.sum(jnp.where(mask, log_probs, 0.0), axis=1).reshape(-1, 2)
        return jnp.sum(sums * weights), sums

    gradient, sums = jax.grad(total, has_aux=True)(params)
    return sums, gradient


def of_rows(params, rows, weights):
    """The same log-probs, and the gradient, by each row on its own."""
    plain = batches.token_rows([(x, y) for x, *answers in rows for y in answers], LENGTH)
    return _of_rows(params, sharding.shard_batch(plain), weights)


# ------------------------------------------------------------------------------------------------------------ layout


def test_pair_rows_by_hand():
    data = pairs.pair_rows([([1, 5], [6, 7, 2], [6, 2]), ([1, 8, 9], [2], [4, 2]), ([1], [3, 2], [3, 2])])
    expected = {
        "tokens": [[1, 5, 6, 7, 2, 2, 0, 0], [1, 8, 9, 2, 4, 2, 0, 0], [1, 3, 2, 0, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 3, 0, 0], [0, 1, 2, 3, 3, 4, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]],
        "members": [[3, 3, 3, 1, 1, 2, 0, 0], [3, 3, 3, 1, 2, 2, 0, 0], [3, 3, 3, 0, 0, 0, 0, 0]],
        "sources": [[1, 2, 3, 2, 0, 0, 0, 0], [2, 2, 4, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]],
        "targets": [[6, 7, 2, 2, 0, 0, 0, 0], [2, 4, 2, 0, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0, 0, 0]],
        "target_members": [[3, 1, 1, 2, 0, 0, 0, 0], [1, 2, 2, 0, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0, 0, 0]],
    }
    for name, rows in expected.items():
        np.testing.assert_array_equal(getattr(data, name), rows, err_msg=name)
        assert getattr(data, name).dtype == np.int32
    assert data.ref_log_probs.shape == (3, 2) and np.all(np.isnan(data.ref_log_probs))
    with pytest.raises(ValueError, match="pair 1 has an empty prompt"):
        pairs.pair_rows([([1], [2], [2]), ([], [2], [2])])
    with pytest.raises(ValueError, match="pair 0 has an answer without ids"):
        pairs.pair_rows([([1], [2], [])])


def test_the_targets_of_a_pair_are_its_answers():
    """Read off row by row: the answers, each token behind the one before it, and each once."""
    rows = PAIRS + random_pairs(40)
    data = pairs.pair_rows(rows)
    for i, (x, *answers) in enumerate(rows):
        for c, answer in enumerate(answers):
            mine = data.target_members[i] >> c & 1 == 1
            assert list(data.targets[i, mine]) == answer
            sources = data.sources[i, mine]
            assert list(data.tokens[i, sources]) == [*x, *answer][len(x) - 1 : -1]
            assert list(data.positions[i, sources]) == list(range(len(x) - 1, len(x) + len(answer) - 1))
            assert np.all(data.members[i, sources] >> c & 1), "what it is predicted from stands in its row"
        assert np.sum(data.target_members[i] > 0) == np.sum(data.members[i] > 0) - len(x)


@pytest.mark.usefixtures("one_device")
def test_pair_batches_of_like_length():
    """Nothing is cut off, a step is a step, and a batch of two buckets has room for the answers of both."""
    order = [int(n) for n in np.random.default_rng(0).permutation(50)]
    rows = [([1, 5, *[5] * n], [6] * (60 - n) + [EOS], [7, EOS]) for n in order]
    rows += [([1] + [5] * 90, [6, EOS], [7, EOS])] * 15
    data = with_reference(pairs.pair_rows(rows))
    batch_at = pairs.make_pair_batch_at(rows, data.ref_log_probs, 8, seed=3)
    found, seen = [], set()
    for step in range(8):
        batch = jax.tree.map(np.asarray, batch_at(step))
        seen.add((batch.tokens.shape[1], batch.targets.shape[1]))
        for i, ref in enumerate(batch.ref_log_probs):
            (row,) = np.flatnonzero(np.all(data.ref_log_probs == ref, axis=1))
            found.append(int(row))
            for name in batch._fields[:-1]:
                got, whole = getattr(batch, name)[i], getattr(data, name)[row]
                np.testing.assert_array_equal(got, whole[: len(got)])
                if name in ("members", "target_members"):
                    assert not np.any(whole[len(got) :])
        again = pairs.make_pair_batch_at(rows, data.ref_log_probs, 8, seed=3)(step)
        jax.tree.map(np.testing.assert_array_equal, batch, again)
    assert len(set(found)) == 64, "65 pairs: 8 batches of 8, and one that this epoch leaves out"
    # 50 pairs of 65 tokens with up to 63 in the answers, 15 of 95 with 4.
    assert seen == {(72, 64), (96, 64)}


# --------------------------------------------------------------------------------------------------------- log-probs


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_a_pair_has_the_log_probs_and_gradients_of_its_rows(chunk_size):
    weights = np.random.default_rng(1).normal(size=(len(MANY), 2)).astype(np.float32)
    batch = sharding.shard_batch(laid_out(MANY))
    (sums, lengths), gradient = of_pairs(parameters(), batch, weights, chunk_size=chunk_size)
    expected, expected_gradient = of_rows(parameters(), MANY, weights)
    assert np.std(expected) > 1
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_close(gradient, expected_gradient)
    np.testing.assert_array_equal(lengths, [[len(y) for y in answers] for _, *answers in MANY])


@pytest.mark.usefixtures("one_device")
def test_logits_are_made_in_chunks():
    """Not all [B, R, V] of them at once."""
    batch = sharding.shard_batch(laid_out(MANY))
    made = lambda chunk_size: str(  # noqa: E731
        jax.make_jaxpr(lambda p: dpo.pair_log_probs(POLICY, p, batch, chunk_size=chunk_size))(parameters())
    )
    whole, chunk = (f"f32[16@data,{length},{V}@model]" for length in (LENGTH, 8))
    assert whole in made(0) and whole not in made(8) and chunk in made(8)


@pytest.mark.usefixtures("one_device")
def test_what_stands_on_padding_plays_no_part():
    """Longer padding, and any ids in it."""
    data, chosen = laid_out(MANY), np.tile(np.float32([1, 0]), (len(MANY), 1))
    expected = of_pairs(parameters(), sharding.shard_batch(data), chosen)
    longer = laid_out(MANY, 40)
    assert longer.tokens.shape[1] == longer.targets.shape[1] == 40 > LENGTH
    outputs, gradient = of_pairs(parameters(), sharding.shard_batch(longer), chosen)
    assert_close(outputs, expected[0], rtol=1e-5)
    assert_gradients_close(gradient, expected[1])

    rng = np.random.default_rng(0)
    noise = lambda x, free, top: np.where(free, rng.integers(0, top, x.shape), x).astype(np.int32)  # noqa: E731
    free, unused = data.members == 0, data.target_members == 0
    filled = data._replace(
        tokens=noise(data.tokens, free, V), positions=noise(data.positions, free, 9),
        sources=noise(data.sources, unused, LENGTH), targets=noise(data.targets, unused, V),
    )  # fmt: skip
    assert np.any(filled.tokens != data.tokens) and np.any(filled.targets != data.targets)
    outputs, gradient = of_pairs(parameters(), sharding.shard_batch(filled), chosen)
    assert_close(outputs, expected[0], rtol=1e-6)
    assert_gradients_close(gradient, expected[1])


@pytest.mark.usefixtures("one_device")
def test_batch_mates_change_nothing():
    data, chosen = laid_out(MANY), np.tile(np.float32([1, 0]), (len(MANY), 1))
    (together, _), _ = of_pairs(parameters(), sharding.shard_batch(data), chosen)
    for i in range(len(MANY)):
        others = jax.tree.map(lambda x, i=i: np.concatenate([x[i : i + 1], np.roll(x, 3, axis=0)[1:]]), data)
        (sums, _), _ = of_pairs(parameters(), sharding.shard_batch(others), chosen)
        np.testing.assert_allclose(sums[0], together[i], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("one_device")
def test_reference_log_probs_belong_to_their_pairs():
    """In the order of the data, whatever the batches were."""
    data = [MANY[::-1][i % 16] for i in range(19)]
    assert len(np.unique(pairs.pair_buckets(data)[0])) > 1
    expected, _ = of_rows(parameters(1), MANY[::-1], np.ones((16, 2), np.float32))
    for batch_size in (8, 19):
        got = dpo.reference_log_probs(POLICY, parameters(1), data, batch_size)
        assert got.dtype == np.float32 and got.shape == (19, 2)
        np.testing.assert_allclose(got, np.asarray(expected)[np.arange(19) % 16], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- step

SETTINGS = (
    {"beta": 0.3},
    {"beta": 0.5, "label_smoothing": 0.2, "length_normalized": True},
    {"beta": 0.5, "kind": "ipo"},
    {"beta": 0.5, "kind": "hinge", "length_normalized": True},
)


@functools.cache
def step_of(settings):
    return dpo.make_train_step(POLICY, SGD, **dict(settings))


def one_step(data, settings, accumulation=1):
    """(metrics, gradient) of the step."""
    step = step_of(tuple(settings.items()) + (("accumulation", accumulation),) * (accumulation > 1))
    state, metrics = step(train_state.create(parameters(), SGD), sharding.shard_batch(data))
    gradient = jax.tree.map(np.subtract, host_parameters(0), jax.device_get(state.params))
    return jax.device_get(metrics), gradient


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("settings", SETTINGS, ids=["sigmoid", "smoothed", "ipo", "hinge"])
def test_a_policy_that_is_the_reference_has_the_loss_of_no_margin(settings):
    """log 2; (1 / (2 beta))^2 and 1 of the other kinds."""
    loss = {"sigmoid": np.log(2), "ipo": 1.0, "hinge": 1.0}[settings.get("kind", "sigmoid")]
    metrics, _ = one_step(with_reference(laid_out(PAIRS), PAIRS, seed=0), settings)
    # The reference was computed at another length: sums of up to 64 differ by units in the last place of 4e-6.
    np.testing.assert_allclose(mean(metrics["loss"]), loss, rtol=1e-5)
    for name in ("margin", "chosen_reward", "rejected_reward"):
        np.testing.assert_allclose(mean(metrics[name]), 0.0, atol=1e-5, err_msg=name)
    other, _ = one_step(with_reference(laid_out(PAIRS), PAIRS, seed=1), settings)
    assert abs(mean(other["loss"]) - loss) > 0.01, "another reference has another loss"


@pytest.mark.usefixtures("one_device")
def test_the_first_gradient_by_hand():
    """At h = 0 it is that of -beta / 2 (log pi_w - log pi_l), here by rows on their own."""
    _, gradient = one_step(with_reference(laid_out(PAIRS), PAIRS, seed=0), {"beta": 0.3})
    weights = np.tile(np.float32([-0.3 / 2 / 8, 0.3 / 2 / 8]), (8, 1))
    _, expected = of_rows(parameters(), PAIRS, weights)
    assert_gradients_close(gradient, expected, atol=5e-5)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("settings", SETTINGS, ids=["sigmoid", "smoothed", "ipo", "hinge"])
def test_the_step_has_the_loss_of_its_settings(settings):
    """By numpy, from the log-probs of the rows on their own."""
    data = with_reference(laid_out(PAIRS))
    sums = np.asarray(of_rows(parameters(), PAIRS, np.ones((8, 2), np.float32))[0], np.float64)
    ratios = (sums - data.ref_log_probs) / (LENGTHS if settings.get("length_normalized") else 1)
    beta, e = settings["beta"], settings.get("label_smoothing", 0.0)
    h = ratios[:, 0] - ratios[:, 1]
    loss = {
        "sigmoid": (1 - e) * np.log1p(np.exp(-beta * h)) + e * np.log1p(np.exp(beta * h)),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "hinge": np.maximum(0, 1 - beta * h),
    }[settings.get("kind", "sigmoid")]
    metrics, gradient = one_step(data, settings)
    expected = {
        "loss": loss, "accuracy": h > 0, "margin": beta * h,
        "chosen_reward": beta * ratios[:, 0], "rejected_reward": beta * ratios[:, 1],
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(mean(metrics[name]), np.mean(values), rtol=1e-4, atol=1e-5, err_msg=name)
    for c, name in enumerate(("chosen_log_prob", "rejected_log_prob")):  # per token, over all answers
        np.testing.assert_allclose(mean(metrics[name]), sums[:, c].sum() / LENGTHS[:, c].sum(), rtol=1e-5)
    assert mean(metrics["grad_norm"]) > 1e-3
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("one_device")
def test_swapping_chosen_and_rejected_flips_the_margin():
    data = with_reference(laid_out(PAIRS))
    swapped = laid_out([(x, l, w) for x, w, l in PAIRS])._replace(ref_log_probs=data.ref_log_probs[:, ::-1])
    (metrics, _), (other, _) = (one_step(d, SETTINGS[0]) for d in (data, swapped))
    assert abs(mean(metrics["margin"])) > 0.01
    np.testing.assert_allclose(mean(other["margin"]), -mean(metrics["margin"]), rtol=1e-4)
    for a, b in (("chosen_reward", "rejected_reward"), ("chosen_log_prob", "rejected_log_prob")):
        np.testing.assert_allclose(mean(other[a]), mean(metrics[b]), rtol=1e-4)
        np.testing.assert_allclose(mean(other[b]), mean(metrics[a]), rtol=1e-4)


@pytest.mark.usefixtures("one_device")
def test_steps_raise_the_margin_and_keep_their_types():
    data = with_reference(laid_out(random_pairs(8)), random_pairs(8), seed=0)
    optimizer = optax.adam(1e-2)
    step = dpo.make_train_step(POLICY, optimizer, beta=0.1)
    state, batch = train_state.create(parameters(), optimizer), sharding.shard_batch(data)
    before, history = jax.tree.map(jax.typeof, state), []
    for _ in range(10):
        given = state
        state, metrics = step(state, batch)
        history.append({name: mean(value) for name, value in metrics.items()})
    assert jax.tree.map(jax.typeof, state) == before and int(state.step) == 10
    assert step._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(given)), "the state is donated"
    assert np.all(np.diff([h["margin"] for h in history]) > 0)
    assert history[-1]["margin"] > 1 and history[-1]["accuracy"] == 1 and history[-1]["loss"] < 0.5 * np.log(2)


@pytest.mark.usefixtures("one_device")
def test_accumulated_micro_batches_equal_one_batch():
    data = with_reference(laid_out(PAIRS))
    (metrics, gradient), (expected, expected_gradient) = (one_step(data, SETTINGS[1], a) for a in (4, 1))
    assert_close(metrics, expected, rtol=1e-4)
    assert_gradients_close(gradient, expected_gradient)
    with pytest.raises(TypeError, match="reshape"):  # so there are pieces
        one_step(data, SETTINGS[1], 3)


@functools.cache
def step_on(shape, accumulation=1):
    """(metrics, reference log-probs) and gradient on a mesh; the state's types must be those before the step."""
    with mesh_of(*shape):
        data = with_reference(laid_out(MANY), MANY, seed=1)
        state = train_state.create(parameters(), SGD)
        before = jax.tree.map(jax.typeof, state)
        step = dpo.make_train_step(POLICY, SGD, beta=0.5, chunk_size=8, accumulation=accumulation)
        state, metrics = step(state, sharding.shard_batch(data))
        assert jax.tree.map(jax.typeof, state) == before
        gradient = jax.tree.map(np.subtract, host_parameters(0), jax.device_get(state.params))
        return (jax.device_get(metrics), data.ref_log_probs), gradient


@pytest.mark.parametrize(("shape", "accumulation"), [((4, 2), 1), ((8, 1), 2), ((1, 2), 16)])
def test_loss_and_gradients_do_not_depend_on_the_mesh(shape, accumulation):
    numbers, gradient = step_on(shape, accumulation)
    expected, expected_gradient = step_on((1, 1))
    assert_close(numbers, expected)
    assert_gradients_close(gradient, expected_gradient)
