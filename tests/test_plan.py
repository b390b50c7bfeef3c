"""Planning without hardware: names of slices, what programs hold, and the programs of every config."""

import dataclasses
import importlib.util
import json
import math
import re
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run, start
from test_transformer import config_files

from pit_jax import config as config_lib, cost, fitting, optimizers, planner, programs, sharding, slices, train_state
from pit_jax.config import LoraConfig, ModelConfig, OptimizerConfig
from pit_jax.models.transformer import ScalarModel, Transformer
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
        ("v5litepod-16", "v5e", (4, 4)),
        ("v5e-8", "v5e", (2, 4)),
        ("v6e-256", "v6e", (16, 16)),
    ],
)
def test_names_of_slices(text, kind, axes):
    assert slices.slice_name(text) == (kind, axes)


def test_a_slice_of_n_tensorcores_has_half_as_many_chips():
    for size in slices.SLICES:
        assert 2 * math.prod(slices.slice_name(f"v4-{size}")[1]) == size


def test_usual_slices_from_the_smallest_on():
    assert slices.of_kind("v4", 32) == ["v4:4x4x4", "v4:4x4x8", "v4:4x8x8", "v4:8x8x8", "v4:8x8x16"]
    assert slices.of_kind("v5e")[:3] == ["v5e:1x1", "v5e:2x2", "v5e:2x4"]
    for kind, chip in slices.CHIPS.items():
        sizes = [math.prod(slices.slice_name(name)[1]) for name in slices.of_kind(kind)]
        assert sizes == sorted(sizes) and len(slices.slice_name(slices.of_kind(kind)[0])[1]) == chip.dimensions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4-100", "known with 8, 16, .* TensorCores"),
        ("v5litepod-12", "slices of v5e are known with 1, 4, 8, 16, .* chips"),
        ("v3:2x2", "use v4:4x4x4"),
        ("v4:2x2", "v4 has 3 axes"),
        ("v5e:4x4x4", "v5e has 2 axes"),
        ("v4:0x2x2", "all above 0"),
        ("v4:2xx2", "use v4:4x4x4"),
    ],
)
def test_slices_that_there_are_not(text, message):
    with pytest.raises(ValueError, match=message):
        slices.slice_name(text)


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


def test_operations_of_a_prompt_by_hand():
    """Behind the first layer 3 tokens have keys and values, 256 of 1,920, and the last has the rest and sees all 3."""
    first = 2 * 1920 * 3 + 4 * (2 + 2) * 4 * (1 + 2 + 3)
    last = 2 * 256 * 3 + 2 * (1920 - 256) + 4 * (2 + 2) * 4 * 3
    assert programs.prompt_flops(TINY, 5, 3) == 5 * (first + last + 2 * 1024)


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
    arguments = (state, maker.params(model), maker.array(4, 6), maker.key)
    found = planner.held(programs.Program("sft", "sft", "policy_model", None, arguments, 0.0, 4, 6))
    scales = 2 if rank else 0  # of each layer
    assert found["parameters"] == 4 * (2 * number + adapters + scales)
    assert found["optimizer"] == pytest.approx(4 * 2 * (adapters if rank else number), abs=64)  # and counters
    assert found["batch"] == 4 * 24 + 8 + 4  # with the number of the step
    assert "cache" not in found and "others" not in found


SMALL = config_lib.PitConfig(
    data=config_lib.DataConfig(prompt_window=16, response_window=8),
    policy_model=TINY,
    pit_model=dataclasses.replace(TINY, num_layers=3),
    reward_model=dataclasses.replace(TINY, mlp_dim=32),
    pretrain=config_lib.PretrainConfig(checkpoint="elsewhere"),
    ppo_pit=config_lib.PPOConfig(rollout_size=16),
)


def named(config, name):
    makers = programs.programs(config, jax.sharding.get_mesh())
    (found,) = [p for p in makers[name.partition(":")[0]]() if p.stage == name]
    return found


@pytest.mark.parametrize("rank", [0, 2])
def test_what_rl_holds_together(one_device, rank):
    """Four models, two of them with an optimizer, and M_P that writes ref_responses; with adapters three, as the state
    has the models that it started from."""
    config = dataclasses.replace(SMALL, lora=LoraConfig(rank=rank, targets=("q",)))
    policy, pit = (4 * sum(x.size for x in jax.tree.leaves(common.shapes(Transformer(m)))) for m in
                   (config.policy_model, config.pit_model))  # fmt: skip
    reward = 4 * sum(x.size for x in jax.tree.leaves(common.shapes(ScalarModel(config.reward_model))))
    adapters = lambda layers: 4 * layers * (2 * 16 * rank + 1 if rank else 0)  # noqa: E731
    held = lambda kind: planner.held(named(config, f"rl_pit: {kind}"))  # noqa: E731
    rollout, judged, update = map(held, ("rollout", "reward", "update"))
    trained = pit + reward + adapters(3) + adapters(2)
    frozen = 0 if rank else pit + reward
    assert judged["parameters"] == trained + frozen
    assert judged["others"] == policy  # the default curriculum is data, policy
    for other in (rollout, update):
        assert other["parameters"] == trained and other["others"] == policy + frozen
    # Prompts of 16 + 8 + 32 tokens and answers of 8, of 16 rows; 2 heads of 4 in float32, keys and values, 3 layers.
    slots = 16 * (16 + 8 + 32 + 8)
    assert rollout["cache"] == 2 * 3 * slots * 2 * 4 * 4 + 2 * 4 * slots + 4


def test_gradients_are_of_what_is_trained():
    """Sizes of the larger of policy and value model, as they are not made at once."""
    with jax.set_mesh(sharding.make_mesh(4, 2, devices=jax.devices()[:8])):
        program = named(SMALL, "rl_pit: update")
        least = planner.least_bytes(program) - sum(planner.held(program).values())
        assert least == planner.bytes_per_device(common.shapes(Transformer(SMALL.pit_model)))
        sft = named(SMALL, "sft_policy")
        least = planner.least_bytes(sft) - sum(planner.held(sft).values())
        assert least == planner.held(sft)["parameters"]


def test_candidates_that_take_turns_are_all_held(one_device):
    """30 iterations with a candidate every 10 leave four, of which the two in the middle write ref_responses."""
    ppo = config_lib.PPOConfig(num_iterations=30, eval_every=10)
    for rank in (0, 2):
        lora = LoraConfig(rank=rank, targets=("q",))
        config = dataclasses.replace(SMALL, ppo=ppo, curriculum=("data", "policy_checkpoint"), lora=lora)
        policy = 4 * sum(x.size for x in jax.tree.leaves(common.shapes(Transformer(config.policy_model))))
        adapters = 4 * 2 * 2 * 16 * rank
        judged = planner.held(named(config, "rl_pit: reward"))
        assert judged["others"] == policy + (adapters if rank else policy)


def test_operations_of_learning_with_adapters(one_device):
    """Frozen weights have no gradient. What is counted is done, or MFU could be above 100%."""
    done = {}
    for rank in (0, 1):
        lora = LoraConfig(rank=rank, targets=("q",))
        program = named(dataclasses.replace(SMALL, lora=lora), "sft_policy")
        jaxpr = program.function.trace(*program.arguments).jaxpr
        done[rank] = cost.matmul_flops(jaxpr), program.model_flops
        assert 1.0 <= done[rank][0] / done[rank][1] < 1.5
    assert done[1][1] < 0.8 * done[0][1]


def test_what_starts_from_nothing_has_no_adapters(one_device):
    """Pretraining moves all weights, with config.lora too."""
    config = dataclasses.replace(SMALL, pretrain=config_lib.PretrainConfig(), lora=LoraConfig(rank=2, targets=("q",)))
    whole, adapted = (planner.held(named(config, name)) for name in ("pretrain", "sft_policy"))
    assert whole["optimizer"] > 1.9 * whole["parameters"] and adapted["optimizer"] < 0.2 * adapted["parameters"]


def test_shapes_of_packed_groups(one_device):
    """Groups of R_P have 16 + 32 + 2 x 8 = 64 tokens at most, of R_PIT 16 + 32 + 6 x 8 = 96: three and two in 200."""
    settings = config_lib.RewardModelConfig(batch_size=16, sequence_length=200, accumulation=4)
    config = dataclasses.replace(SMALL, r_p=settings, r_pit=settings)
    for stage, C, E, B in (("r_p", 2, 3, 8), ("r_pit", 4, 2, 8)):  # 6 sequences are 8 in 4 pieces
        program, alone = named(config, stage), named(SMALL, stage)
        state, batch = program.arguments
        assert batch.tokens.shape == (B, 200) and batch.last.shape == (B, E, C)
        assert program.num_tokens == B * 200 and program.model_flops == alone.model_flops
        assert program.function.trace(state, batch).jaxpr.out_avals
    short = named(fitting.changed(config, {"r_p.sequence_length": 32}), "r_p")  # groups of half the windows
    assert short.batch == 16 and 0.3 * alone.model_flops < short.model_flops * 96 / 64 < 0.6 * alone.model_flops


@pytest.mark.parametrize(
    ("values", "stage", "message"),
    [
        (
            {"r_p.batch_size": 6},
            "r_p",
            "config.r_p.batch_size=6 is no multiple of the 4 devices of the mesh's axis data",
        ),
        ({"sft_policy.accumulation": 16}, "sft_policy", "batch_size=32 in 16 pieces (accumulation) is no multiple"),
        ({"ppo.rollout_size": 8}, "rl_policy", "config.ppo.rollout_size=8 in 4 pieces (num_minibatches)"),
    ],
)
def test_rows_that_a_mesh_does_not_divide(values, stage, message):
    with jax.set_mesh(sharding.make_mesh(4, 2, devices=jax.devices()[:8])):
        makers = programs.programs(fitting.changed(SMALL, values), jax.sharding.get_mesh())
        with pytest.raises(ValueError, match=re.escape(message)):
            makers[stage]()


def test_what_the_compiler_says_of_a_program_that_does_not_fit():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 41.25G of 30.75G hbm. Exceeded by 10.5G."
    assert planner.needed(RuntimeError(text)) == (41.25, "needs 41.25 GiB of the 30.75 of a chip")
    text = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (512.00M) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    said = "its temporaries alone need 0.50 GiB of the 15.75 of a chip"
    assert planner.needed(RuntimeError(text), given=2.0) == (2.5, said)
    assert planner.needed(RuntimeError("RESOURCE_EXHAUSTED: no\nmore")) == (None, "RESOURCE_EXHAUSTED: no")


class Device:
    """One that does not say where it stands."""

    platform = "cpu"


@pytest.mark.parametrize(
    ("axes", "shape", "links"),
    [
        # Groups of neighbours in the order of the devices below: `model` along the last axes, `data` along the first.
        ((4, 4, 4), (16, 4), {16: 4, 4: 2, 64: 6}),  # cubes have rings
        ((4, 4, 4), (32, 2), {32: 5, 2: 1, 64: 6}),  # half of an axis is no ring
        ((4, 8, 8), (32, 8), {32: 4, 8: 2, 256: 6}),  # 8 fill one axis, not two
        ((2, 2, 4), (4, 4), {4: 2, 16: 3}),  # lines; the two groups of 4 are not told apart: the faster one
        ((2, 2, 1), (4, 1), {4: 2, 1: 1}),
        ((4, 16), (4, 16), {4: 1, 16: 2, 64: 3}),
    ],
)
def test_links_of_groups(axes, shape, links):
    devices = tuple(Device() for _ in range(math.prod(axes)))
    grid = np.empty(len(devices), object)
    grid[:] = devices
    mesh = types.SimpleNamespace(devices=grid.reshape(shape))
    assert planner.links_of(mesh, slices.Place("", devices, math.inf, None, axes)) == links


def test_seconds_of_a_collective():
    """2 GB go round 16 chips: each sends 15/16 of it, over four links of 45 GB/s."""
    gather = cost.Collective("all-gather", 2_000_000_000, 1, 16)
    seconds = planner.collective_seconds(gather, slices.CHIPS["v4"], {16: 4, 4: 2})
    assert seconds == pytest.approx(1.875e9 / (4 * 45e9))
    small = dataclasses.replace(gather, group=4)
    assert planner.collective_seconds(small, slices.CHIPS["v4"], {16: 4, 4: 2}) == pytest.approx(1.5e9 / (2 * 45e9))


CONFIGS = dict(config_files())


@pytest.mark.parametrize(
    ("name", "names"),
    [
        (
            "pit_synthetic:smoke",
            ["pretrain", "sft_policy", "sft_pit", "r_p", "r_pit", "rl_policy: rollout", "rl_policy: reward",
             "rl_policy: update", "rl_pit: rollout", "rl_pit: reward", "rl_pit: update"],
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
    assert json.loads(out.read_text())["finished"]
    assert row["flops"] > 0 and row["bytes"] > 0 and row["collectives"] == []


def test_what_a_line_of_the_table_says():
    """Sizes are GiB, but where these would be 0.00; seconds likewise."""
    gib = {"parameters": 1.5, "optimizer": 0.0, "batch": 3 / 1024}
    row = {"name": "srt", "batch": 48, "length": 4096, "fits": True, "peak_gib": 1.503, "parts": gib, "mfu": 0.5}
    row |= {"seconds": 0.0042, "seconds_of": {"compute": 0.0042, "memory": 0.0}, "seconds_without_overlap": 0.0142}
    row |= {"collectives": [{"kind": "all-gather", "bytes": 2**20, "group": 4}]}
    top, *rest = planner.describe(row).splitlines()
    assert top.split("  (")[0].split() == "srt 48 x 4096 1.50".split()
    assert top.endswith("(parameters 1.50, optimizer 0.00, batch 3 MiB)")
    assert planner.head(2 * slices.GIB).index("GiB") == top.index("1.50") + 1, "columns have a head"
    assert [line.strip() for line in rest] == [
        "4.2 ms at best, MFU 50% (compute 4.2 ms, memory 0.000 s; one after the other 0.014 s)",
        "all-gather 1 MiB over 4",
    ]
    row |= {"fits": False, "said": "needs 41.25 GiB of the 30.75 of a chip"}
    assert "does NOT fit (needs 41.25 GiB of the 30.75 of a chip; parameters 1.50" in planner.describe(row)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((True, True, False, None, None), "--smallest is another question than --search: ask one at a time"),
        ((True, False, True, None, None), "--smallest is another question than --micro_batch"),
        ((False, True, True, None, None), "--search is another question than --micro_batch"),
        ((False, True, False, False, None), "--search is another question than --remedies"),
        ((False, False, False, None, "no/plan.json"), "there is no folder {}/no"),
        ((False, False, False, None, ""), "--json={}: is a folder"),
    ],
)
def test_what_is_refused_before_anything_is_compiled(tmp_path, given, message):
    *asked, json_file = given
    with pytest.raises(ValueError, match=re.escape(message.format(tmp_path))):
        planner.check_asked(*asked, None if json_file is None else str(tmp_path / json_file))


def test_what_may_be_asked_together(tmp_path):
    planner.check_asked(False, False, True, False, f"{tmp_path}/plan.json")
    planner.check_asked(True, False, False, None, "plan.json")
    planner.check_asked(False, True, False, None, "gs://bucket/plan.json")


def test_words_that_are_no_flags():
    done = run("-m", "pit_jax.plan", "--config=configs/pit_synthetic.py:smoke", "--topology=local", "r_p", "dpo")
    assert done.returncode == 2
    assert done.stderr == "error: unknown arguments r_p dpo; fields are set as --config.FIELD=VALUE\n"


@pytest.mark.parametrize(("number", "topology"), [(signal.SIGTERM, "v4:2x2x1"), (signal.SIGINT, "local")])
def test_a_plan_that_is_stopped_keeps_what_it_knows(tmp_path, number, topology):
    """At once, though the compiler is at work and libtpu, where it is installed, has handlers of its own."""
    out, log = tmp_path / "plan.json", tmp_path / "log"
    there = topology if importlib.util.find_spec("libtpu") else "local"
    what = ("--config=configs/pit_synthetic.py:smoke", "--stages=r_p,r_pit,rl_pit", f"--topology={there}")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests are in the background
    process = start("-m", "pit_jax.plan", *what, f"--json={out}", log=log)
    signal.signal(signal.SIGINT, before)
    try:
        for _ in range(1200):
            if out.exists():
                break
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(10) == 128 + number
    finally:
        process.kill()
    *_, line = log.read_text().splitlines()
    assert line == f"{signal.Signals(number).name}: the plan is not finished; what is known so far is in {out}"
    assert "Stack Trace" not in log.read_text() and "Traceback" not in log.read_text()
    found = json.loads(out.read_text())
    assert found["programs"][0]["name"] == "r_p" and not found["finished"]


def slice_of_cpus(name, num, hbm_bytes):
    """A slice whose compiler is that of this machine: what is read off its programs has another size, but is there."""
    return slices.Place(name, tuple(jax.devices()[:num]), hbm_bytes, slices.CHIPS["v4"], (2, 2, num // 4))


@pytest.fixture(scope="module")
def sft_row():
    """One program of 32 rows on 4 devices."""
    lines: list[str] = []
    (row,) = planner.measured(SMALL, slice_of_cpus("v4:2x2x1", 4, math.inf), ["sft_policy"], lines.append)
    assert lines == [planner.describe(row)]
    # A prompt of 16 tokens, 32 of a template and an answer of 8.
    assert (row["batch"], row["length"], row["tokens"]) == (32, 56, 32 * 56)
    return row


def test_rows_come_in_the_order_of_the_stages(monkeypatch):
    """Though the first takes longest; and one that does not compile keeps no other from being said."""
    another = threading.Event()

    def measure(made, place):
        if made.program.stage == "sft_policy":
            assert another.wait(60)
        another.set()
        if made.program.stage == "sft_pit":
            raise RuntimeError("no such kernel\nas said above")
        return {"name": made.program.stage, "batch": 1, "length": 1, "fits": True, "peak_gib": 1.0}

    monkeypatch.setattr(planner, "lowered", lambda program: types.SimpleNamespace(program=program))
    monkeypatch.setattr(planner, "measure", measure)
    lines: list[str] = []
    planner.measured(SMALL, slice_of_cpus("v4:2x2x1", 4, math.inf), ["r_p", "sft_policy", "sft_pit"], lines.append)
    assert [line.split()[0] for line in lines] == ["sft_policy", "sft_pit", "r_p"]
    assert lines[1].split()[1:] == "32 x 64 does not compile: no such kernel".split()


def test_the_bound_is_the_longest_of_three(sft_row):
    of = sft_row["seconds_of"]
    assert sft_row["seconds"] == max(of.values()) and sft_row["seconds_without_overlap"] == sum(of.values())
    assert sft_row["mfu"] == pytest.approx(sft_row["model_flops"] / (4 * 275e12 * sft_row["seconds"]))
    assert of["compute"] == sft_row["flops"] / 275e12 and of["memory"] == sft_row["bytes"] / 1.2e12


def test_what_is_given_and_not_read_is_held_too():
    """As the optimizers in a rollout: 1,000 numbers on each of 4 devices, of which the program reads 10."""
    place = slice_of_cpus("v4:2x2x1", 4, math.inf)
    with jax.set_mesh(planner.on_place(SMALL, place)):
        on = lambda n: jax.ShapeDtypeStruct(  # noqa: E731
            (n,), jnp.float32, sharding=jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None))
        )
        read = jax.jit(lambda params, x: x + params["w"][0])
        program = programs.Program(
            "r", "r_p", "reward_model", read, ({"w": on(10), "rest": on(1000)}, on(4)), 1.0, 4, 1
        )
        row = planner.measure(planner.lowered(program), place)
    assert row["parts"]["parameters"] * slices.GIB == 4 * 1010
    assert row["parts"]["temporaries"] >= 0 and row["peak_gib"] * slices.GIB >= 4 * (1010 + 4 + 4)


def test_a_program_that_jaxlib_cannot_read_has_its_memory():
    """As those for v5p and v6e whose collectives come in parts: no traceback after minutes of compiling."""
    place = slice_of_cpus("v4:2x2x1", 4, math.inf)
    with jax.set_mesh(planner.on_place(SMALL, place)):
        made = planner.lowered(named(SMALL, "sft_policy"))
    readable = planner.measure(made, place)

    def refuse():
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction\nmore")

    compiled = made.stage.compile()
    closed = types.SimpleNamespace(memory_analysis=compiled.memory_analysis, as_text=refuse)
    stage = types.SimpleNamespace(compile=lambda: closed)
    row = planner.measure(dataclasses.replace(made, stage=stage), place)
    for name in ("fits", "peak_gib", "parts", "flops", "model_flops"):
        assert row[name] == readable[name]
    assert row["bytes"] is None and "mfu" not in row
    said = "times are not known: jaxlib cannot read it (INTERNAL: async-update instruction)"
    assert planner.describe(row).splitlines()[1].strip() == said
    table = planner.describe_search([row | {"data": 4, "model": 1, "rows": 8, "flags": ""}])
    assert said in table and "does not fit" not in table


def test_prefill_and_decode_do_not_overlap():
    """Decoding 8 tokens takes 8 times as much as one; what is read before it does not depend on how many come."""
    place = slice_of_cpus("v4:2x2x1", 4, math.inf)
    config = config_lib.SrtConfig(data=SMALL.data, policy_model=TINY, self_feedback=config_lib.FeedbackConfig())
    rows = {}
    with jax.set_mesh(planner.on_place(config, place)):
        made = planner.lowered(named(config, "self_feedback: answers"))
        for trips in (8, 1):
            program = dataclasses.replace(made.program, while_trips=trips)
            rows[trips] = planner.measure(dataclasses.replace(made, program=program), place)
    eight, one = (list(rows[trips]["phases"].values()) for trips in (8, 1))
    assert list(rows[8]["phases"]) == ["prefill", "decode of 8 tokens"]
    assert eight[0] == one[0]
    for name in ("compute", "memory"):
        assert eight[1][name] == pytest.approx(8 * one[1][name]) and one[1][name] > 0
        assert rows[8]["seconds_of"][name] == pytest.approx(eight[0][name] + eight[1][name])
    assert rows[8]["seconds"] == sum(max(phase.values()) for phase in eight)


ROW = 1_000
SHARE = {"none": 1.0, "dots": 0.5, "full": 0.25}


@pytest.fixture
def by_hand(monkeypatch):
    """In the compiler's place: ROW bytes for a row of a piece, less with remat; time grows with `model`. Gives what
    was asked."""
    asked = []

    def measured(config, place, program):
        rows = config.sft_policy.batch_size / config.sft_policy.accumulation / planner.axes_of(config, place, {})[0]
        size = planner.least_bytes(program) + rows * ROW * SHARE[config.policy_model.remat]
        asked.append(rows)
        row = {
            "name": program.stage,
            "batch": 32,
            "length": 56,
            "fits": size <= place.hbm_bytes,
            "peak_gib": size / slices.GIB,
            "mfu": 0.5,
        }
        return row | {"seconds": config.mesh.model / rows, "tokens": 1, "parts": {}, "seconds_of": {}, "said": "no",
                      "seconds_without_overlap": 0.0, "collectives": []}  # fmt: skip

    monkeypatch.setattr(planner, "measured_alone", measured)
    return asked


def least_of_sft(num):
    """Models, optimizer, gradients and batch on a device of `num` along data."""
    with jax.set_mesh(sharding.make_mesh(num, 1, devices=jax.devices()[:num])):
        return planner.least_bytes(named(SMALL, "sft_policy"))


@pytest.mark.parametrize(
    ("room", "values"),
    [
        # 8 rows on each of four devices.
        (7.9, {"sft_policy.accumulation": 2}),
        (2.1, {"sft_policy.accumulation": 4}),
        (0.6, {"sft_policy.accumulation": 8, "policy_model.remat": "dots"}),
        (0.3, {"sft_policy.accumulation": 8, "policy_model.remat": "full"}),
    ],
)
def test_what_makes_a_program_fit(by_hand, room, values):
    place = slice_of_cpus("v4:2x2x1", 4, least_of_sft(4) + room * ROW)
    lines: list[str] = []
    found = planner.remedy(SMALL, place, "sft_policy", lines.append)
    assert (found["topology"], found["values"]) == ("v4:2x2x1", values)
    assert found["row"]["fits"] and found["flags"] == fitting.flags(values)
    assert len(lines) == len(by_hand) <= 8
    assert lines[0].startswith("  tried v4:2x2x1 --config.sft_policy.accumulation=8 --config.policy_model.remat=full")


def test_a_candidate_that_does_not_compile_is_told_and_others_are_tried(monkeypatch):
    """As where a library refuses what it is given: not the mistake of who plans."""

    def lowered(program):
        raise TypeError("one and\nanother line")

    monkeypatch.setattr(planner, "lowered", lowered)
    lines: list[str] = []
    place = slice_of_cpus("v4:2x2x1", 4, math.inf)
    assert planner.remedy(SMALL, dataclasses.replace(place, chip=None), "sft_policy", lines.append) is None
    values = "--config.sft_policy.accumulation=8 --config.policy_model.remat=full --config.sft_policy.chunk_size=32"
    assert lines[0] == f"  tried v4:2x2x1 {values}: does not compile: one and"
    assert len(lines) == 2  # the other mesh of four devices
    config = dataclasses.replace(SMALL, sft_policy=dataclasses.replace(SMALL.sft_policy, batch_size=30))
    row = planner.Asker(config, "sft_policy", lines.append)(place, {})
    assert lines[2].startswith("  tried v4:2x2x1: cannot be: config.sft_policy.batch_size=30 is no multiple")
    assert "cannot be: config" in planner.describe_search([row | {"data": 4, "model": 1, "rows": 8}])


def test_a_larger_slice_where_nothing_else_will_do(by_hand, monkeypatch):
    larger = slice_of_cpus("v4:2x2x2", 8, least_of_sft(4) - ROW)
    monkeypatch.setattr(slices, "place_of", {"v4:2x2x2": larger}.get)
    monkeypatch.setattr(slices, "of_kind", lambda kind, above: ["v4:2x2x2"] if above < 8 else [])
    lines: list[str] = []
    place = slice_of_cpus("v4:2x2x1", 4, least_of_sft(4) - ROW)
    found = planner.remedy(SMALL, place, "sft_policy", lines.append)
    assert found["topology"] == "v4:2x2x2" and found["row"]["fits"]
    assert all("v4:2x2x1" not in line for line in lines)  # what cannot fit is not compiled
    monkeypatch.setattr(slices, "of_kind", lambda kind, above: [])
    assert planner.remedy(SMALL, place, "sft_policy", lines.append) is None


def test_the_largest_micro_batch(by_hand):
    place = slice_of_cpus("v4:2x2x1", 4, least_of_sft(4) + 21.5 * ROW)
    (program,) = planner.made_programs(SMALL, place, ["sft_policy"])
    found = planner.micro_batch(SMALL, place, program, lambda line: None)
    assert (found["name"], found["batch"]) == ("sft_policy", 4 * found["rows"])
    # A row has 16 + 32 + 8 tokens: three numbers and a mask for each, of 8 rows so far: 15 x 1,728 - 8 x 728 < 21,500.
    assert found["rows"] == 15 and len(by_hand) <= 5


def test_meshes_ranked(by_hand):
    """Two key/value heads: data 4 or 2; with 32 rows, micro-batches of 1 to 8 and of 1 to 16 rows."""
    place = slice_of_cpus("v4:2x2x1", 4, math.inf)
    config = dataclasses.replace(SMALL, mesh=config_lib.MeshConfig(2, 2))
    (program,) = planner.made_programs(SMALL, place, ["sft_policy"])
    rows = planner.search(config, place, program, lambda line: None)
    assert sorted((r["data"], r["rows"]) for r in rows) == [
        *((2, n) for n in (1, 2, 4, 8, 16)), *((4, n) for n in (1, 2, 4, 8))
    ]  # fmt: skip
    assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)
    table = planner.describe_search(rows).splitlines()
    assert len(table) == 10 and "--config.mesh.data=" in table[1]


def test_the_smallest_slice(by_hand, monkeypatch):
    """Models, optimizer and gradients of 4 devices are too much: nothing is compiled for these."""
    limit = least_of_sft(4) - 1
    assert limit > least_of_sft(8) + ROW
    places = {name: slice_of_cpus(name, n, limit) for name, n in (("v4:2x2x1", 4), ("v4:2x2x2", 8))}
    monkeypatch.setattr(slices, "place_of", places.get)
    monkeypatch.setattr(slices, "of_kind", lambda kind: list(places))
    lines: list[str] = []
    found = planner.smallest(SMALL, "v4", ["sft_policy"], say=lines.append)
    assert found["topology"] == "v4:2x2x2" and found["chips"] == 8 and all(row["fits"] for row in found["programs"])
    assert found["flags"] == fitting.flags(found["values"]) and found["flags"] in lines[-2]
    assert "sft_policy has" in lines[0] and "alone" in lines[0]
    monkeypatch.setattr(slices, "of_kind", lambda kind: ["v4:2x2x1"])
    with pytest.raises(ValueError, match="fits on no slice of v4 that is known here: v4:2x2x1"):
        planner.smallest(SMALL, "v4", ["sft_policy"], say=lines.append)


def test_what_a_stage_holds_together():
    row = lambda name, peak, **parts: {"name": name, "peak_gib": peak, "parts": parts}  # noqa: E731
    rows = [
        row("r_p", 9.0, parameters=1.0),
        row("rl: rollout", 5.0, parameters=2.0, optimizer=1.0),
        row("rl: update", 7.25, parameters=2.0, optimizer=1.0, others=1.5),
    ]
    (line,) = planner.together(rows)
    assert line.split() == "rl together 7.25 in rl: update (all its models 3.50, optimizers 1.00)".split()
    assert planner.together([row("rl: rollout", None), row("rl: update", None)]) == []


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
    with pytest.raises(ValueError, match="--search ranks by what chips can do"):
        planner.plan(config, "local", with_search=True)
    with pytest.raises(ValueError, match="--micro_batch: the devices of this machine do not say how much they hold"):
        planner.plan(config, "local", with_micro_batches=True)
    with pytest.raises(ValueError, match="--topology=local has one size: name the chips"):
        slices.kind_of("local")
