"""Slices of TPUs, which need not be there: what a chip can do, and devices that the TPU compiler works for.

The compiler runs on a CPU machine; `pit_jax.plan` sets the environment that it wants before jax is imported.
"""

import dataclasses
import itertools
import math
import re
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do, by Google's published figures.

    Attributes:
      flops: bfloat16 operations per second.
      hbm_bytes: that the compiler gives to a program; a little less than there are.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second of one link of the interconnect in one direction.
      dimensions: axes of a slice, along which a chip has two links, but for the ends of a line (`rings`).
      options: what the compiler has to be told.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1.2e12, 45e9, 3, {"chip_config_name": "megacore"}),
    "v5p": Chip(459e12, 95.73 * GIB, 2.765e12, 90e9, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 15.75 * GIB, 0.81e12, 45e9, 2),
    "v6e": Chip(918e12, 31.24 * GIB, 1.6e12, 90e9, 2),
}

SLICES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
    2048: "8x8x16",
}  # fmt: skip
"""TensorCores -> chips along each axis, of v4 and v5p: the usual shape of a slice of that size."""

FLAT_SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Of v5e and v6e: their sizes in Cloud's names are numbers of chips."""


def rings(axes: tuple[int, ...]) -> tuple[bool, ...]:
    """Which axes of a slice have links from their last chip to their first; the others are lines.

    In three dimensions that is so where the slice is made of cubes of 4 x 4 x 4, in two along axes of 16.
    """
    if len(axes) == 3:
        return (not any(size % 4 for size in axes),) * 3
    return tuple(size == 16 for size in axes)


def slice_name(text: str) -> tuple[str, tuple[int, ...]]:
    """Kind and chips along each axis: ("v4", (4, 4, 4)) for "v4:4x4x4" and "v4-128", v5e's 4 x 4 for "v5litepod-16".

    Raises:
      ValueError: for others.
    """
    advice = (
        "use v4:4x4x4, v5p:2x2x2, v5e:4x4, v6e:4x4 (chips along each axis), Cloud's v4-128, v5p-8 (TensorCores), "
        "v5litepod-16, v6e-16 (chips), or local"
    )
    if found := re.fullmatch(r"(v4|v5p|v5e|v5litepod|v6e)-(\d+)", text):
        kind, number = found[1].replace("v5litepod", "v5e"), int(found[2])
        of = {"v4": SLICES, "v5p": SLICES}.get(kind) or {math.prod(map(int, s.split("x"))): s for s in FLAT_SLICES}
        if number not in of:
            what, sizes = "TensorCores" if of is SLICES else "chips", ", ".join(map(str, of))
            raise ValueError(f"--topology={text}: slices of {kind} are known with {sizes} {what}, or {advice}")
        text = f"{kind}:{of[number]}"
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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where programs are to run.

    Attributes:
      name: as typed.
      devices: that the compiler works for.
      hbm_bytes: of each.
      chip, axes: of a slice of TPUs; None and () of the devices of this machine.
    """

    name: str
    devices: tuple
    hbm_bytes: float
    chip: Chip | None = None
    axes: tuple[int, ...] = ()

    @property
    def coordinates(self) -> dict[Any, tuple[int, ...]]:
        """Device -> where its chip stands in the slice."""
        if self.devices[0].platform == "tpu":
            return {device: tuple(device.coords)[: len(self.axes)] for device in self.devices}
        return dict(zip(self.devices, itertools.product(*map(range, self.axes)), strict=True))


def place_of(topology: str) -> Place:
    """The slice that --topology names.

    Raises:
      ValueError: where there is none, or no compiler for it.
    """
    if topology == "local":
        devices = tuple(jax.devices())
        statistics = devices[0].memory_stats() or {}  # a CPU has none
        return Place(topology, devices, statistics.get("bytes_limit", math.inf))
    kind, axes = slice_name(topology)
    chip = CHIPS[kind]
    return Place(topology, tuple(devices_of(kind, axes)), chip.hbm_bytes, chip, axes)


def kind_of(topology: str) -> str:
    """The chips of a slice.

    Raises:
      ValueError: for others, as the devices of this machine.
    """
    if topology == "local":
        raise ValueError("--topology=local has one size: name the chips, as --topology=v4-8")
    return slice_name(topology)[0]


def of_kind(kind: str, above: int = 0) -> list[str]:
    """Names of the usual slices of a kind of chips that have more than `above` of them, the smallest first."""
    shapes = SLICES.values() if CHIPS[kind].dimensions == 3 else FLAT_SLICES
    return [f"{kind}:{shape}" for shape in shapes if math.prod(map(int, shape.split("x"))) > above]
