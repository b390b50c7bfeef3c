"""Sampling: log-probs are those of a fresh forward pass, masks come from lengths, noise from row numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax import sampling, sharding
from pit_jax.config import ModelConfig, PPOConfig, SamplingConfig
from pit_jax.data import batches
from pit_jax.learners.ppo import response_log_probs
from pit_jax.models import attention, transformer
from pit_jax.models.transformer import Transformer
from pit_jax.pipelines.common import init_params
from pit_jax.types import PromptBatch

pytestmark = pytest.mark.usefixtures("one_device")

V, EOS = 16, 2
MODEL = Transformer(
    ModelConfig(
        vocab_size=V, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, tie_embeddings=False
    )
)
PROMPTS = [[1, 5, 9], [1, 4], [1, 7, 3, 11, 6], [1]]


@functools.cache
def made():
    """Random parameters; the unembedding is scaled up, so that distributions are far from uniform."""
    params = init_params(MODEL, jax.random.key(1))["params"]
    return {"params": {**params, "unembedding": params["unembedding"] * 4}}


@functools.partial(jax.jit, static_argnames=("settings", "eos_id", "traced_for"))
def _generate(params, prompts, key, settings, eos_id, traced_for):
    """`traced_for` is what tests set outside the arguments: with others it is another program."""
    return sampling.generate(params, prompts, key, model=MODEL, config=settings, eos_id=eos_id)


def generate(prompts, *, params=None, seed=0, eos_id=EOS, **settings):
    """A rollout on the host; 6 new tokens unless said."""
    settings = SamplingConfig(**{"max_new_tokens": 6, **settings})
    batch = sharding.shard_batch(batches.prompt_rows(prompts, 6))
    traced_for = transformer.SLOTS, attention.platform()
    return jax.device_get(_generate(params or made(), batch, jax.random.key(seed), settings, eos_id, traced_for))


@jax.jit
def _logits(params, tokens, segments, positions):
    return MODEL.apply(params, tokens, segments, positions, method=Transformer.full_logits)


def fresh_logits(rollout, params=None):
    """[B, R, V] of a full forward pass over a rollout, at the positions that chose its response."""
    arrays = sharding.shard_batch((rollout.tokens, rollout.segments, rollout.positions))
    return np.asarray(_logits(params or made(), *arrays))[:, -rollout.response_mask.shape[1] - 1 : -1]


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.sum(np.exp(x - x.max(-1, keepdims=True)), -1, keepdims=True)) - x.max(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_log_probs_are_those_of_a_fresh_forward(temperature):
    rollout = generate(PROMPTS * 4, temperature=temperature)
    mask = rollout.response_mask
    lengths = mask.sum(1)
    assert lengths.min() < 6 and lengths.max() == 6, "some rows end early and some do not"
    fresh = functools.partial(response_log_probs, MODEL, temperature=temperature)
    expected, _ = jax.jit(fresh)(made(), sharding.shard_batch(rollout))
    np.testing.assert_allclose(rollout.log_probs[mask], np.asarray(expected)[mask], rtol=1e-4, atol=1e-5)
    # By NumPy, from the logits.
    logs = log_softmax(fresh_logits(rollout) / temperature)
    picked = np.take_along_axis(logs, rollout.tokens[:, -6:, None], -1)[..., 0]
    np.testing.assert_allclose(rollout.log_probs[mask], picked[mask], rtol=1e-4, atol=1e-5)
    assert np.all(rollout.log_probs[~mask] == 0) and np.all(rollout.log_probs[mask] < 0)


def test_the_layout_of_a_rollout():
    rollout = generate(PROMPTS * 4)
    tokens, mask = rollout.tokens[:, -6:], rollout.response_mask
    for i, prompt in enumerate(PROMPTS * 4):
        n, m = len(prompt), int(mask[i].sum())
        assert list(rollout.tokens[i, 6 - n : 6]) == prompt
        assert list(mask[i]) == [True] * m + [False] * (6 - m)
        assert EOS not in tokens[i, : m - 1] and (m == 6 or tokens[i, m - 1] == EOS), "up to and including EOS"
        assert list(rollout.segments[i]) == [0] * (6 - n) + [1] * (n + m) + [0] * (6 - m)
        assert list(rollout.positions[i, 6 - n : 6 + m]) == list(range(n + m))


def forced(first, then):
    """Parameters under which a row answers `first[t]` to a prompt that ends in t, and `then` to every other token.

    Layers add nothing; the hidden state of token t is its own direction, which the unembedding maps to the answer.
    """
    params = jax.tree.map(jnp.zeros_like, made()["params"])
    embedding = np.zeros((V, 8), np.float32)
    embedding[:, 7] = 1.0
    unembedding = np.zeros((V, 8), np.float32)
    unembedding[then, 7] = 30.0
    for axis, (token, answer) in enumerate(first.items()):
        embedding[token] = np.eye(8)[axis]
        unembedding[answer, axis] = 30.0
    spec = jax.typeof(params["embedding"]).sharding.spec
    put = lambda x: jax.device_put(x, spec)  # noqa: E731
    norm = {"scale": jnp.ones_like(params["norm"]["scale"])}
    return {"params": {**params, "norm": norm, "embedding": put(embedding), "unembedding": put(unembedding)}}


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_eos_at_position_0(temperature):
    """Token 5 is answered with EOS at once; all others with 9, for ever."""
    params = forced({5: EOS}, then=9)
    rollout = generate([[1, 5], [1, 6], [5, 1, 5]], params=params, temperature=temperature)
    expected = [[EOS, 0, 0, 0, 0, 0], [9] * 6, [EOS, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(rollout.tokens[:, -6:], expected)
    np.testing.assert_array_equal(rollout.response_mask.sum(1), [1, 6, 1])
    assert rollout.response_mask[0, 0] and rollout.response_mask[2, 0]
    np.testing.assert_array_equal(rollout.segments[:, 6:], rollout.response_mask)
    np.testing.assert_allclose(rollout.log_probs, 0.0, atol=1e-6)


def test_it_stops_when_all_rows_have_ended(monkeypatch):
    steps = []

    def counted(logits, **settings):
        jax.debug.callback(lambda: steps.append(1))
        return restrict(logits, **settings)

    restrict = sampling.restrict
    monkeypatch.setattr(sampling, "restrict", counted)
    for prompts, expected in (([[1, 5], [1, 5]], 1), ([[1, 5], [1, 6]], 7)):
        steps.clear()
        generate(prompts, params=forced({5: EOS}, then=9), max_new_tokens=7)
        jax.effects_barrier()
        assert len(steps) == expected


def test_greedy_equals_step_by_step_argmax():
    rollout = generate(PROMPTS, temperature=0.0)
    for a, b in zip(rollout, generate(PROMPTS, temperature=0.0, seed=5), strict=True):
        np.testing.assert_array_equal(a, b)
    sampled = generate(PROMPTS, temperature=1.0)
    assert not np.array_equal(sampled.tokens, rollout.tokens)

    length = 12
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6:  # a full forward pass for every token, right-padded
            tokens = np.array([ids + [0] * (length - len(ids))], np.int32)
            segments = (np.arange(length) < len(ids)).astype(np.int32)[None]
            positions = np.arange(length, dtype=np.int32)[None]
            logits = np.asarray(_logits(made(), *sharding.shard_batch((tokens, segments, positions))))
            ids.append(int(logits[0, len(ids) - 1].argmax()))
            if ids[-1] == EOS:
                break
        assert ids == list(rollout.tokens[i][rollout.segments[i] > 0])
    # The log-probs are those of temperature 1.
    logs = np.take_along_axis(log_softmax(fresh_logits(rollout)), rollout.tokens[:, -6:, None], -1)[..., 0]
    mask = rollout.response_mask
    np.testing.assert_allclose(rollout.log_probs[mask], logs[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moved", ["eos", "bos"])
def test_ids_of_pad_bos_and_eos_do_not_matter(moved):
    """Renaming the vocabulary so that EOS or BOS has id 0, which also fills padding, renames the responses."""
    rename = np.arange(V)
    a = EOS if moved == "eos" else 1
    rename[[0, a]] = [a, 0]
    params = made()["params"]
    table = lambda k: jax.device_put(np.asarray(params[k])[rename], jax.typeof(params[k]).sharding.spec)  # noqa: E731
    renamed = {"params": {**params, **{k: table(k) for k in ("embedding", "unembedding")}}}
    expected = generate(PROMPTS * 2, temperature=0.0)
    assert expected.response_mask.sum(1).min() < 6
    prompts = [[int(rename[t]) for t in row] for row in PROMPTS * 2]
    rollout = generate(prompts, params=renamed, temperature=0.0, eos_id=int(rename[EOS]))
    np.testing.assert_array_equal(rollout.response_mask, expected.response_mask)
    np.testing.assert_array_equal(rollout.segments, expected.segments)
    real = expected.segments > 0
    np.testing.assert_array_equal(rollout.tokens[real], rename[expected.tokens[real]])
    np.testing.assert_allclose(rollout.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)


def test_noise_of_a_row_does_not_depend_on_its_batch():
    whole = generate(PROMPTS * 2)
    for a, b in zip(generate(PROMPTS[:2]), whole, strict=True):
        np.testing.assert_allclose(a, b[:2], rtol=1e-5, atol=1e-6)
    others = generate([[3, 3], [4], PROMPTS[2], [5, 5, 5, 5]])
    np.testing.assert_array_equal(others.tokens[2], whole.tokens[2])
    # The same prompt in another row, or under another key, draws something else.
    assert not np.array_equal(whole.tokens[:4], whole.tokens[4:])
    assert not np.array_equal(generate(PROMPTS * 2, seed=1).tokens, whole.tokens)


def test_frequencies_are_the_distribution():
    rollout = generate([[1, 5, 9]] * 4000, temperature=3.0, max_new_tokens=1)
    expected = np.exp(log_softmax(fresh_logits(rollout)[0, 0] / 3.0))
    frequency = np.bincount(rollout.tokens[:, -1], minlength=V) / 4000
    assert expected.max() < 0.9
    np.testing.assert_allclose(frequency, expected, atol=4 * np.sqrt(0.25 / 4000))


def support(logits, temperature, top_k, top_p):
    """The kept tokens of one row, by NumPy: the k largest, then the fewest of these whose mass is at least p."""
    logits = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-logits)[: top_k or None]
    probs = np.exp(logits[order] - logits[order].max())
    probs /= probs.sum()
    return set(order[: int(np.searchsorted(np.cumsum(probs), top_p)) + 1] if top_p < 1 else order)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (99, 1.0), (0, 0.01), (0, 0.55), (0, 0.9), (5, 0.7)]
)
def test_restrict_keeps_exactly_the_support(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(6, V)).astype(np.float32) * 2
    cut = np.asarray(sampling.restrict(logits, temperature=temperature, top_k=top_k, top_p=top_p))
    for row, kept in zip(logits, cut, strict=True):
        assert set(np.flatnonzero(np.isfinite(kept))) == support(row, temperature, top_k, top_p)
    np.testing.assert_allclose(cut[np.isfinite(cut)], (logits / temperature)[np.isfinite(cut)], rtol=1e-6)


def test_nucleus_by_hand():
    """Probabilities 0.5, 0.3, 0.15, 0.05: p = 0.6 needs two tokens, 0.85 three, 0.96 all four."""
    logits = np.log(np.array([[0.15, 0.5, 0.05, 0.3]], np.float32))
    kept = lambda p: list(np.isfinite(sampling.restrict(logits, temperature=1.0, top_k=0, top_p=p))[0])  # noqa: E731
    assert kept(0.4) == [False, True, False, False]
    assert kept(0.6) == [False, True, False, True]
    assert kept(0.85) == [True, True, False, True]
    assert kept(0.96) == [True] * 4


def test_restricted_samples_and_their_log_probs():
    rollout = generate(PROMPTS * 4, temperature=0.8, top_k=3)
    mask, tokens = rollout.response_mask, rollout.tokens[:, -6:]
    logits = fresh_logits(rollout) / 0.8
    kth = np.sort(logits, -1)[..., -3]
    picked = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    assert np.all((picked >= kth - 1e-5)[mask])
    logs = log_softmax(np.where(logits >= kth[..., None] - 1e-6, logits, -np.inf))
    logs = np.take_along_axis(logs, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(rollout.log_probs[mask], logs[mask], rtol=1e-4, atol=1e-5)
    one = generate(PROMPTS, top_k=1)
    np.testing.assert_array_equal(one.tokens, generate(PROMPTS, temperature=0.0).tokens)
    np.testing.assert_allclose(one.log_probs, 0.0, atol=1e-6)


def test_ppo_refuses_a_restricted_distribution():
    for settings in ({"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match="must stay off"):
            PPOConfig(**settings)
        with pytest.raises(ValueError, match="must stay off"):
            dataclasses.replace(PPOConfig(), **settings)


def test_append_ids_by_hand():
    """A response that fills its window has no EOS; nothing is read behind the mask."""
    prompts = PromptBatch(np.array([[0, 1, 5], [1, 4, 6]], np.int32), np.array([2, 3], np.int32))
    rollout = sampling.append_ids(prompts, [[7, 8, 9], [3]], 3, eos_id=EOS)
    np.testing.assert_array_equal(rollout.tokens, [[0, 1, 5, 7, 8, 9], [1, 4, 6, 3, EOS, 0]])
    np.testing.assert_array_equal(rollout.segments, [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(rollout.positions, [[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(rollout.response_mask, [[True, True, True], [True, True, False]])
    assert all(isinstance(x, np.ndarray) for x in rollout)


def test_a_row_ends_behind_a_stop_sequence():
    """Up to its first occurrence it is the row without stop."""
    free = generate(PROMPTS, temperature=0.0, eos_id=V, max_new_tokens=12)
    rows = free.tokens[:, -12:]
    stop = tuple(int(i) for i in rows[0, 4:6])
    batch = sharding.shard_batch(batches.prompt_rows(PROMPTS, 6))
    settings = SamplingConfig(max_new_tokens=12, temperature=0.0)
    run = functools.partial(sampling.generate, model=MODEL, config=settings, eos_id=V, stop=stop)
    stopped = jax.device_get(jax.jit(run)(made(), batch, jax.random.key(0)))
    lengths = []
    for row, got, mask in zip(rows, stopped.tokens[:, -12:], stopped.response_mask, strict=True):
        ends = [k + 2 for k in range(11) if tuple(row[k : k + 2]) == stop]
        lengths.append(ends[0] if ends else 12)
        assert mask.tolist() == [k < lengths[-1] for k in range(12)]
        np.testing.assert_array_equal(got[mask], row[: lengths[-1]])
    assert lengths[0] <= 6 and max(lengths) == 12, "one row stops and one does not"


MANY = [[1, 5, 9], [1, 4], [1, 7, 3, 11, 6], [1], [3, 3], [4, 8, 1], [5, 5, 5, 5], [9, 1], [6, 12], [1, 13, 2, 2], [7]]
MANY += [[2, 9, 4]]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_rows_that_take_turns_in_slots_are_the_same_rows(monkeypatch, slots, temperature):
    """Also where a slot's cache still holds what the row before it has left, and the ring has gone round.

    Blocks of 4 slots: of 16 in the cache a prompt that is read brings 8 of its own.
    """
    monkeypatch.setattr(transformer, "SLOTS", 4)
    whole = generate(MANY, temperature=temperature, max_new_tokens=9)
    lengths = whole.response_mask.sum(1)
    assert lengths.min() < 5 and lengths.max() == 9, "rows end at different times"
    turns = generate(MANY, temperature=temperature, max_new_tokens=9, slots=slots)
    for name in ("tokens", "segments", "positions", "response_mask"):
        np.testing.assert_array_equal(getattr(turns, name), getattr(whole, name))
    np.testing.assert_allclose(turns.log_probs, whole.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rows_that_take_turns_on_two_devices_are_the_same_rows(monkeypatch, platform):
    """With layers apart, as on a CPU, and together; of two prompts at a time each device reads one, for any slot."""
    monkeypatch.setattr(transformer, "SLOTS", 4)
    whole = generate(MANY, max_new_tokens=9)
    lengths = whole.response_mask.sum(1)
    assert lengths.min() < 5 and lengths.max() == 9, "rows end at different times"
    monkeypatch.setattr(attention, "platform", lambda: platform)
    with jax.set_mesh(sharding.make_mesh(2, 1, devices=jax.devices()[:2])):
        put = lambda x: jax.device_put(np.asarray(x), jax.typeof(x).sharding.spec)  # noqa: E731
        turns = generate(MANY, params=jax.tree.map(put, made()), max_new_tokens=9, slots=4)
    for name in ("tokens", "segments", "positions", "response_mask"):
        np.testing.assert_array_equal(getattr(turns, name), getattr(whole, name))
    # float32, whose sums are made in another order
    np.testing.assert_allclose(turns.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)


def test_keys_lie_in_several_blocks(monkeypatch):
    """Blocks of 4 slots for 6 of the prompt and 10 new tokens: the last of the prompt is not full when it is read."""
    monkeypatch.setattr(transformer, "SLOTS", 4)
    rollout = generate(MANY, max_new_tokens=10)
    mask, logs = rollout.response_mask, log_softmax(fresh_logits(rollout))
    picked = np.take_along_axis(logs, rollout.tokens[:, -10:, None], -1)[..., 0]
    assert mask.sum(1).max() == 10
    np.testing.assert_allclose(rollout.log_probs[mask], picked[mask], rtol=1e-4, atol=1e-5)
    turns = generate(MANY, max_new_tokens=10, slots=3)
    np.testing.assert_array_equal(turns.tokens, rollout.tokens)


def test_slots_that_are_free_take_prompts_that_wait(monkeypatch):
    """Of 16 rows every fourth has 7 tokens and the others one, of which reading the prompt gives the first.

    In 8 slots, of which one is filled at a time. The first long row stands in slot 3, the next in those after it as
    soon as they are free: tokens 2 to 7 of all take 6 steps, where two batches of 8 would take 12.
    """
    read = []

    def counted(*arguments, **kwargs):
        if kwargs.get("method") is None and arguments[1].shape[1] == 1:
            jax.debug.callback(lambda: read.append(1))
        return apply(*arguments, **kwargs)

    apply = MODEL.apply
    monkeypatch.setattr(type(MODEL), "apply", lambda self, *arguments, **kwargs: counted(*arguments, **kwargs))
    params = forced({5: EOS}, then=9)
    prompts = [[1, 5], [1, 5], [1, 5], [1, 6]] * 4
    for slots, expected in ((0, 6), (8, 6), (2, 12)):
        read.clear()
        rollout = generate(prompts, params=params, max_new_tokens=7, slots=slots)
        jax.effects_barrier()
        np.testing.assert_array_equal(rollout.response_mask.sum(1), [1, 1, 1, 7] * 4)
        assert len(read) == expected, slots


def test_a_prompt_of_several_samples_is_read_once(monkeypatch):
    rows = []

    def counted(prompts):
        rows.append(len(prompts.tokens))
        return layout(prompts)

    layout = sampling.prompt_layout
    prompts = [row for row in MANY[:4] for _ in range(3)]
    batch = sharding.shard_batch(batches.prompt_rows(prompts, 6))

    def run(samples, slots):
        settings = SamplingConfig(max_new_tokens=9, slots=slots)
        one = functools.partial(
            sampling.generate, model=MODEL, config=settings, eos_id=EOS, samples=samples
        )  # fmt: skip
        return jax.device_get(jax.jit(one)(made(), batch, jax.random.key(0)))

    expected = run(1, 0)
    assert not np.array_equal(expected.tokens[0], expected.tokens[1]), "samples differ"
    monkeypatch.setattr(sampling, "prompt_layout", counted)
    for slots, read in ((0, 4), (6, 1)):
        rows.clear()
        for a, b in zip(run(3, slots), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert rows[0] == read, "the last is that of the whole rollout"
