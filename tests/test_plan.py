"""Planning without hardware: names of slices, what programs hold, and the programs of every config."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from commands import run
from test_transformer import config_files

from pit_jax import config as config_lib, cost, optimizers, planner, programs, sharding, train_state
from pit_jax.config import LoraConfig, ModelConfig, OptimizerConfig
from pit_jax.models.transformer import Transformer
from pit_jax.pipelines import common

TINY = ModelConfig(vocab_size=64, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)


@pytest.mark.parametrize(
    ("text", "kind", "axes"),
    [
        ("v4:4x4x8", "v4", (4, 4, 8)),
        ("v4-8", "v4", (2, 2, 1)),
        ("v4-128", "v4", (4, 4, 4)),
        ("v5p-512", "v5p", (4, 8, 8)),
        ("v5e:4x4", "v5e", (4, 4)),
    ],
)
def test_names_of_slices(text, kind, axes):
    assert planner.slice_name(text) == (kind, axes)


def test_a_slice_of_n_tensorcores_has_half_as_many_chips():
    for size in planner.SLICES:
        assert 2 * math.prod(planner.slice_name(f"v4-{size}")[1]) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4-100", "known with 8, 16"),
        ("v3:2x2", "use v4:4x4x4"),
        ("v4:2x2", "v4 has 3 axes"),
        ("v5e:4x4x4", "v5e has 2 axes"),
        ("v4:0x2x2", "all above 0"),
        ("v4:2xx2", "use v4:4x4x4"),
    ],
)
def test_slices_that_there_are_not(text, message):
    with pytest.raises(ValueError, match=message):
        planner.slice_name(text)


def test_operations_of_a_decoder_by_hand():
    """q 16 x 16, k and v 16 x 8, o 16 x 16, three of 16 x 24: 1,920 a layer; two layers, and 64 x 16 of the table."""
    assert programs.num_matrix_parameters(TINY) == (2 * (256 + 2 * 128 + 256 + 3 * 384), 1024)
    layers = 2 * 1920
    # Tokens 0, 1 and 2 see 1, 2 and 3: scores and values take 2 H operations each, of 4 heads and 2 layers.
    attention = 2 * 4 * (2 + 2) * 4 * (1 + 2 + 3)
    assert programs.forward_flops(TINY, 5, 3, 2) == 5 * (2 * layers * 3 + 2 * 1024 * 2 + attention)
    # Behind 10 others each sees 10 more.
    more = 2 * 4 * (2 + 2) * 4 * 3 * 10
    assert programs.forward_flops(TINY, 5, 3, 2, start=10) == 5 * (2 * layers * 3 + 2 * 1024 * 2 + attention + more)


@pytest.mark.usefixtures("one_device")
def test_operations_are_those_of_the_forward_pass():
    """The square of a short sequence is looked at whole, of which half is behind the query."""
    model = Transformer(dataclasses.replace(TINY, attention_block=128))
    rows = jax.ShapeDtypeStruct((3, 20), jnp.int32)
    traced = jax.make_jaxpr(lambda p, x: model.apply(p, x, x, x, method=Transformer.full_logits))(
        common.shapes(model), rows
    )
    square = 2 * 4 * (2 + 2) * 4 * (20 * 20 - 20 * 21 / 2) * 3
    assert cost.matmul_flops(traced) == programs.forward_flops(TINY, 3, 20, 20) + square


def test_bytes_on_one_device():
    """Float32 and int32 weights of 8 x 6 on 4 x 2 devices: by row and column 6 numbers each, by row 12, whole 48."""
    mesh = sharding.make_mesh(4, 2, devices=jax.devices()[:8])
    for spec, numbers in ((jax.P("data", "model"), 6), (jax.P("data", None), 12), (jax.P(None, None), 48)):
        x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        assert planner.bytes_per_device({"x": x}) == 4 * numbers


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_step_holds(one_device, rank):
    """AdamW has two moments per trained number; a reference model is held beside the policy; keys are 8 bytes."""
    config = config_lib.PitConfig(policy_model=TINY, lora=LoraConfig(rank=rank, targets=("q",)))
    maker = programs._Maker(config, jax.sharding.get_mesh())
    model = Transformer(TINY)
    state = maker.state(model, optimizers.make_optimizer(OptimizerConfig(), 10))
    assert isinstance(state, train_state.TrainState)
    number = sum(x.size for x in jax.tree.leaves(common.shapes(model)))
    adapters = 2 * (16 * rank + rank * 16)
    key = maker.array(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
    found = planner.held((state, maker.params(model), maker.array(4, 6), key))
    scales = 2 if rank else 0  # of each layer
    assert found["parameters"] == 4 * (2 * number + adapters + scales)
    assert found["optimizer"] == pytest.approx(4 * 2 * (adapters if rank else number), abs=64)  # and counters
    assert found["batch"] == 4 * 24 + 8 + 4  # with the number of the step


def test_what_the_compiler_says_of_a_program_that_does_not_fit():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 41.25G of 30.75G hbm. Exceeded by 10.5G."
    assert planner.needed(RuntimeError(text)) == (41.25, "Used 41.25G of 30.75G hbm")


def test_seconds_of_a_collective():
    """2 GB go round 16 chips of 4 x 4 x 1: 15/16 of it over two axes with two links each."""
    gather = cost.Collective("all-gather", 2_000_000_000, 1, 16)
    assert planner.collective_seconds(gather, planner.CHIPS["v4"], (4, 4, 1)) == pytest.approx(1.875e9 / (4 * 45e9))
    small = dataclasses.replace(gather, group=4)
    assert planner.collective_seconds(small, planner.CHIPS["v4"], (4, 4, 1)) == pytest.approx(1.5e9 / (2 * 45e9))


CONFIGS = dict(config_files())


@pytest.mark.parametrize(
    ("name", "names"),
    [
        (
            "pit_synthetic:smoke",
            ["pretrain", "sft_policy", "sft_pit", "r_p", "r_pit", "rl_policy: rollout", "rl_policy: update",
             "rl_pit: rollout", "rl_pit: update"],
        ),
        ("srt_tulu2:70b", ["srt", "self_feedback: answers", "self_feedback: critiques", "dpo: log-probs", "dpo"]),
    ],
)  # fmt: skip
def test_programs_of_a_config(one_device, name, names):
    """Traced, not compiled: no program does less than the mathematics asks for, nor several times as much."""
    makers = programs.programs(CONFIGS[name], jax.sharding.get_mesh())
    found = [program for make in makers.values() for program in make()]
    assert [p.stage for p in found] == names
    for program in found:
        traced = program.function.trace(*program.arguments)
        done = cost.matmul_flops(traced.jaxpr, while_trips=program.while_trips)
        # Second forward passes (remat, blocks of attention), squares that are half behind the query, and in decoding
        # the whole cache at every token.
        assert 1.0 <= done / program.model_flops < 3.0, (program.stage, done / program.model_flops)


def test_a_plan_of_this_machine(tmp_path):
    """Without the TPU compiler: the CPU's own numbers of memory, and no time."""
    out = tmp_path / "plan.json"
    done = run(
        "-m",
        "pit_jax.plan",
        "--config=configs/pit_synthetic.py:smoke",
        "--topology=local",
        "--stages=r_p",
        f"--json={out}",
    )
    assert done.returncode == 0, done.stderr
    assert "pit_synthetic:smoke on local: 1 devices, mesh data=1 x model=1" in done.stdout
    (row,) = json.loads(out.read_text())["programs"]
    assert row["name"] == "r_p" and row["fits"] and 0 < row["peak_gib"] < 1
    assert row["peak_gib"] == pytest.approx(sum(row["parts"].values()))
    assert row["flops"] > 0 and row["bytes"] > 0 and row["collectives"] == []


@pytest.mark.parametrize(
    ("topology", "stages", "model", "message"),
    [
        ("v9", None, 1, "--topology='v9': use v4:4x4x4"),
        ("local", ["r_q"], 1, "--stages names r_q: use pretrain, sft_policy"),
        ("local", None, 8, "config.policy_model.num_kv_heads=1 is no multiple of the 8 devices"),
    ],
)
def test_what_cannot_be_planned(topology, stages, model, message):
    config = dataclasses.replace(CONFIGS["pit_synthetic:smoke"], mesh=config_lib.MeshConfig(model=model))
    with pytest.raises(ValueError, match=re.escape(message)):
        planner.plan(config, topology, stages)
