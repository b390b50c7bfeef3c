"""Meshes: no number depends on one, no step changes a layout, and mistakes are named."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pit_jax import sampling, sharding, train_state
from pit_jax.config import ModelConfig, PPOConfig, SamplingConfig
from pit_jax.data import batches
from pit_jax.learners import ppo, reward_model, sft
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines.common import init_params, shapes
from pit_jax.types import TokenBatch

V, EOS, R = 32, 2, 5
SIZES = ModelConfig(vocab_size=V, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16)
POLICY, DECODER, SCORER = Transformer(SIZES), Transformer(SIZES, sharding.DECODE_RULES), ScalarModel(SIZES)
MESHES = ((1, 1), (4, 2), (8, 1))
SGD = optax.sgd(1.0)  # the change of the parameters is the gradient


def mesh_of(data, model):
    return jax.set_mesh(sharding.make_mesh(data, model, devices=jax.devices()[: data * model]))


@functools.cache
def host_parameters(module):
    with mesh_of(1, 1):
        return jax.device_get(init_params(module, jax.random.key(0)))


def parameters(module):
    """The same parameters on the mesh that is set, in their layout there."""
    put = lambda x, like: jax.device_put(x, like.sharding.spec if x.ndim else jax.P())  # noqa: E731
    return jax.tree.map(put, host_parameters(module), shapes(module))


def rows(count, low, high, seed=0):
    rng = np.random.default_rng(seed)
    return [list(rng.integers(3, V, rng.integers(low, high))) for _ in range(count)]


def packed_batch():
    """16 sequences of several rows each, of plain text and of unlikely rows."""
    of = lambda seed: batches.packed_rows(list(zip(rows(60, 1, 4, seed), rows(60, 1, 6, seed + 1), strict=True)), 16)  # noqa: E731
    return sft.SFTBatch(*(TokenBatch(*(x[:16] for x in of(seed))) for seed in (0, 2)))


def groups(width):
    return batches.score_rows([[[1, 5, *row] for row in rows(width, 1, 9, seed)] for seed in range(16)])


def step_of(name):
    """(module, train step, batch)."""
    if name == "sft":
        return POLICY, sft.make_train_step(POLICY, SGD, unlikelihood=0.5, num_targets=12, chunk_size=4), packed_batch()
    if name == "sft_accumulated":
        return POLICY, sft.make_train_step(POLICY, SGD, unlikelihood=0.5, accumulation=2), packed_batch()
    if name == "sft_row_by_row":
        step = sft.make_train_step(POLICY, SGD, unlikelihood=0.5, num_targets=12, chunk_size=4, accumulation=16)
        return POLICY, step, packed_batch()
    if name == "r_pit_packed":
        trees = [[[1, 5, *row] for row in rows(4, 1, 9, seed)] for seed in range(16)]
        held = batches.pack(batches.group_sizes(trees)[:, 0].tolist(), 56)
        sequences = [[trees[i] for i in numbers] for numbers in held] + [[]] * (8 - len(held))
        batch = batches.lay_out_groups(sequences, 56, max(map(len, held)), 4)
        return SCORER, reward_model.make_train_step(SCORER, SGD, loss="gap"), batch
    if name == "r_pit":
        return SCORER, reward_model.make_train_step(SCORER, SGD, loss="gap"), groups(4)
    return SCORER, reward_model.make_train_step(SCORER, SGD, loss="gap", accumulation=2), groups(4)


def assert_close(a, b, rtol=1e-3, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@functools.cache
def one_step(name, shape):
    """(metrics, parameters after minus before) of a step on a mesh; the state's types must be those before it."""
    with mesh_of(*shape):
        module, step, batch = step_of(name)
        state = train_state.create(parameters(module), SGD)
        before = jax.tree.map(jax.typeof, state)
        state, metrics = step(state, sharding.shard_batch(batch))
        assert jax.tree.map(jax.typeof, state) == before
        params = jax.device_get(state.params)
        return jax.device_get(metrics), jax.tree.map(np.subtract, params, host_parameters(module))


@pytest.mark.parametrize("shape", MESHES[1:])
@pytest.mark.parametrize("name", ["sft", "r_pit", "r_pit_packed"])
def test_loss_and_gradients_do_not_depend_on_the_mesh(name, shape):
    metrics, gradients = one_step(name, MESHES[0])
    dead = [path[-1].key for path, g in jax.tree.leaves_with_path(gradients) if np.abs(g).max() < 1e-5]
    assert dead == ([] if name == "sft" else ["bias"]), "a gap does not see what is added to all scores"
    assert_close(one_step(name, shape), (metrics, gradients))


@pytest.mark.parametrize(
    ("name", "pieces", "shape"),
    [("sft", "accumulated", (4, 2)), ("sft", "row_by_row", (1, 2)), ("r_pit", "accumulated", (4, 2))],
)
def test_accumulation_on_a_mesh(name, pieces, shape):
    metrics, gradients = one_step(f"{name}_{pieces}", shape)
    expected, expected_gradients = one_step(name, MESHES[0])
    assert_close((metrics["loss"], gradients), (expected["loss"], expected_gradients))


@functools.cache
def ppo_iteration(shape):
    """What an iteration of PPO gives on a mesh."""
    settings = PPOConfig(rollout_size=16, samples_per_prompt=4, num_epochs=1, num_minibatches=2, temperature=0.7)
    score = lambda params, rollout, _: ppo.rollout_scores(SCORER, params, rollout)  # noqa: E731
    with mesh_of(*shape):
        optimizer = optax.sgd(0.5)
        sample, judge, update = ppo.make_ppo(
            POLICY, DECODER, SCORER, score, optimizer, optimizer, settings, max_new_tokens=R, eos_id=EOS
        )
        state = ppo.create(parameters(POLICY), parameters(SCORER), optimizer, optimizer, 0.1)
        ref = jax.tree.map(lambda x: x * 1.1, parameters(POLICY))
        before, key = jax.tree.map(jax.typeof, state), jax.random.key(0)
        prompts = [row for row in rows(4, 1, 6) for _ in range(settings.samples_per_prompt)]
        batch = sharding.shard_batch(ppo.RLBatch(batches.prompt_rows(prompts, 6)))
        rollout = sample(state, batch, key)
        experience, raw, statistics, metrics = judge(state, ref, parameters(SCORER), batch, rollout)
        of_rows = jax.tree.leaves(jax.tree.map(lambda x: jax.typeof(x).sharding.spec[0], experience))
        assert set(of_rows) == {"data"}, "every row of the experience lies along data"
        collected = jax.device_get((experience, raw, statistics, metrics))
        state, more = update(state, experience, statistics, metrics["kl"][0] / metrics["kl"][1], key)
        assert jax.tree.map(jax.typeof, state) == before
        params = jax.device_get((state.policy.params, state.value.params))
        start = (host_parameters(POLICY), host_parameters(SCORER))
        return collected, (jax.device_get(more), jax.tree.map(np.subtract, params, start))


@pytest.mark.parametrize("shape", MESHES[1:])
def test_an_iteration_of_ppo_does_not_depend_on_the_mesh(shape):
    (experience, *rest), updated = ppo_iteration(shape)
    (expected, *expected_rest), expected_updated = ppo_iteration(MESHES[0])
    np.testing.assert_array_equal(experience.rollout.tokens, expected.rollout.tokens)
    np.testing.assert_array_equal(experience.rollout.response_mask, expected.rollout.response_mask)
    assert len(np.unique(expected.rollout.tokens)) > V / 2
    assert_close((experience, rest), (expected, expected_rest), atol=1e-4)
    assert_close(updated, expected_updated, rtol=1e-2, atol=1e-4)
    assert np.abs(expected_updated[1][0]["params"]["layers"]["q"]).max() > 1e-3


def test_parameters_are_born_alike_on_every_mesh():
    """Bitwise: a run that moves to other devices starts from the same numbers."""
    for shape in MESHES[1:]:
        with mesh_of(*shape):
            params = init_params(POLICY, jax.random.key(0))
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, params)
            assert specs["params"]["layers"]["gate"] == jax.P(None, "data", "model")
            assert specs["params"]["embedding"] == jax.P("model", "data")
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), host_parameters(POLICY))
            local = {x.addressable_shards[0].data.size for x in jax.tree.leaves(params["params"]["layers"]["gate"])}
            assert local == {2 * 16 * 16 // 8}, "an eighth of the matrix on each of eight devices"


def test_gathered_weights_have_no_data_axis_and_sample_the_same():
    with mesh_of(4, 2):
        params = parameters(POLICY)
        gathered = sharding.gather_weights(params)
        stored, decoded = (
            jax.tree.map(lambda x: tuple(jax.typeof(x).sharding.spec), tree)["params"]["layers"]
            for tree in (params, gathered)
        )
        assert stored["q"] == (None, "data", "model", None, None) and decoded["q"] == (None, None, "model", None, None)
        assert stored["down"] == (None, "model", "data") and decoded["down"] == (None, "model", None)
        names = {name for x in jax.tree.leaves(gathered) for name in jax.typeof(x).sharding.spec}
        assert names == {None, "model"}
        assert jax.tree.map(jax.typeof, gathered) == jax.tree.map(
            jax.typeof, jax.tree.map(lambda x, y: jax.device_put(x, y.sharding.spec), gathered, shapes(DECODER))
        ), "the layout that a model with DECODE_RULES is born in"
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(gathered), host_parameters(POLICY))

        prompts = sharding.shard_batch(batches.prompt_rows(rows(8, 1, 6), 6))
        settings = SamplingConfig(max_new_tokens=R, top_k=5)
        draw = lambda model, params: jax.jit(  # noqa: E731
            functools.partial(sampling.generate, model=model, config=settings, eos_id=EOS)
        )(params, prompts, jax.random.key(0))
        first, second = draw(DECODER, gathered), draw(POLICY, params)
        np.testing.assert_array_equal(first.tokens, second.tokens)


def test_weights_rounded_before_they_are_gathered_sample_the_same():
    """Half the bytes: all but the scales of norms are rounded at every use anyway."""
    sizes = dataclasses.replace(SIZES, dtype="bfloat16", qkv_bias=True, qk_norm=True, tie_embeddings=False)
    policy, decoder = Transformer(sizes), Transformer(sizes, sharding.DECODE_RULES)
    with mesh_of(4, 2):
        params = parameters(policy)
        prompts, settings = sharding.shard_batch(batches.prompt_rows(rows(8, 1, 6), 6)), SamplingConfig(R)
        draw = jax.jit(functools.partial(sampling.generate, model=decoder, config=settings, eos_id=EOS))
        first = sharding.gather_weights(params, sharding.RULES, sizes.dtype)
        dtypes = {path[-1].key: x.dtype for path, x in jax.tree_util.tree_leaves_with_path(first)}
        assert {name for name, dtype in dtypes.items() if dtype == jnp.float32} == {"scale"} and len(dtypes) == 13
        first, second = (draw(p, prompts, jax.random.key(0)) for p in (first, sharding.gather_weights(params)))
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_take_rows():
    with mesh_of(4, 2):
        tree = sharding.shard_batch({"a": np.arange(16).reshape(8, 2), "b": np.arange(8)})
        order = jnp.array([7, 0, 3, 4])
        taken = jax.jit(sharding.take_rows)(tree, order)
        np.testing.assert_array_equal(taken["a"], [[14, 15], [0, 1], [6, 7], [8, 9]])
        np.testing.assert_array_equal(taken["b"], [7, 0, 3, 4])
        assert jax.typeof(taken["a"]).sharding.spec == jax.P("data", None)


def test_shard_batch_and_replicate():
    with mesh_of(4, 2):
        x = sharding.shard_batch(np.arange(16).reshape(8, 2))
        assert {s.data.shape for s in x.addressable_shards} == {(2, 2)}
        whole = sharding.replicate(np.arange(3.0))
        assert {s.data.shape for s in whole.addressable_shards} == {(3,)}
        assert sharding.mesh_shape() == {"data": 4, "model": 2}


def test_make_mesh():
    devices = jax.devices()
    assert dict(sharding.make_mesh(model=2, devices=devices).shape) == {"data": 4, "model": 2}
    assert dict(sharding.make_mesh(devices=devices[:1]).shape) == {"data": 1, "model": 1}
    assert set(sharding.make_mesh().axis_types) == {jax.sharding.AxisType.Explicit}
    for data, model, count in ((3, 2, 8), (2, 2, 3)):
        with pytest.raises(ValueError, match=rf"x mesh.model={model} needs \d+ devices, but there are {count}.*data=0"):
            sharding.make_mesh(data, model, devices[:count])
    # Who has set no axis data is not told to set it.
    for data, model, message in (
        (
            0,
            16,
            "config.mesh.model=16 needs at least 16 devices, but there are 8: take a larger slice, or --config.mesh",
        ),
        (1, 16, "config.mesh.model=16 needs at least 16 devices"),
        (0, 3, "config.mesh.model=3 is no divisor of the 8 devices"),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(data, model, devices)


def test_rules():
    spec = sharding.RULES.spec("batch", None, "heads")
    assert spec == jax.P("data", None, "model")
    assert sharding.DECODE_RULES.spec("vocab", "embed") == jax.P("model", None)
    with pytest.raises(AttributeError):
        sharding.RULES.spec("bach")


def test_activations_and_gradients_have_a_layout():
    """Rows stay along `data`, and a gradient lies where its parameter does."""
    with mesh_of(4, 2):
        params, batch = shapes(POLICY), sharding.shard_batch(packed_batch())
        hidden = jax.eval_shape(lambda p: POLICY.apply(p, *batch.likely[:3])[0], params)
        assert hidden.sharding.spec == jax.P("data", None, None)
        loss = lambda p: sft.sft_loss(p, batch, model=POLICY, num_targets=12, chunk_size=4)[0][0]  # noqa: E731
        layout = lambda tree: jax.tree.map(lambda x: x.sharding.spec, tree)  # noqa: E731
        assert layout(jax.eval_shape(jax.grad(loss), params)) == layout(params)


def test_a_batch_that_lost_its_layout_is_an_error():
    """What the explicit mesh is for: a step does not take rows that lie whole on every device."""
    with mesh_of(4, 2):
        state = jax.eval_shape(lambda p: train_state.create(p, SGD), shapes(POLICY))
        step, batch = sft.make_train_step(POLICY, SGD, num_targets=12), packed_batch()
        jax.eval_shape(step, state, sharding.shard_batch(batch))
        with pytest.raises(ValueError, match="should be sharded the same"):
            jax.eval_shape(step, state, sharding.replicate(batch))
