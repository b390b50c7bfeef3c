"""Low-rank adapters: what they compute, that nothing else is trained, and the identities that RL and DPO rest on."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest

from pit_jax import checkpoint, optimizers, sampling, sharding, train_state
from pit_jax.config import (
    LAYER_MATRICES,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PitConfig,
    PPOConfig,
    SamplingConfig,
    SrtConfig,
    from_config_dict,
    to_config_dict,
)
from pit_jax.data import batches, pairs
from pit_jax.learners import dpo, loop, ppo, reward_model, sft
from pit_jax.metrics import MetricsWriter
from pit_jax.models import lora
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines.common import init_params, shapes

V, EOS, RANK = 32, 2, 3
SIZES = ModelConfig(vocab_size=V, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
POLICY, DECODER, SCORER = Transformer(SIZES), Transformer(SIZES, sharding.DECODE_RULES), ScalarModel(SIZES)
CONFIG = LoraConfig(rank=RANK, alpha=6.0)  # what adapters add is doubled
FEW = dataclasses.replace(CONFIG, targets=("q", "o", "down"))  # where more would only take more time to compile
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 3, "gate": 1, "up": 1, "down": 1}


def mesh_of(data, model):
    return jax.set_mesh(sharding.make_mesh(data, model, devices=jax.devices()[: data * model]))


@functools.cache
def host_parameters(module):
    """Twice the usual scale, so that layers matter."""
    with mesh_of(1, 1):
        return jax.tree.map(lambda x: 2 * x, jax.device_get(init_params(module, jax.random.key(0))))


def parameters(module):
    """Parameters of their own on the mesh that is set: steps donate what they are given."""
    put = lambda x, like: jax.device_put(x, like.sharding.spec if x.ndim else jax.P())  # noqa: E731
    return jax.tree.map(put, host_parameters(module), shapes(module))


def adapted(module, config=CONFIG):
    return lora.add(parameters(module), config, jax.random.key(1))


def moved(params, seed=0):
    """Adapters somewhere else than at their start, where B is 0."""
    rng = np.random.default_rng(seed)
    shift = lambda x: x + jax.device_put(0.2 * rng.normal(size=x.shape).astype(np.float32), jax.typeof(x).sharding.spec)  # noqa: E731
    return lora.with_trained(params, jax.tree.map(shift, lora.trained(params)))


def ids(rng, low, high):
    return [int(i) for i in rng.integers(3, V, rng.integers(low, high))]


def token_rows(rows=8):
    rng = np.random.default_rng(0)
    return batches.token_rows([([1, *ids(rng, 1, 4)], [*ids(rng, 1, 6), EOS]) for _ in range(rows)], 12)


def groups(rows=8):
    rng = np.random.default_rng(1)
    return batches.score_rows([[[1, *ids(rng, 1, 9)] for _ in range(2)] for _ in range(rows)])


def plain():
    tokens = np.random.default_rng(2).integers(3, V, (4, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    return sharding.shard_batch((tokens, np.ones_like(tokens), positions))


@functools.partial(jax.jit, static_argnums=0)
def said(module, params, *arrays):
    return module.apply(params, *arrays, method=Transformer.full_logits if isinstance(module, Transformer) else None)


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def mean(metric):
    return float(metric[0]) / float(metric[1])


def by_path(tree):
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("module", [POLICY, SCORER], ids=["decoder", "scalar"])
def test_fresh_adapters_change_nothing_and_others_what_their_product_says(module):
    """W + 2 A B by NumPy in the place of W; float32 sums of 16 products in another order."""
    start = adapted(module)
    np.testing.assert_array_equal(said(module, start, *plain()), said(module, lora.base(start), *plain()))
    assert equal(lora.merge(start), host_parameters(module))

    params = moved(start)
    expected = jax.tree.map(np.array, jax.device_get(lora.base(params)))
    inner = lambda tree: tree.get("backbone", tree)["layers"]  # noqa: E731
    for name, inputs in INPUTS.items():
        a, b = (np.asarray(inner(params["lora"])[name][x], np.float64) for x in "ab")
        weight = inner(expected["params"])[name]
        rows = int(np.prod(weight.shape[1 : 1 + inputs]))
        assert a.shape == (*weight.shape[: 1 + inputs], RANK) and b.shape == (2, RANK, *weight.shape[1 + inputs :])
        weight += (2 * a.reshape(2, rows, RANK) @ b.reshape(2, RANK, -1)).reshape(weight.shape)
    merged = lora.merge(params)
    assert set(merged) == {"params"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), merged, expected)
    by_adapters, by_product = (np.asarray(said(module, p, *plain())) for p in (params, merged))
    assert np.abs(by_adapters - said(module, start, *plain())).max() > 0.1
    np.testing.assert_allclose(by_adapters, by_product, rtol=1e-5, atol=1e-5 * np.abs(by_product).max())


@pytest.mark.usefixtures("one_device")
def test_adapters_start_as_those_of_peft_and_each_by_itself():
    """A uniform within 1 / sqrt(inputs) (24 for down, 16 for the others), B zero; q has its own numbers."""
    start = adapted(POLICY)["lora"]["layers"]
    np.testing.assert_array_equal(start["scale"], [2.0, 2.0])
    for name in LAYER_MATRICES:
        a, bound = np.abs(start[name]["a"]), (24 if name == "down" else 16) ** -0.5
        assert 0.9 * bound < a.max() <= bound and abs(a.mean() / bound - 0.5) < 0.15, name
        assert not np.any(start[name]["b"])
    alone = adapted(POLICY, LoraConfig(rank=RANK, targets=("o", "q")))["lora"]["layers"]
    assert set(alone) == {"o", "q", "scale"}
    np.testing.assert_array_equal(alone["q"]["a"], start["q"]["a"])
    assert not np.array_equal(start["gate"]["a"], start["up"]["a"])


@pytest.mark.usefixtures("one_device")
def test_merged_and_unmerged_write_the_same():
    """Greedy tokens are equal, and the log-probs of sampling within 1e-5, also with targets left out."""
    params = moved(adapted(POLICY, dataclasses.replace(CONFIG, targets=("q", "v", "down"))))
    rng = np.random.default_rng(0)
    prompts = sharding.shard_batch(batches.prompt_rows([[1, *ids(rng, 0, 5)] for _ in range(6)], 6))
    settings = SamplingConfig(max_new_tokens=8, temperature=0.0)
    write = jax.jit(functools.partial(sampling.generate, model=DECODER, config=settings, eos_id=V + 1))
    key = jax.random.key(0)
    first, second = (write(sharding.gather_weights(p), prompts, key) for p in (params, lora.merge(params)))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_allclose(first.log_probs, second.log_probs, atol=1e-5)
    before = write(lora.base(params), prompts, key)
    assert np.mean(before.tokens[:, -8:] != first.tokens[:, -8:]) > 0.3


def test_merging_does_not_depend_on_the_mesh():
    with mesh_of(1, 1):
        expected = jax.device_get(lora.merge(moved(adapted(SCORER))))
    with mesh_of(4, 2):
        params = moved(adapted(SCORER))
        layers = params["lora"]["backbone"]["layers"]
        spec = lambda x: jax.typeof(x).sharding.spec  # noqa: E731
        assert spec(layers["q"]["a"]) == jax.P(None, "data", None)
        assert spec(layers["q"]["b"]) == jax.P(None, None, "model", None, None)
        assert spec(layers["o"]["a"]) == jax.P(None, "model", None, None, None)
        assert spec(layers["o"]["b"]) == spec(layers["down"]["b"]) == jax.P(None, None, "data")
        assert spec(layers["gate"]["b"]) == jax.P(None, None, "model")
        merged = lora.merge(params)
        assert jax.tree.map(jax.typeof, merged) == jax.tree.map(jax.typeof, parameters(SCORER))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), jax.device_get(merged), expected)


# ------------------------------------------------------------------------------------------------------ what is trained


def learner(name, optimizer, accumulation=1):
    """(module, step, batch)."""
    if name == "sft":
        return POLICY, sft.make_train_step(POLICY, optimizer, accumulation=accumulation), sft.SFTBatch(token_rows())
    return SCORER, reward_model.make_train_step(SCORER, optimizer, loss="gap", accumulation=accumulation), groups()


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(("name", "kind"), [("sft", "muon"), ("r_p", "adamw")])
def test_nothing_but_adapters_and_heads_is_trained(name, kind):
    optimizer = optimizers.make_optimizer(OptimizerConfig(name=kind, learning_rate=0.01, weight_decay=0.1), 10)
    module, step, batch = learner(name, optimizer)
    start = adapted(module)
    frozen = by_path(jax.device_get(lora.base(start)))
    heads = {path: x for path, x in frozen.items() if path in ("params/head", "params/bias")}
    frozen = {path: x for path, x in frozen.items() if path not in heads}
    before, checksums = jax.device_get(lora.trained(start)), np.asarray(lora.checksums(start))
    assert len(by_path(before)) == 14 + len(heads) == (14 if name == "sft" else 16)

    state = train_state.create(start, optimizer)
    held = {np.shape(x) for x in jax.tree.leaves(state.opt_state)}
    assert held & {np.shape(x) for x in jax.tree.leaves(before) if x.size}, "moments of adapters"
    assert not held & {x.shape for x in frozen.values() if x.shape != (16,)}, "and of no frozen weight"
    types = jax.tree.map(jax.typeof, state)
    for _ in range(3):
        state, metrics = step(state, sharding.shard_batch(batch))
    assert jax.tree.map(jax.typeof, state) == types
    after = by_path(jax.device_get(state.params))
    for path, x in frozen.items():
        np.testing.assert_array_equal(after[path], x, err_msg=path)
    np.testing.assert_array_equal(after["/".join(["lora", *["backbone"] * (name != "sft"), "layers/scale"])], 2.0)
    np.testing.assert_array_equal(lora.checksums(state.params), checksums)
    trained = jax.device_get(lora.trained(state.params))
    unmoved = [path for path, x in by_path(trained).items() if np.array_equal(x, by_path(before)[path])]
    assert unmoved == ["params/bias"] * (name != "sft"), "a preference does not see what is added to all scores"
    squares = sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(trained))
    np.testing.assert_allclose(mean(metrics["param_norm"]), np.sqrt(squares), rtol=1e-5)


@pytest.mark.usefixtures("one_device")
def test_gradients_are_those_of_all_parameters_at_what_is_trained():
    """In four pieces; their norm is of these alone, which the clip then sees."""
    params = moved(adapted(POLICY, FEW))
    batch = sharding.shard_batch(sft.SFTBatch(token_rows()))
    loss = functools.partial(sft.sft_loss, model=POLICY)
    of_all = jax.jit(jax.grad(lambda p: (lambda total, weight: total / weight)(*loss(p, batch)[0])))(params)
    expected = lora.trained(of_all)
    compute = jax.jit(functools.partial(train_state.gradients, loss), static_argnums=2)
    grads, metrics = compute(params, batch, 4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), grads, expected)
    np.testing.assert_allclose(mean(metrics["grad_norm"]), float(optax.tree.norm(expected)), rtol=1e-4)
    assert float(optax.tree.norm(lora.base(of_all))) > 0.1, "which is not the norm of all"


def test_muon_takes_a_and_b_for_matrices():
    """Singular values of gradients lie far apart (factors of 1, 10 and 100 along the rank), those of updates do not."""
    with mesh_of(2, 1):
        params = lora.trained(adapted(POLICY, dataclasses.replace(CONFIG, targets=("q", "o"))))
        optimizer = optimizers.make_optimizer(OptimizerConfig(name="muon", learning_rate=0.1, clip_norm=1e9), 10)
        rng = np.random.default_rng(0)

        def draw(path, x):
            along_rank = (-1,) if path[-1].key == "a" else (-1, *[1] * (x.ndim - 2))
            values = rng.normal(size=x.shape) * np.array([1.0, 10.0, 100.0]).reshape(along_rank)
            return jax.device_put(values.astype(np.float32), jax.typeof(x).sharding.spec)

        grads = jax.tree_util.tree_map_with_path(draw, params)
        updates, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
        updates = jax.device_get(updates)["lora"]["layers"]
    for name in ("q", "o"):
        for update in (updates[name]["a"].reshape(2, 16, RANK), updates[name]["b"].reshape(2, RANK, -1)):
            for matrix in update:
                values = np.linalg.svd(matrix, compute_uv=False)
                assert values.max() / values.min() < 3, name
                assert 0.6 < np.median(values) / (0.1 * 0.2 * np.sqrt(max(matrix.shape))) < 1.4


@functools.cache
def one_step(shape):
    """(metrics, what is trained after minus before) of a step on a mesh."""
    with mesh_of(*shape):
        optimizer = optax.sgd(1.0)
        _, step, batch = learner("r_p", optimizer)
        params = moved(adapted(SCORER))
        before = jax.device_get(lora.trained(params))
        state = train_state.create(params, optimizer)
        types = jax.tree.map(jax.typeof, state)
        state, metrics = step(state, sharding.shard_batch(batch))
        assert jax.tree.map(jax.typeof, state) == types
        after = jax.device_get(lora.trained(state.params))
        return (
            jax.device_get(metrics),
            jax.tree.map(np.subtract, after, before),
            np.asarray(lora.checksums(state.params)),
        )


@pytest.mark.parametrize("shape", [(4, 2), (8, 1)])
def test_a_step_does_not_depend_on_the_mesh(shape):
    (metrics, change, checksums), (expected, expected_change, of_one) = one_step(shape), one_step((1, 1))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5)
    jax.tree.map(close, (metrics, change), (expected, expected_change))
    assert min(np.abs(x).max() for path, x in by_path(change).items() if path != "params/bias") > 1e-3
    np.testing.assert_array_equal(checksums, of_one)


# ----------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.usefixtures("one_device")
def test_a_run_goes_on_bitwise_and_its_checkpoints_hold_no_frozen_weight(tmp_path):
    optimizer = optimizers.make_optimizer(OptimizerConfig(learning_rate=0.01), 4)
    _, step, batch = learner("r_p", optimizer)

    def run(name, num_steps, start):
        return loop.run(
            train_state.create(start, optimizer), stage="r_p", num_steps=num_steps, train_step=step, save_every=1,
            batch_at=lambda i: sharding.shard_batch(jax.tree.map(lambda x: np.roll(x, i, axis=0), batch)),
            directory=tmp_path / name, writer=MetricsWriter(tmp_path),
        )  # fmt: skip

    whole = run("whole", 3, adapted(SCORER, FEW))
    run("cut", 1, adapted(SCORER, FEW))
    manifest = json.loads((tmp_path / "cut" / "1" / "manifest.json").read_text())
    held = {path for path in manifest if path.startswith("params/params")}
    assert held == {"params/params/head", "params/params/bias"}
    assert equal(run("cut", 3, adapted(SCORER, FEW)), whole)

    other = adapted(SCORER, FEW)
    other["params"]["backbone"]["layers"]["v"] *= 1.001
    assert checkpoint.latest_step(tmp_path / "cut") == 3
    with pytest.raises(ValueError, match="starts from has changed.*--redo=STAGE"):
        run("cut", 3, other)


# ----------------------------------------------------------------------------------------------------------- identities


@pytest.mark.usefixtures("one_device")
def test_dpo_starts_at_log_2():
    """The reference read the model without adapters."""
    rng = np.random.default_rng(0)
    rows = [([1, *ids(rng, 0, 5)], *([*ids(rng, 1, 6), EOS] for _ in range(2))) for _ in range(8)]
    data = pairs.pair_rows(rows, 16)
    data = data._replace(ref_log_probs=dpo.reference_log_probs(POLICY, parameters(POLICY), rows, 8))
    optimizer = optax.adam(0.01)
    step = dpo.make_train_step(POLICY, optimizer, beta=0.5)
    state = train_state.create(adapted(POLICY, FEW), optimizer)
    losses = []
    for _ in range(6):
        state, metrics = step(state, sharding.shard_batch(data))
        losses.append(mean(metrics["loss"]))
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)
    assert losses[-1] < 0.6 * losses[0]
    assert equal(lora.base(state.params), host_parameters(POLICY))


@pytest.mark.usefixtures("one_device")
def test_ppo_starts_at_its_reference_and_keeps_it():
    """Ratio 1 at the first update of every rollout, KL 0 at the first; ref_policy is the base of the state, bitwise."""
    settings = PPOConfig(rollout_size=8, num_epochs=2, num_minibatches=2, temperature=0.7, kl_coef=0.3)
    optimizer = optax.adam(1e-2)
    score = lambda params, rollout, _: ppo.rollout_scores(SCORER, params, rollout)  # noqa: E731
    sample, judge, update = ppo.make_ppo(
        POLICY, DECODER, SCORER, score, optimizer, optimizer, settings, max_new_tokens=5, eos_id=EOS
    )
    state = ppo.create(adapted(POLICY, FEW), adapted(SCORER, FEW), optimizer, optimizer, settings.kl_coef)
    rng, key, found = np.random.default_rng(0), jax.random.key(3), []
    for _ in range(3):
        prompts = batches.prompt_rows([[1, *ids(rng, 0, 5)] for _ in range(8)], 6)
        batch = sharding.shard_batch(ppo.RLBatch(prompts))
        frozen = lora.base(state.policy.params), lora.base(state.value.params)
        experience, raw, statistics, metrics = judge(state, *frozen, batch, sample(state, batch, key))
        state, more = update(state, experience, statistics, metrics["kl"][0] / metrics["kl"][1], key)
        found.append((mean(metrics["kl"]), mean(more["policy/first_ratio_max"]), mean(more["policy/ratio_max"])))
    kls, first_ratios, ratios = zip(*found, strict=True)
    np.testing.assert_allclose(kls[0], 0.0, atol=1e-5)
    np.testing.assert_allclose(first_ratios, 1.0, atol=1e-4)
    assert min(np.abs(kls[1:])) > 1e-3 and min(ratios) > 1.005
    assert equal(lora.base(state.policy.params), host_parameters(POLICY))
    assert equal(lora.base(state.value.params)["params"]["backbone"], host_parameters(SCORER)["params"]["backbone"])
    assert not equal(state.value.params["params"]["head"], host_parameters(SCORER)["params"]["head"])
    start = ppo.create(adapted(POLICY, FEW), adapted(SCORER, FEW), optimizer, optimizer, settings.kl_coef)
    assert equal(train_state.restored(train_state.saved_part(state), start), state), "both models come back"


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, "rank=-1: not below 0"),
        ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"targets": ("q_proj",)}, "targets names 'q_proj': use q, k, v, o, gate, up, down"),
        ({"targets": ("q", "q")}, "targets names one twice: q, q"),
        ({"rank": 2, "targets": ()}, "rank=2 needs targets"),
    ],
    ids=["rank", "alpha", "name", "twice", "none"],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_both_methods_have_the_field():
    assert optimizers.INPUTS == INPUTS
    for cls in (PitConfig, SrtConfig):
        outside = to_config_dict(cls())
        assert from_config_dict(cls, outside).lora.rank == 0
        outside.lora.rank, outside.lora.targets = 8, ("q,v",)
        assert from_config_dict(cls, outside).lora == LoraConfig(8, 16.0, ("q", "v"))
