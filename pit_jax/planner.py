"""What the programs of a config take on a slice of TPUs that need not be there: memory, operations, bytes, seconds.

The TPU compiler runs on a CPU machine; `pit_jax.plan` sets the environment that it wants before jax is imported.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from pit_jax import cost, programs, sharding
from pit_jax.pipelines import common
from pit_jax.train_state import TrainState

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do, by Google's published figures.

    Attributes:
      flops: bfloat16 operations per second.
      hbm_bytes, hbm_bandwidth: bytes, bytes per second.
      link_bandwidth: bytes per second of one link of the interconnect in one direction.
      dimensions: axes of the torus: two links along each.
      options: what the compiler has to be told.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 45e9, 3, {"chip_config_name": "megacore"}),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 90e9, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 16 * GIB, 0.81e12, 45e9, 2),
    "v6e": Chip(918e12, 32 * GIB, 1.6e12, 90e9, 2),
}

SLICES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
    2048: "8x8x16",
}  # fmt: skip
"""TensorCores -> chips along each axis, of v4 and v5p: the usual shape of a slice of that size."""


def slice_name(text: str) -> tuple[str, tuple[int, ...]]:
    """Kind and chips along each axis: ("v4", (4, 4, 4)) for "v4:4x4x4" and for "v4-128".

    Raises:
      ValueError: for others.
    """
    advice = "use v4:4x4x4, v5p:2x2x2, v5e:4x4, v6e:4x4 (chips along each axis), v4-128 (TensorCores) or local"
    if found := re.fullmatch(r"(v4|v5p)-(\d+)", text):
        if int(found[2]) not in SLICES:
            sizes = ", ".join(map(str, SLICES))
            raise ValueError(f"--topology={text}: slices of {found[1]} are known with {sizes} TensorCores, or {advice}")
        text = f"{found[1]}:{SLICES[int(found[2])]}"
    kind, _, shape = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ValueError(f"--topology={text!r}: {advice}")
    axes = tuple(map(int, shape.split("x")))
    if len(axes) != CHIPS[kind].dimensions or not all(axes):
        raise ValueError(f"--topology={text}: {kind} has {CHIPS[kind].dimensions} axes, all above 0; {advice}")
    return kind, axes


def devices_of(kind: str, axes: tuple[int, ...]) -> list:
    """Devices for which the compiler works, none of which exists."""
    hosts = (2, 2, 1) if len(axes) == 3 else (2, 2)
    bounds = tuple(min(a, b) for a, b in zip(axes, hosts, strict=True))
    bounds += (1,) * (3 - len(bounds))
    try:
        topology = topologies.get_topology_desc(
            f"{kind}:{'x'.join(map(str, axes))}", platform="tpu", chips_per_host_bounds=bounds, num_slices=1,
            **CHIPS[kind].options,
        )  # fmt: skip
    except Exception as error:  # jaxlib raises types of its own
        raise ValueError(
            f"the TPU compiler does not know {kind}:{'x'.join(map(str, axes))} ({str(error).splitlines()[0]}): is "
            'libtpu installed (pip install "pit_jax[tpu]", Linux on x86-64), and is there such a slice?'
        ) from error
    return list(topology.devices)


# ----------------------------------------------------------------------------------------------------------- numbers


def bytes_per_device(tree) -> int:
    """Of arrays without values, on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += math.prod(shape) * size
    return total


def held(arguments: tuple) -> dict[str, int]:
    """Bytes per device of a program's arguments: parameters (of all models), optimizer, batch."""
    states = [x for x in jax.tree.leaves(arguments, is_leaf=_is_state) if _is_state(x)]
    optimizer = sum(bytes_per_device(s.opt_state) for s in states)
    parameters = sum(bytes_per_device(s.params) for s in states)
    parameters += sum(bytes_per_device(a) for a in arguments if isinstance(a, dict))
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "batch": bytes_per_device(arguments) - parameters - optimizer,
    }


def _is_state(x) -> bool:
    return isinstance(x, TrainState)


def collective_seconds(collective: cost.Collective, chip: Chip, axes: tuple[int, ...]) -> float:
    """Of a ring over as many axes of the torus as the group fills, both directions of each at once."""
    used, chips = 0, 1
    for size in sorted(axes):
        if chips < collective.group and size > 1:
            used, chips = used + 1, chips * size
    return collective.bytes_sent / (2 * max(used, 1) * chip.link_bandwidth)


def needed(error: Exception) -> tuple[float, str]:
    """(GiB that a refused program needs, what the compiler said)."""
    text = str(error)
    found = re.search(r"Used ([\d.]+)([GMK]) of ([\d.]+)G hbm", text)
    scale = {"G": 1.0, "M": 1 / 1024, "K": 1 / 1024**2}
    return (float(found[1]) * scale[found[2]] if found else math.nan), found[0] if found else text.splitlines()[0]


def measure(program: programs.Program, num_chips: int, chip: Chip | None, axes: tuple[int, ...]) -> dict[str, Any]:
    """Compiles a program; what it holds, moves and takes on one device.

    Returns:
      name, fits, peak_gib, parts (GiB by what they are for), flops, model_flops (of all devices), bytes, collectives,
      seconds (the largest of compute, memory and interconnect; and their sum), mfu, compile_seconds.
    """
    started = time.time()
    parts = held(program.arguments)
    row: dict[str, Any] = {"name": program.stage, "tokens": program.num_tokens}
    traced = program.function.trace(*program.arguments)
    flops = cost.matmul_flops(traced.jaxpr, while_trips=program.while_trips)
    row |= {"flops": flops, "model_flops": program.model_flops}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak, said = needed(error)
        return row | {
            "fits": False, "peak_gib": peak, "said": said, "parts": {k: v / GIB for k, v in parts.items()},
            "compile_seconds": time.time() - started,
        }  # fmt: skip
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    parts["temporaries"] = peak - sum(parts.values())
    moved = cost.traffic(compiled.as_text(), program.while_trips)
    row |= {
        "fits": chip is None or peak < chip.hbm_bytes,
        "peak_gib": peak / GIB,
        "parts": {k: v / GIB for k, v in parts.items()},
        "bytes": moved.hbm_bytes,
        "collectives": [dataclasses.asdict(c) for c in moved.collectives],
        "compile_seconds": time.time() - started,
    }
    if chip is None:
        return row
    seconds = {
        "compute": flops / chip.flops,
        "memory": moved.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(collective_seconds(c, chip, axes) for c in moved.collectives),
    }
    bound = max(seconds.values())
    return row | {
        "seconds": bound,
        "seconds_without_overlap": sum(seconds.values()),
        "seconds_of": seconds,
        "mfu": program.model_flops / (num_chips * chip.flops * bound),
    }


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in row["parts"].items())
    if not row["fits"]:
        return f"{row['name']:<28}{row['peak_gib']:>8.2f}  does NOT fit ({row.get('said', '')}; {parts})"
    line = f"{row['name']:<28}{row['peak_gib']:>8.2f}  ({parts})"
    if "mfu" not in row:
        return line
    of = row["seconds_of"]
    line += f"\n{'':<28}{row['seconds']:>8.3f} s at best, MFU {row['mfu']:.0%}"
    line += f" (compute {of['compute']:.3f}, memory {of['memory']:.3f}, interconnect {of['interconnect']:.3f} s;"
    line += f" one after the other {row['seconds_without_overlap']:.3f} s)"
    sent = ", ".join(f"{c['kind']} {c['bytes'] / GIB:.2f} GiB over {c['group']}" for c in row["collectives"][:4])
    return line + (f"\n{'':<28}{sent}" if sent else "")


def plan(config: Any, topology: str, stages: list[str] | None = None) -> dict[str, Any]:
    """Compiles the programs of a config's stages, and prints a line for each as it is known.

    Raises:
      ValueError: for a topology or a stage that there is not, and a mesh that does not divide the devices.
    """
    chip, axes = None, ()
    if topology == "local":
        devices = jax.devices()
    else:
        kind, axes = slice_name(topology)
        chip, devices = CHIPS[kind], devices_of(kind, axes)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices=devices)
    shape = dict(mesh.shape)
    common.check_layout(config, shape)
    print(f"{config.name} on {topology}: {len(devices)} devices, mesh data={shape['data']} x model={shape['model']}")
    if chip:
        print(f"{'program':<28}{'GiB':>8}  of {chip.hbm_bytes / GIB:.0f} per chip")
    rows = []
    with jax.set_mesh(mesh):
        makers = programs.programs(config, mesh)
        unknown = set(stages or ()) - set(makers)
        if unknown:
            raise ValueError(f"--stages names {', '.join(sorted(unknown))}: use {', '.join(makers)}")
        for stage, make in makers.items():
            if stages and stage not in stages:
                continue
            for program in make():
                row = measure(program, len(devices), chip, axes)
                rows.append(row)
                print(describe(row), flush=True)
    return {"config": config.name, "topology": topology, "mesh": shape, "chips": len(devices), "programs": rows}
