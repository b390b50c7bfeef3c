"""Every way of attention against its definition: values, gradients, who sees whom; and which one is taken where."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax import cost, sharding
from pit_jax.config import ModelConfig
from pit_jax.data import batches
from pit_jax.models import attention as ways
from pit_jax.models.attention import Places
from pit_jax.models.transformer import ScalarModel, Transformer
from pit_jax.pipelines.common import init_params

B, K, G, H = 2, 2, 2, 16


def packed(length):
    """Two segments and padding behind them; padding, then one segment."""
    segments = np.ones((B, length), np.int32)
    segments[0, length // 3 :], segments[0, -7:], segments[1, :9] = 2, 0, 0
    positions = np.zeros_like(segments)
    for row, numbers in zip(positions, segments, strict=True):
        for segment in (1, 2):
            row[numbers == segment] = np.arange(np.sum(numbers == segment))
    return Places(np.arange(length, dtype=np.int32), segments, positions)


def tree(length):
    """Four rows of a prompt, two answers and two more behind each, in one sequence; and three without a prompt."""
    rng = np.random.default_rng(0)
    part = lambda share: list(rng.integers(3, 99, int(share * length)))  # noqa: E731
    x, w, l, alone = part(0.2), part(0.12), part(0.12), [part(0.2) for _ in range(3)]
    groups = [[x + w + l, x + w + w, x + l + l, x + l + w], [*alone, alone[0][:5] + alone[1]]]
    rows = batches.score_rows(groups, 1)
    assert rows.tokens.shape[1] <= length
    pad = lambda x: np.pad(x, [(0, 0), (0, length - x.shape[1])])  # noqa: E731
    members = pad(rows.members)
    return Places(np.arange(length, dtype=np.int32), (members > 0).astype(np.int32), pad(rows.positions), members)


def arrays(places, dtype=np.float32):
    """(q, k, v, weights of the results, places), on the mesh that is set; padding has no weight."""
    rng, T = np.random.default_rng(1), len(places.slots)
    shapes = ((B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H))
    q, k, v, w = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    w *= (places.segments > 0)[:, :, None, None, None]
    heads = lambda x: jax.device_put(  # noqa: E731
        jnp.asarray(x, dtype), jax.P("data", None, "model", *[None] * (x.ndim - 3))
    )
    rows = [None if x is None else jax.device_put(x, jax.P("data", None)) for x in places[1:]]
    return *(heads(x) for x in (2 * q, k, v, w)), Places(jnp.asarray(places.slots), *rows)


def results(attend, q, k, v, w, places):
    """(results where they have weight, gradients of their weighted sum), in float32 or better."""
    wide = ways.sums(q.dtype)

    def total(q, k, v):
        y = attend(q, k, v, places)
        return jnp.sum((y * w).astype(wide)), y

    (_, y), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, wide) for x in (jnp.where(w == 0, 0, y), *grads)]


def whole(window=0, **form):
    """The definition: one square."""
    return lambda q, k, v, p: ways.attention(q, k, v, ways.sight(p, p, ways.reach_of(window, None)), **form)


def splash(**form):
    return lambda q, k, v, p: ways.splash_attention(q, k, v, p, block=128, **form)


def stripes(window=0, **form):
    return lambda q, k, v, p: ways.attention_in_stripes(q, k, v, p, ways.reach_of(window, None), 32, **form)


def blocks(window=0, **form):
    return lambda q, k, v, p: ways.attention_in_blocks(q, k, v, p, ways.reach_of(window, None), 32, **form)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("layout", [packed, tree])
@pytest.mark.parametrize("form", [{"window": 40}, {"softcap": 1.5, "query_scale": 9.0}], ids="-".join)
def test_blocks_are_the_definition(layout, form):
    """In float64, where only a wrong formula could differ: 150 tokens, four blocks of 32 and one of 22."""
    with jax.enable_x64(True):
        inputs = arrays(layout(150), np.float64)
        expected, found = results(whole(**form), *inputs), results(blocks(**form), *inputs)
    for name, a, b in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
        assert a.dtype == np.float64 and np.abs(b).max() > 1
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("attend", "layout", "form"),
    [
        (splash, packed, {"query_scale": 9.0}),
        (splash, packed, {"softcap": 1.5, "window": 40}),
        (splash, tree, {}),
        (stripes, packed, {"softcap": 1.5, "query_scale": 9.0}),
        (stripes, tree, {"window": 40}),
    ],
    ids=lambda x: x.__name__ if callable(x) else "-".join(x) or "plain",
)
def test_another_way_to_the_same_numbers(attend, layout, form):
    """200 tokens: two blocks of 128 of the kernel, the second half empty; four stripes of two blocks of 25."""
    inputs = arrays(layout(200))
    expected, found = results(whole(**form), *inputs), results(attend(**form), *inputs)
    for name, a, b in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.usefixtures("one_device")
def test_rows_that_share_tokens_do_not_leak_in_the_kernel():
    """In bfloat16 too: what no query of row 1 sees has no gradient from row 1, not even a small one."""
    places = tree(150)
    q, k, v, w, on_mesh = arrays(places, jnp.bfloat16)
    in_row = (places.members >> 1 & 1) == 1
    only = (places.members == 2)[:, :, None, None, None]  # tokens of row 1 alone
    _, dq, dk, dv = results(splash(), q, k, v, jnp.where(only, w, 0), on_mesh)
    assert only[0].any() and only[1].any() and not in_row.all()
    for x in (dk, dv):
        assert np.all(x[~in_row] == 0.0) and np.all(np.abs(x[in_row]).max((1, 2)) > 0.0)
    exact = results(whole(), *(x.astype(jnp.float32) for x in (q, k, v, jnp.where(only, w, 0))), on_mesh)
    for a, b in zip((dq, dk, dv), exact[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())


LONG = ModelConfig(
    vocab_size=32, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, attention_block=16,
    remat="full",
)  # fmt: skip
GEMMA = dataclasses.replace(LONG, sliding_window=12, global_every=2, attention_softcap=2.0, query_scale=3.0)


@pytest.mark.parametrize(
    ("config", "is_tree", "kind", "mesh"),
    [
        (GEMMA, False, "splash", (2, 2)),
        (LONG, True, "splash", (2, 2)),
        (GEMMA, True, "stripes", (2, 1)),
    ],
    ids=["windows", "tree", "stripes"],
)
def test_no_number_of_a_model_depends_on_the_way(config, is_tree, kind, mesh):
    """Hidden states and gradients on a mesh, through layers that are scanned and made again, are those of blocks."""
    places = tree(40) if is_tree else packed(40)
    rng = np.random.default_rng(2)
    tokens, weights = rng.integers(0, 32, (B, 40)).astype(np.int32), rng.normal(size=(B, 40)) * (places.segments > 0)
    found = []
    with jax.set_mesh(sharding.make_mesh(*mesh, devices=jax.devices()[: mesh[0] * mesh[1]])):
        inputs = sharding.shard_batch((tokens, *places[1:3], places.members, weights.astype(np.float32)))
        params = init_params(ScalarModel(config), jax.random.key(0))
        params = jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params)
        for way in ("blocks", kind):
            model = ScalarModel(dataclasses.replace(config, attention=way))

            def total(params, model=model):
                return jnp.sum(model.apply(params, *inputs[:4]) * inputs[4])

            program = jax.jit(jax.value_and_grad(total)).trace(params)
            assert ("pallas_call" in str(program.jaxpr)) == (way == "splash")
            found.append(jax.device_get(program.lower().compile()(params)))
    (expected, expected_grads), (value, grads) = found
    # Sums of float32 in another order: gradients go up to 87 and 272 here, so 1e-4 is a millionth of the largest.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), grads, expected_grads)


@pytest.mark.usefixtures("one_device")
def test_no_square_of_scores_is_kept_for_the_gradient():
    """Layers in a loop, made again or not: temporary memory of a step doubles with the length, and no more."""

    def temporary(model, length):
        on_mesh = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("data", None))
        rows = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=on_mesh)
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        total = lambda params, x: jnp.sum(model.apply(params, x, x, x))  # noqa: E731
        return jax.jit(jax.grad(total)).lower(params, rows).compile().memory_analysis().temp_size_in_bytes

    for remat in ("none", "full"):
        model = ScalarModel(dataclasses.replace(LONG, num_layers=10, attention_block=128, remat=remat))
        short, long, longer = (temporary(model, length) for length in (2048, 4096, 8192))
        assert longer < 2.2 * long and longer < 2.2**2 * short, remat


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("window", [0, 70])
def test_halves_are_attention(window):
    """129 tokens, 64 and 65, of which rows hold two segments, a tree, and padding on the left; gradients too."""
    rng, T = np.random.default_rng(0), 129
    segments = np.array([[1] * 40 + [2] * 89, [1] * T, [0] * 9 + [1] * 120], np.int32)
    members = np.array([[1] * T, [3] * 50 + [1] * 40 + [2] * 39, [1] * T], np.int32)
    rows = sharding.shard_batch((segments, np.broadcast_to(np.arange(T, dtype=np.int32), (3, T)), members))
    places = ways.Places(jnp.arange(T), *rows)
    q, k, v, weights = (rng.normal(size=(3, T, 2, *rest, 4)).astype(np.float32) for rest in ((2,), (), (), (2,)))
    weights *= (segments > 0)[:, :, None, None, None]
    q, k, v, weights = sharding.shard_batch((q, k, v, weights))
    reach = ways.reach_of(window, None)

    def total(attend, q, k, v):
        y = attend(q, k, v)
        return jnp.sum(y * weights), y * (weights != 0)

    whole = lambda q, k, v: ways.attention(q, k, v, ways.sight(places, places, reach))  # noqa: E731
    taken = lambda q, k, v: ways.self_attention(q, k, v, places, window=window)  # noqa: E731
    halves = lambda q, k, v: ways.attention_in_halves(q, k, v, places, reach)  # noqa: E731
    found = [jax.value_and_grad(functools.partial(total, way), (0, 1, 2), True)(q, k, v) for way in (whole, halves)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)
    flops = lambda way: cost.matmul_flops(jax.make_jaxpr(way)(q, k, v))  # noqa: E731
    assert flops(taken) == flops(whole) * (64 * 64 + 65 * 129) / 129**2


# ------------------------------------------------------------------------------------------------------ which is taken

PLAIN = {"head_dim": 64, "softcap": 0.0, "is_even": True, "is_tree": False, "has_window": False}


@pytest.mark.parametrize(
    ("platform", "dtype", "changes", "kind"),
    [
        ("cpu", "bfloat16", {}, "blocks"),
        ("cpu", "float32", {"is_tree": True}, "blocks"),
        ("tpu", "bfloat16", {}, "splash"),
        ("tpu", "float32", {"softcap": 3.0, "has_window": True, "is_even": False}, "splash"),
        ("tpu", "bfloat16", {"is_tree": True}, "splash"),
        ("tpu", "bfloat16", {"is_tree": True, "softcap": 3.0}, "stripes"),
        ("tpu", "bfloat16", {"is_tree": True, "has_window": True}, "stripes"),
        ("gpu", "bfloat16", {"is_tree": True, "has_window": True}, "cudnn"),
        ("gpu", "float32", {}, "stripes"),
        ("gpu", "bfloat16", {"softcap": 3.0}, "stripes"),
        ("gpu", "bfloat16", {"head_dim": 256}, "stripes"),
        ("gpu", "bfloat16", {"head_dim": 20}, "stripes"),
        ("gpu", "bfloat16", {"is_even": False}, "stripes"),
    ],
)
def test_what_auto_comes_to(platform, dtype, changes, kind):
    assert ways.choose("auto", platform, jnp.dtype(dtype), **PLAIN | changes) == kind
    assert ways.choose("blocks", platform, jnp.dtype(dtype), **PLAIN | changes) == "blocks"


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "changes", "message"),
    [
        ("splash", "tpu", "float32", {"is_tree": True, "softcap": 3.0}, "rows that share tokens have no .*_softcap"),
        ("cudnn", "cpu", "bfloat16", {}, "is for NVIDIA GPUs, but the mesh is of cpu devices: attention=auto"),
        ("cudnn", "gpu", "float32", {}, "it is for dtype=bfloat16"),
        ("cudnn", "gpu", "bfloat16", {"softcap": 3.0}, "it has no attention_softcap"),
    ],
)
def test_a_kernel_that_cannot_do_it(kind, platform, dtype, changes, message):
    with pytest.raises(ValueError, match=message):
        ways.choose(kind, platform, jnp.dtype(dtype), **PLAIN | changes)


def test_a_kind_that_there_is_not():
    with pytest.raises(ValueError, match="attention is 'flash': use auto, blocks, stripes, splash or cudnn"):
        ModelConfig(attention="flash")


def abstract_mesh(platform):
    """A mesh of devices that are not there."""
    return jax.sharding.AbstractMesh(
        (1, 1), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2,
        abstract_device=jax.sharding.AbstractDevice(device_kind=platform, num_cores=None, platform=platform),
    )  # fmt: skip


def traced(config, platform, length):
    """The gradient of a decoder, as operations."""
    mesh = abstract_mesh(platform)
    with jax.sharding.use_abstract_mesh(mesh):
        model = Transformer(config)
        rows = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("data", None)))
        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.eval_shape(lambda k, x: model.init(k, x, x, x), key, rows)
        return jax.make_jaxpr(jax.grad(lambda p, x: jnp.sum(model.apply(p, x, x, x)[0].astype(jnp.float32))))(
            params, rows
        )


def test_the_devices_of_the_mesh_decide(monkeypatch, one_device):
    assert ways.platform() == "cpu"
    assert jax.jit(lambda: len(ways.platform()))() == 3
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    config = dataclasses.replace(LONG, dtype="bfloat16", head_dim=16)
    names = {"cpu": "", "tpu": "splash_mha_fwd", "gpu": "dot_product_attention_fwd"}
    for platform in names:
        for length in (32, 40):  # of up to two blocks none is taken
            text = str(traced(config, platform, length))
            taken = [p for p, name in names.items() if name and name in text]
            assert taken == ([platform] if names[platform] and length == 40 else []), (platform, length)


# ------------------------------------------------------------------------------------------------------------- kernels


def test_block_of_the_kernel():
    """Multiples of 128: one block where it does, few steps where sequences are long, no block above 640."""
    assert [ways.splash_block(n) for n in (1, 128, 300, 512)] == [128, 128, 384, 512]
    assert [ways.splash_block(n) for n in (1056, 3616)] == [384, 640]  # 3 blocks of 1152 tokens, 6 of 3840
    for length in (600, 1568, 3616, 8192):
        block = ways.splash_block(length)
        assert block % 128 == 0 and 256 <= block <= 640
        assert -length % block < length / 3


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("is_tree", [False, True])
def test_operations_of_the_kernel(is_tree):
    """384 tokens are three blocks, of whose nine pairs six are seen; a tree makes queries and keys 32 longer."""
    inputs = arrays((tree if is_tree else packed)(300))
    attend = lambda q, k, v: ways.splash_attention(q, k, v, inputs[4], block=128)  # noqa: E731
    pairs = B * K * G * 6 * 2 * 128**2
    E = H + 32 if is_tree else H
    # Scores and values; back: scores, what they are to be, and gradients of keys and values; again, and of queries.
    forward, backward = E + H, (E + H + E + H) + (E + H + E)
    sums = B * K * G * 384 * 2 * H  # of results times their gradients, outside of the kernel
    flops = lambda f: cost.matmul_flops(jax.make_jaxpr(f)(*inputs[:3]))  # noqa: E731
    assert flops(attend) == pairs * forward
    total = lambda q, k, v: jnp.sum(attend(q, k, v))  # noqa: E731
    assert flops(jax.grad(total, argnums=(0, 1, 2))) == pairs * (forward + backward) + sums
    again = jax.grad(jax.checkpoint(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v)))), argnums=(0, 1, 2))
    assert flops(again) == pairs * (2 * forward + backward) + sums, "what remat makes again is done again"


@pytest.mark.usefixtures("one_device")
def test_operations_of_a_window():
    """Windows of 100 and 130 of blocks of 128: a block sees itself and the one before it, or two before it."""
    inputs = arrays(packed(640))
    for window, pairs in ((100, 5 + 4), (130, 5 + 4 + 3)):
        attend = lambda q, k, v, w=window: ways.splash_attention(q, k, v, inputs[4], window=w, block=128)  # noqa: E731
        flops = cost.matmul_flops(jax.make_jaxpr(attend)(*inputs[:3]))
        assert flops == B * K * G * pairs * 2 * 128**2 * 2 * H


def test_cudnn_goes_into_a_program_for_cuda(monkeypatch, one_device):
    """As far as a machine without one can tell: its calls, forward and back."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    q, k, v, _, places = arrays(packed(64), jnp.bfloat16)
    mask = ways.sight(places, places)
    total = lambda q, k, v: jnp.sum(ways.cudnn_attention(q, k, v, mask, 9.0).astype(jnp.float32))  # noqa: E731
    program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text and "Backward" in text and "CAUSAL" in text


def cudnn_equals_the_definition():
    """On a GPU."""
    with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
        assert ways.platform() == "gpu"
        for places in (packed(256), tree(256)):
            inputs = arrays(places, jnp.bfloat16)
            for window in (0, 40):
                attend = lambda q, k, v, p, w=window: ways.cudnn_attention(  # noqa: E731
                    q, k, v, ways.sight(p, p, ways.reach_of(w, None))
                )
                exact = results(whole(window), *(x.astype(jnp.float32) for x in inputs[:4]), inputs[4])
                for a, b in zip(results(attend, *inputs), exact, strict=True):
                    np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None or not Path("/dev/nvidiactl").exists(),
    reason="there is no NVIDIA GPU, or jax is not installed for it (extra: cuda)",
)
def test_cudnn_on_a_gpu():
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, __file__], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    cudnn_equals_the_definition()
