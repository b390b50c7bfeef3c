"""What programs cost: operations against hand counts, bytes and collectives of HLO written by hand and of XLA's own."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pit_jax import cost, sharding

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731


def flops(function, *arguments, **kwargs):
    return cost.matmul_flops(jax.make_jaxpr(function)(*arguments), **kwargs)


def test_a_product_takes_two_operations_per_term():
    assert flops(lambda x, y: x @ y, f32(3, 5), f32(5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda x, y: jnp.einsum("btd,bsd->bts", x, y), f32(2, 3, 5), f32(2, 7, 5)) == 2 * 2 * 3 * 5 * 7
    assert flops(lambda x: jnp.tanh(x) + 1, f32(3, 5)) == 0


def test_a_body_counts_as_often_as_it_runs():
    square = lambda x: x @ x  # noqa: E731
    once = 2 * 4**3
    looped = lambda x: jax.lax.scan(lambda c, _: (square(c), None), x, None, length=6)[0]  # noqa: E731
    assert flops(looped, f32(4, 4)) == 6 * once
    assert flops(lambda x: jax.lax.scan(lambda c, _: (looped(c), None), x, None, length=3)[0], f32(4, 4)) == 18 * once
    data = lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, square, x)  # noqa: E731
    assert flops(data, f32(4, 4)) == once
    assert flops(data, f32(4, 4), while_trips=5) == 5 * once
    counted = lambda x: jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 1, square(c[1])), (0, x))  # noqa: E731
    assert flops(counted, f32(4, 4), while_trips=5) == 7 * once
    either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: square(square(x)), square, x)  # noqa: E731
    assert flops(either, f32(4, 4)) == 2 * once


def test_remat_is_work_that_is_done_twice():
    """Forward, and two products back, of each of two; the first is done again (the second is not needed)."""

    def loss(x, a, b, remat):
        f = lambda x: jnp.tanh(x @ a) @ b  # noqa: E731
        return jnp.sum((jax.checkpoint(f) if remat else f)(x))

    arguments = f32(8, 4), f32(4, 4), f32(4, 4)
    count = lambda remat: flops(jax.grad(lambda *z: loss(*z, remat), argnums=(0, 1, 2)), *arguments)  # noqa: E731
    once = 2 * 8 * 4 * 4
    assert count(False) == 6 * once
    assert count(True) == 7 * once


@pytest.mark.parametrize(
    ("left", "right", "shards"),
    [
        (jax.P("data", None), jax.P(None, "model"), 8),
        (jax.P("data", None), jax.P(None, None), 4),
        (jax.P("data", "model"), jax.P("model", None), 8),  # partial sums
        (jax.P(None, None), jax.P(None, None), 1),
    ],
)
def test_a_product_is_shared_by_the_devices_that_hold_its_parts(left, right, shards):
    mesh = sharding.make_mesh(4, 2, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        on = lambda shape, spec: jax.ShapeDtypeStruct(  # noqa: E731
            shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec)
        )
        product = lambda x, y: jnp.einsum("ij,jk->ik", x, y, out_sharding=jax.P(left[0], right[1]))  # noqa: E731
        found = flops(product, on((8, 6), left), on((6, 4), right))
    assert found == 2 * 8 * 6 * 4 / shards


def test_the_body_of_a_kernel_counts_as_often_as_it_runs():
    """A grid of 3 x 2, each a product of 8 x 8 with 8 x 8; where half of that is left out, the scope says so."""

    def kernel(x, y, z):
        z[...] = x[...] @ y[...]

    block = pl.BlockSpec((8, 8), lambda i, j: (i, j))
    call = pl.pallas_call(
        kernel, grid=(3, 2), in_specs=[block, block], out_specs=block, out_shape=f32(24, 16), interpret=True
    )

    def some(x, y):
        with jax.named_scope("kernel_runs_4"):
            return jax.jit(call)(x, y)

    arguments, once = (f32(24, 16), f32(24, 16)), 2 * 8**3
    assert flops(call, *arguments) == 6 * once
    assert flops(some, *arguments) == 4 * once
    looped = lambda x, y: jax.lax.scan(lambda c, _: (some(c, y), None), x, None, length=5)[0]  # noqa: E731
    assert flops(looped, *arguments) == 5 * 4 * once
    assert flops(lambda x, y: call(some(x, y), y), *arguments) == (4 + 6) * once


HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64]) -> bf16[16] {
  %input = bf16[64]{0} parameter(0)
  %whole = bf16[64]{0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = bf16[16]{0} dynamic-slice(%whole, %input), dynamic_slice_sizes={16}
}

%one_layer (stack: f32[6,10], i: s32[]) -> f32[10] {
  %stack = f32[6,10]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,10]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,10}
  ROOT %flat = f32[10]{0} bitcast(%row)
}

%write (cache: f32[6,10], new: f32[1,10], j: s32[]) -> f32[6,10] {
  %cache = f32[6,10]{1,0} parameter(0)
  %new = f32[1,10]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %kept = f32[6,10]{1,0} dynamic-update-slice(%cache, %new, %j, %nought)
}

%condition (c: (s32[], f32[6,10])) -> pred[] {
  %c = (s32[], f32[6,10]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%c), index=0
  %bound = s32[]{:T(128)} constant(6), metadata={op_name="while/cond/lt"}
  ROOT %less = pred[] compare(%count, %bound), direction=LT
}

%body (c.1: (s32[], /*index=1*/f32[6,10])) -> (s32[], f32[6,10]) {
  %c.1 = (s32[], f32[6,10]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%c.1), index=0
  %weights = f32[6,10]{1,0} get-tuple-element(%c.1), index=1
  %layer = f32[10]{0} fusion(%weights, %k), kind=kLoop, calls=%one_layer
  %all = f32[40]{0:T(128)S(1)} all-gather(%layer), replica_groups=mesh['data'=4,'model'=2] {'data'}, dimensions={0}
  %back = f32[6,10]{1,0} fusion(%weights, %layer, %k), kind=kLoop, calls=%write
  ROOT %next = (s32[], f32[6,10]{1,0}) tuple(%k, %back)
}

ENTRY %main (x: f32[6,10], y: bf16[64]) -> (bf16[16], f32[6,10]) {
  %x = f32[6,10]{1,0} parameter(0)
  %y = bf16[64]{0} parameter(1)
  %start = s32[] constant(0)
  %begin = (s32[], f32[6,10]{1,0}) tuple(%start, %x)
  %loop = (s32[], f32[6,10]{1,0}) while(%begin), condition=%condition, body=%body
  %out = f32[6,10]{1,0} get-tuple-element(%loop), index=1
  %moved = (f32[6,10]{1,0}, f32[6,10]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%out)
  %there = f32[6,10]{1,0:S(1)} copy-done(%moved)
  %shared = bf16[16]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %summed = bf16[16]{0} all-reduce(%shared), replica_groups={{0,2,4},{1,3,5}}, to_apply=%add
  ROOT %result = (bf16[16]{0}, f32[6,10]{1,0}) tuple(%summed, %out)
}
"""


def test_bytes_and_collectives_by_hand():
    found = cost.traffic(HLO)
    gather = cost.Collective("all-gather", 6 * 160, 6, 4)
    scatter = cost.Collective("reduce-scatter", 128, 1, 4)
    total = cost.Collective("all-reduce", 32, 1, 3)
    assert found.collectives == [gather, scatter, total]
    layer = 40 + 4 + 40  # a row of the stack, its number, the result
    gathering = 40  # what it reads: what it gathers stays on the chip
    update = 40 + 40 + 4  # the row that is written and where it comes from, and its number; not the whole stack
    copy = 240  # from the main memory; it goes to the chip's own
    ends = (128 + 32) + (32 + 32)
    assert found.hbm_bytes == 6 * (layer + gathering + update) + copy + ends


def test_a_kernel_reads_its_operands_and_writes_its_results():
    text = """
ENTRY %main (x: f32[6,10], y: bf16[64]) -> f32[6,10] {
  %x = f32[6,10]{1,0:T(8,128)} parameter(0)
  %y = bf16[64]{0} parameter(1)
  %near = bf16[64]{0:S(1)} copy(%y)
  %mark = f32[6,10]{1,0} custom-call(%x), custom_call_target="Sharding"
  %both = (f32[6,10]{1,0:T(8,128)}, bf16[4]{0}) custom-call(%x, %y, %near), custom_call_target="TARGET", backend_config={"custom_call_config": {"body": "TUzvUgFNTElS"}}
  ROOT %out = f32[6,10]{1,0} get-tuple-element(%both), index=0
}
"""  # noqa: E501
    read, written, copied = 240 + 128, 240 + 8, 128  # what lies on the chip is free
    for target, moved in (("tpu_custom_call", copied + read + written), ("AllocateBuffer", copied)):
        assert cost.traffic(text.replace("TARGET", target)).hbm_bytes == moved


def test_a_slice_within_a_fusion_within_a_fusion_is_what_is_read():
    """One of 6 layers' weights, as products of decoding take it, and whole what another use reads whole."""
    text = """
%take (stack: f32[6,8,4], i: s32[]) -> f32[8,4] {
  %stack = f32[6,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,4]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4]{1,0} bitcast(%one)
}

%product (weights: f32[6,8,4], j: s32[], x: f32[2,8]) -> f32[2,4] {
  %weights = f32[6,8,4]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %x = f32[2,8]{1,0} parameter(2)
  %same = f32[6,8,4]{2,1,0} bitcast(%weights)
  %layer = f32[8,4]{1,0} fusion(%same, %j), kind=kLoop, calls=%take
  ROOT %out = f32[2,4]{1,0} OTHER(%x, %layer)
}

ENTRY %main (w: f32[6,8,4], n: s32[], y: f32[2,8]) -> f32[2,4] {
  %w = f32[6,8,4]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %y = f32[2,8]{1,0} parameter(2)
  ROOT %all = f32[2,4]{1,0} fusion(%w, %n, %y), kind=kOutput, calls=%product
}
"""
    layer, rest = 8 * 4 * 4, 4 + 2 * 8 * 4 + 2 * 4 * 4
    assert cost.traffic(text.replace("OTHER", "convolution")).hbm_bytes == layer + rest
    assert cost.traffic(text.replace("OTHER(%x, %layer", "custom(%x, %layer, %same")).hbm_bytes == 6 * layer + rest


def test_a_collective_beside_other_work_is_one():
    """As v5e and v6e gather weights: begun, gone on with and ended in three fusions. Its result lies in main memory."""
    text = """
%begin (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8], u32[]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %g = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%go_on (q: bf16[4,8], r: bf16[16,8], x: f32[6]) -> (f32[6], bf16[4,8], bf16[16,8], bf16[16,8]) {
  %q = bf16[4,8]{1,0} parameter(0)
  %r = bf16[16,8]{1,0} parameter(1)
  %x = f32[6]{0} parameter(2)
  %g.1 = bf16[16,8]{1,0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  %y = f32[6]{0} negate(%x)
  ROOT %t = (f32[6]{0}, bf16[4,8]{1,0}, bf16[16,8]{1,0}, bf16[16,8]{1,0}) tuple(%y, %q, %r, %g.1)
}

%end (u: bf16[4,8], v: bf16[16,8]) -> bf16[16,8] {
  %u = bf16[4,8]{1,0} parameter(0)
  %v = bf16[16,8]{1,0} parameter(1)
  %g.2 = bf16[16,8]{1,0} all-gather(%u), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %d = bf16[16,8]{1,0} custom-call(%u, %v, %g.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[4,8], z: f32[6]) -> bf16[16,8] {
  %w = bf16[4,8]{1,0} parameter(0)
  %z = f32[6]{0} parameter(1)
  %a = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %a0 = bf16[4,8]{1,0} get-tuple-element(%a), index=0
  %a1 = bf16[16,8]{1,0} get-tuple-element(%a), index=1
  %b = (f32[6]{0}, bf16[4,8]{1,0}, bf16[16,8]{1,0}, bf16[16,8]{1,0}) fusion(%a0, %a1, %z), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}, calls=%go_on
  %b1 = bf16[4,8]{1,0} get-tuple-element(%b), index=1
  %b2 = bf16[16,8]{1,0} get-tuple-element(%b), index=2
  ROOT %c = bf16[16,8]{1,0} fusion(%b1, %b2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""  # noqa: E501
    found = cost.traffic(text)
    assert found.collectives == [cost.Collective("all-gather", 16 * 8 * 2, 1, 4)]
    part, whole, beside = 4 * 8 * 2, 16 * 8 * 2, 6 * 4
    assert found.hbm_bytes == part + whole + 2 * beside


def test_what_a_ring_sends():
    """n - 1 of n parts; of a sum twice, as its parts go round as well."""
    sent = lambda kind: cost.Collective(kind, 400, 1, 4).bytes_sent  # noqa: E731
    assert (sent("all-gather"), sent("reduce-scatter"), sent("all-reduce")) == (300, 300, 600)
    assert sent("collective-permute") == 400


def test_a_loop_that_data_end_runs_as_often_as_is_said():
    text = HLO.replace("direction=LT", "direction=NE")
    per_turn = 84 + 40 + 84
    assert cost.traffic(text, while_trips=10).hbm_bytes - cost.traffic(text).hbm_bytes == 9 * per_turn
    known = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert cost.traffic(known).hbm_bytes - cost.traffic(text).hbm_bytes == 6 * per_turn


def test_bytes_are_those_of_xla_where_nothing_loops():
    """Of a program for this machine, within what XLA counts inside of fusions."""

    def step(x, w):
        return jnp.tanh(x @ w).sum(0)

    compiled = jax.jit(step).lower(f32(256, 128), f32(128, 512)).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert cost.traffic(compiled.as_text()).hbm_bytes == pytest.approx(expected, rel=0.05)
    assert flops(step, f32(256, 128), f32(128, 512)) == 2 * 256 * 128 * 512
