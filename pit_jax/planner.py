"""What the programs of a config take on a slice of TPUs: memory, operations, bytes, seconds; and what would do."""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from pit_jax import cost, files, fitting, programs, sharding, slices
from pit_jax.fitting import Values
from pit_jax.pipelines import common
from pit_jax.slices import GIB, Chip, Place
from pit_jax.train_state import TrainState

# ----------------------------------------------------------------------------------------------------------- numbers


def bytes_per_device(tree) -> int:
    """Of arrays without values, on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += math.prod(shape) * size
    return total


def held(program: programs.Program) -> dict[str, int]:
    """Bytes per device of what a program is given: parameters (of all its models), optimizer, cache, batch.

    `others` are the models that lie beside it.
    """
    arguments = program.arguments
    states = [x for x in jax.tree.leaves(arguments, is_leaf=_is_state) if _is_state(x)]
    optimizer = sum(bytes_per_device(s.opt_state) for s in states)
    parameters = sum(bytes_per_device(s.params) for s in states)
    parameters += sum(bytes_per_device(a) for a in arguments if isinstance(a, dict))
    parts = {
        "parameters": parameters - bytes_per_device(program.shared),
        "optimizer": optimizer,
        "cache": bytes_per_device(program.cache),
        "batch": bytes_per_device(arguments) - parameters - optimizer,
        "others": bytes_per_device(program.beside),
    }
    return {name: size for name, size in parts.items() if size}


def least_bytes(program: programs.Program) -> int:
    """What a device holds whatever the compiler does: `held`, and the gradients."""
    return sum(held(program).values()) + bytes_per_device(program.gradients)


def fixed_bytes(program: programs.Program) -> int:
    """The same without what fewer rows make smaller: on twice the devices it is half as much."""
    return least_bytes(program) - bytes_per_device(program.cache)


def _is_state(x) -> bool:
    return isinstance(x, TrainState)


def links_of(mesh: jax.sharding.Mesh, place: Place) -> dict[int, int]:
    """Devices of a group, along an axis of the mesh or both -> links over which each sends at once.

    Two along an axis of the slice that the group fills and that is a ring; one along others: the chip at the end of a
    line has no more, and the paths of groups that lie between each other share theirs.
    """
    at, is_ring, found = place.coordinates, slices.rings(place.axes), {}
    for group in (mesh.devices[:, 0], mesh.devices[0], mesh.devices.ravel()):
        along = [len(set(places)) for places in zip(*map(at.get, group), strict=True)]
        links = sum(
            2 if ring and number == size else 1
            for number, size, ring in zip(along, place.axes, is_ring, strict=True)
            if number > 1
        )
        found[len(group)] = max(links, found.get(len(group), 1))
    return found


def collective_seconds(collective: cost.Collective, chip: Chip, links: dict[int, int]) -> float:
    """At best: over all `links_of` its group at once."""
    return collective.bytes_sent / (links.get(collective.group, 1) * chip.link_bandwidth)


def needed(error: Exception, given: float = 0.0) -> tuple[float | None, str]:
    """(GiB that a refused program needs, why), from the two ways in which the compiler says so.

    Args:
      error: of the compiler.
      given: GiB of arguments, which lie beside what it calls temporaries.
    """
    text = str(error)
    scale = {"G": 1.0, "M": 1 / 1024, "K": 1 / 1024**2}
    if found := re.search(r"Used ([\d.]+)([GMK]) of ([\d.]+)G hbm", text):
        gib = float(found[1]) * scale[found[2]]
        return gib, f"needs {gib:.2f} GiB of the {float(found[3]):.2f} of a chip"
    if found := re.search(r"HLO temporaries \(([\d.]+)([GMK])\) exceeds available HBM \(([\d.]+)G\)", text):
        gib = float(found[1]) * scale[found[2]]
        return (
            gib + given,
            f"its temporaries alone need {gib:.2f} GiB of the {float(found[3]):.2f} of a chip",
        )
    return None, first_line(error)


def first_line(error: Exception) -> str:
    """Of what a library says; its name, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program on its way to the compiler, which needs no Python any more."""

    program: programs.Program
    mesh: jax.sharding.Mesh
    jaxpr: Any
    stage: Any


def lowered(program: programs.Program) -> Lowered:
    """Traces a program; the mesh that it is for is set."""
    traced = program.function.trace(*program.arguments)
    return Lowered(program, jax.sharding.get_mesh(), traced.jaxpr, traced.lower())


def measure(made: Lowered, place: Place) -> dict[str, Any]:
    """Compiles a program; what it holds, moves and takes on one device.

    Returns:
      name, batch and length (rows of a call and tokens of a row), fits, peak_gib, said (why it does not fit), parts
      (GiB by what they are for), flops, model_flops (of all devices), bytes, collectives (None where jaxlib cannot read
      what the compiler has made, and then nothing of what follows), seconds (the largest of compute, memory and
      interconnect, of each phase of a program that samples; and their sum), mfu; and compile_seconds.
    """
    started = time.time()
    program, chip = made.program, place.chip
    parts = held(program)
    flops = lambda trips: cost.matmul_flops(made.jaxpr, while_trips=trips)  # noqa: E731
    row: dict[str, Any] = {
        "name": program.stage, "batch": program.batch, "length": program.length, "tokens": program.num_tokens,
        "flops": flops(program.while_trips), "model_flops": program.model_flops,
    }  # fmt: skip
    try:
        compiled = made.stage.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        given = (bytes_per_device(program.arguments) - bytes_per_device(program.shared)) / GIB
        peak, said = needed(error, given)
        beside = parts.get("others", 0) / GIB
        return row | {
            "fits": False, "peak_gib": peak and peak + beside, "said": said,
            "parts": {name: size / GIB for name, size in parts.items()}, "compile_seconds": time.time() - started,
        }  # fmt: skip
    memory = compiled.memory_analysis()
    # What a program is given and does not read, as a rollout the optimizers, is no argument of the compiled one.
    peak = max(memory.argument_size_in_bytes, bytes_per_device(program.arguments))
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    peak += parts.get("others", 0) - bytes_per_device(program.shared)
    parts["temporaries"] = peak - sum(parts.values())
    row |= {
        "fits": peak <= place.hbm_bytes,
        "peak_gib": peak / GIB,
        "parts": {name: size / GIB for name, size in parts.items()},
        "compile_seconds": time.time() - started,
    }
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # as of large programs for v5p and v6e, with collectives in parts
        said = str(error).strip().splitlines()[0]
        return row | {
            "bytes": None,
            "collectives": None,
            "said": f"times are not known: jaxlib cannot read it ({said})",
        }
    moved = cost.traffic(text, program.while_trips)
    row |= {"bytes": moved.hbm_bytes, "collectives": [dataclasses.asdict(c) for c in moved.collectives]}
    if chip is None:
        return row
    links = links_of(made.mesh, place)
    whole = seconds_of(row["flops"], moved, chip, links)
    bound = max(whole.values())
    if program.while_trips:
        rest = seconds_of(flops(0), cost.traffic(text, 0), chip, links)
        decode = {name: whole[name] - rest[name] for name in whole}
        row["phases"] = {"prefill": rest, f"decode of {program.while_trips} tokens": decode}
        bound = sum(max(phase.values()) for phase in row["phases"].values())
    return row | {
        "seconds": bound,
        "seconds_without_overlap": sum(whole.values()),
        "seconds_of": whole,
        "mfu": program.model_flops / (len(place.devices) * chip.flops * bound),
    }


def seconds_of(flops: float, moved: cost.Traffic, chip: Chip, links: dict[int, int]) -> dict[str, float]:
    """Computing, main memory and interconnect, each alone at its published rate."""
    return {
        "compute": flops / chip.flops,
        "memory": moved.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(collective_seconds(c, chip, links) for c in moved.collectives),
    }


# -------------------------------------------------------------------------------------------------------------- tables


def size(gib: float) -> str:
    """Of a column of GiB: small ones say that they are MiB."""
    return f"{gib:.2f}" if gib >= 0.005 or not gib else f"{1024 * gib:.3g} MiB"


def amount(gib: float) -> str:
    """The same with its unit."""
    return size(gib) if "M" in size(gib) else f"{size(gib)} GiB"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds."""
    return f"{seconds:.3f} s" if seconds >= 0.01 or not seconds else f"{1e3 * seconds:.3g} ms"


def head(hbm_bytes: float) -> str:
    """The line above those of `describe`."""
    limit = f"  of {hbm_bytes / GIB:.2f} per chip" if math.isfinite(hbm_bytes) else ""
    return f"{'program':<28}{'batch x tokens':>16}{'GiB':>11}{limit}"


def describe(row: dict[str, Any]) -> str:
    """Lines of the table."""
    parts = ", ".join(f"{name} {size(gib)}" for name, gib in row.get("parts", {}).items())
    peak = "" if row["peak_gib"] is None else size(row["peak_gib"])
    line = f"{row['name']:<28}{row['batch']:>8} x {row['length']:<5}{peak:>11}  "
    if "refused" in row:
        return f"{line}{row['refused']}"
    if not row["fits"]:
        return f"{line}does NOT fit ({'; '.join(filter(None, (row.get('said', ''), parts)))})"
    line += f"({parts})"
    if "mfu" not in row:
        return line + (f"\n{'':<28}{row['said']}" if "said" in row else "")
    three = lambda of: ", ".join(f"{name} {duration(seconds)}" for name, seconds in of.items())  # noqa: E731
    margin = f"\n{'':<28}"
    line += f"{margin}{duration(row['seconds'])} at best, MFU {row['mfu']:.0%} ({three(row['seconds_of'])};"
    line += f" one after the other {duration(row['seconds_without_overlap'])})"
    for name, of in row.get("phases", {}).items():
        line += f"{margin}{duration(max(of.values()))} {name} ({three(of)})"
    sent = ", ".join(f"{c['kind']} {amount(c['bytes'] / GIB)} over {c['group']}" for c in row["collectives"][:4])
    return line + (margin + sent if sent else "")


def together(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each stage of several programs: what it holds on a chip at most, with all its models."""
    stages = collections.defaultdict(list)
    for row in rows:
        stages[row["name"].partition(":")[0]].append(row)
    lines = []
    for stage, group in stages.items():
        known = [row for row in group if row["peak_gib"] is not None]
        if len(group) > 1 and known:
            top = max(known, key=lambda row: row["peak_gib"])
            models = sum(top["parts"].get(name, 0) for name in ("parameters", "others"))
            states = f"all its models {size(models)}, optimizers {size(top['parts'].get('optimizer', 0))}"
            lines.append(f"{stage + ' together':<44}{size(top['peak_gib']):>11}  in {top['name']} ({states})")
    return lines


# ------------------------------------------------------------------------------------------------------------ programs


def on_place(config: Any, place: Place) -> jax.sharding.Mesh:
    """The mesh of a config.

    Raises:
      ValueError: where it does not divide the devices, or the models not the mesh.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model, devices=place.devices)
    common.check_layout(config, dict(mesh.shape))
    return mesh


def makers_of(config: Any, mesh: jax.sharding.Mesh, stages: Sequence[str] | None) -> dict[str, Callable]:
    """`programs.programs` of some stages, all by default.

    Raises:
      ValueError: for a stage that there is not.
    """
    makers = programs.programs(config, mesh)
    if unknown := set(stages or ()) - set(makers):
        raise ValueError(f"--stages names {', '.join(sorted(unknown))}: use {', '.join(makers)}")
    return {stage: make for stage, make in makers.items() if not stages or stage in stages}


def made_programs(config: Any, place: Place, stages: Sequence[str] | None = None) -> list[programs.Program]:
    """The programs of some stages of a config, not traced yet."""
    mesh = on_place(config, place)
    with jax.set_mesh(mesh):
        return [program for make in makers_of(config, mesh, stages).values() for program in make()]


def measured(
    config: Any, place: Place, stages: Sequence[str] | None, say: Callable[[str], None], keep=lambda row: None
) -> list[dict]:
    """Rows of all programs, two of which are in the compiler at a time.

    Each is said, and given to `keep`, when it and those before it are known.
    """
    found = made_programs(config, place, stages)  # mistakes of the config come before minutes of compiling
    futures: list[concurrent.futures.Future] = []
    rows: list[dict] = []

    def wait(most: int) -> None:
        while len(running := [future for future in futures if not future.done()]) > most:
            concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        while len(rows) < len(futures) and futures[len(rows)].done():
            rows.append(futures[len(rows)].result())
            keep(rows[-1])
            say(describe(rows[-1]))

    with jax.set_mesh(on_place(config, place)), concurrent.futures.ThreadPoolExecutor(2) as pool:
        for program in found:
            wait(2)  # a third is traced meanwhile
            futures.append(pool.submit(measured_or_refused, lowered_or_refused(program), place))
        wait(0)
    return rows


def lowered_or_refused(program: programs.Program) -> Lowered | dict[str, Any]:
    """`lowered`, or the row of a program that cannot be traced."""
    try:
        return lowered(program)
    except Exception as error:  # whatever a library raises
        return uncompiled(program, error)


def measured_or_refused(made: Lowered | dict[str, Any], place: Place) -> dict[str, Any]:
    """`measure`, or the row of a program that cannot be compiled."""
    if isinstance(made, dict):
        return made
    try:
        return measure(made, place)
    except Exception as error:  # jaxlib has types of its own
        return uncompiled(made.program, error)


def uncompiled(program: programs.Program, error: Exception) -> dict[str, Any]:
    """The row of a program that cannot be traced or compiled: the others are of use without it."""
    row = {"name": program.stage, "batch": program.batch, "length": program.length, "fits": False, "peak_gib": None}
    return row | {"refused": f"does not compile: {first_line(error)}"}


def measured_alone(config: Any, place: Place, program: programs.Program) -> dict[str, Any]:
    """The row of one program of `made_programs`."""
    with jax.set_mesh(on_place(config, place)):
        made = lowered_or_refused(program)
    return measured_or_refused(made, place)


def why(row: dict[str, Any]) -> str:
    """Of a row that does not fit: of one that was not compiled, why not."""
    return row.get("refused") or f"does not fit ({row.get('said', 'with what lies beside it')})"


class Asker:
    """What one program takes with other values of the config and in other places; each is compiled once.

    Attributes:
      compiled: programs that went through the compiler so far.
    """

    def __init__(self, config: Any, name: str, say: Callable[[str], None], most: int = 24):
        """Args:
        config, name: of the program.
        say: prints a line.
        most: programs that are compiled; after that nothing more fits.
        """
        self.config, self.name, self.compiled = config, name, 0
        self._say, self._most, self._known = say, most, {}

    def __call__(self, place: Place, values: Values) -> dict:
        """A row of `measure`; of what cannot be, or cannot fit, without compiling it."""
        key = place.name, tuple(sorted(values.items()))
        if key not in self._known:
            row = self._known[key] = self._ask(place, values)
            peak = "" if row["peak_gib"] is None else f"{amount(row['peak_gib'])}, "
            tried = " ".join(filter(None, (place.name, fitting.flags(values))))
            self._say(f"  tried {tried}: {peak}{'fits' if row['fits'] else why(row)}")
        return self._known[key]

    def _ask(self, place: Place, values: Values) -> dict:
        refused = {"name": self.name, "fits": False, "peak_gib": None}
        try:
            config = fitting.changed(self.config, values)
            found = made_programs(config, place, [self.name.partition(":")[0]])
        except ValueError as error:
            return refused | {"refused": f"cannot be: {error}"}
        program = next(p for p in found if p.stage == self.name)
        least = least_bytes(program)
        if least > place.hbm_bytes:
            return refused | {"peak_gib": least / GIB, "said": "models, optimizer, gradients and cache alone"}
        if self.compiled >= self._most:
            return refused | {"refused": f"not asked, as {self._most} programs were compiled"}
        self.compiled += 1
        return measured_alone(config, place, program)


def meshes_of(config: Any, place: Place) -> list[Values]:
    """The config's own mesh first, then others over which its models can be cut: more along `model`, then less."""
    num, own = len(place.devices), config.mesh.model
    fixed = config.mesh.data not in (0, num // own)
    sizes = fitting.model_axes(config, num)
    others = [n for n in sizes if n > own] + [n for n in reversed(sizes) if n < own + fixed]
    return [{}, *({"mesh.data": num // n, "mesh.model": n} for n in others)]


def axes_of(config: Any, place: Place, values: Values) -> tuple[int, int]:
    """(data, model) with these values."""
    mesh = fitting.changed(config, values).mesh
    return mesh.data or max(len(place.devices) // mesh.model, 1), mesh.model


def remedy(config: Any, place: Place, name: str, say: Callable[[str], None]) -> dict | None:
    """What makes a program fit: other values, another mesh, a larger slice, whichever comes first.

    Returns:
      {topology, values, flags, changes (of what is learnt), row}, or None where nothing does that is known here.
    """
    program = next(p for p in made_programs(config, place, [name.partition(":")[0]]) if p.stage == name)
    ask = Asker(config, name, say)
    chips = len(place.devices)
    least = math.ceil(fixed_bytes(program) * chips / place.hbm_bytes) if place.chip else 0
    larger = slices.of_kind(slices.kind_of(place.name), max(chips, least - 1)) if place.chip else []
    here = [(place, mesh) for mesh in meshes_of(config, place)] if least <= chips else []
    elsewhere = ((other, mesh) for other in map(slices.place_of, larger) for mesh in meshes_of(config, other))

    def levers(where: tuple[Place, Values]) -> list[fitting.Lever]:
        data, _ = axes_of(config, *where)
        return fitting.levers(config, program.settings, program.model, name, data)

    fits = lambda where, values: ask(where[0], where[1] | values)["fits"]  # noqa: E731
    found = fitting.first_place(itertools.chain(here, elsewhere), levers, fits)
    if found is None:
        return None
    (where, mesh), values = found
    changes = "; ".join(lever.changes for lever in levers(found[0]) if lever.changes and lever.field in values)
    values = mesh | values
    row = ask(where, values)
    typed = fitting.flags(values)
    return {"topology": where.name, "values": values, "flags": typed, "changes": changes, "row": row}


def micro_batch(config: Any, place: Place, program: programs.Program, say: Callable[[str], None]) -> dict:
    """The largest number of rows at a time that fits, of each device of the axis data.

    Returns:
      {name, rows, batch (of all devices), gib}.
    """
    group, path = programs.field(config, program.settings), program.settings
    data, _ = axes_of(config, place, {})
    kind = program.stage.rpartition(": ")[2]

    def values(rows: int) -> Values:
        if hasattr(group, "rollout_size"):
            return {f"{path}.rollout_size": rows * data * group.num_minibatches, f"{path}.samples_per_prompt": 1}
        if not hasattr(group, "accumulation"):
            return {f"{path}.batch_size": rows * data}
        # A second piece brings the sum of gradients, which has a place of its own.
        pieces = 1 if kind == "log-probs" else min(group.accumulation, 2)
        return {f"{path}.batch_size": rows * data * pieces, f"{path}.accumulation": pieces}

    ask = Asker(config, program.stage, say)

    def gib(rows: int) -> tuple[bool, float | None]:
        row = ask(place, values(rows))
        return row["fits"], row["peak_gib"]

    rows = fitting.most_rows(gib, place.hbm_bytes / GIB).rows
    row = ask(place, values(rows)) if rows else {}
    return {"name": program.stage, "rows": rows, "batch": rows * data, "peak_gib": row.get("peak_gib")}


def search(config: Any, place: Place, program: programs.Program, say: Callable[[str], None]) -> list[dict]:
    """Rows of a program on all meshes and with all micro-batches, the fastest per token first."""
    ask = Asker(config, program.stage, say, most=64)
    candidates = fitting.candidates(config, program.settings, len(place.devices))
    found = fitting.search(candidates, lambda one: ask(place, one.values))
    return [
        row | {"data": c.data, "model": c.model, "rows": c.rows, "flags": fitting.flags(c.values)} for c, row in found
    ]


def describe_search(rows: Iterable[dict]) -> str:
    """The table of `search`."""
    lines = [f"{'data x model':<16}{'rows':>6}{'GiB':>11}{'us per token':>14}{'MFU':>6}"]
    for row in rows:
        peak = "" if row["peak_gib"] is None else size(row["peak_gib"])
        line = f"{row['data']:>5} x {row['model']:<8}{row['rows']:>6}{peak:>11}"
        if "mfu" in row:
            line += f"{1e6 * fitting.seconds_per_token(row):>14.3f}{row['mfu']:>6.0%}  {row['flags']}"
        else:
            line += f"  ({row.get('said', '')})" if row["fits"] else f"  {why(row)}"
        lines.append(line)
    return "\n".join(lines)


def smallest(
    config: Any, kind: str, stages: Sequence[str] | None = None, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The smallest usual slice on which all programs of a config fit, with what has to be changed for that.

    What cannot fit is ruled out by models, optimizers and gradients; the rest is compiled, that which holds most first.
    A program that does not fit gets more pieces, remat or smaller chunks, and then the others do too; what is learnt
    stays the same.

    Returns:
      As `plan`, with "values" and "flags" of what is changed.

    Raises:
      ValueError: where there is none.
    """
    for topology in slices.of_kind(kind):
        place = slices.place_of(topology)
        for mesh in meshes_of(config, place):
            found = _all_fit(config, place, mesh, stages, say)
            if found is None:
                continue
            values, rows = found
            shape, typed = dict(on_place(fitting.changed(config, values), place).shape), fitting.flags(values)
            say(
                f"the smallest slice is {topology}, {len(place.devices)} chips of {place.hbm_bytes / GIB:.2f} GiB; "
                f"mesh data={shape['data']} x model={shape['model']}, with {typed or 'the config as it is'}"
            )
            for line in (head(place.hbm_bytes), *map(describe, rows), *together(rows)):
                say(line)
            return {
                "config": config.name, "topology": topology, "chips": len(place.devices), "mesh": shape,
                "programs": rows, "values": values, "flags": typed,
            }  # fmt: skip
    raise ValueError(f"{config.name} fits on no slice of {kind} that is known here: {', '.join(slices.of_kind(kind))}")


def _all_fit(config: Any, place: Place, values: Values, stages, say) -> tuple[Values, list[dict]] | None:
    name = " ".join(filter(None, (place.name, fitting.flags(values))))
    try:
        found = made_programs(fitting.changed(config, values), place, stages)
    except ValueError as error:
        say(f"{name}: {error}")
        return None
    largest = max(found, key=fixed_bytes)
    if fixed_bytes(largest) > place.hbm_bytes:
        say(f"{name}: {largest.stage} has {fixed_bytes(largest) / GIB:.2f} GiB of models, optimizer, gradients alone")
        return None
    say(f"{name}: compiling")
    askers = {p.stage: Asker(config, p.stage, say) for p in found}
    data, _ = axes_of(config, place, values)

    def of(program: programs.Program, values: Values) -> dict:
        """Fields of other programs leave it as it is: it need not be compiled again for them."""
        own = (program.settings, program.model, "mesh", "reward_model")
        return askers[program.stage](
            place, {k: v for k, v in values.items() if k.startswith(tuple(f"{x}." for x in own))}
        )

    for program in sorted(found, key=least_bytes, reverse=True):
        if of(program, values)["fits"]:
            continue
        levers = fitting.levers(fitting.changed(config, values), program.settings, program.model, program.stage, data)
        levers = [lever for lever in levers if not lever.changes]
        turned = fitting.turned(levers, lambda more, p=program, now=values: of(p, now | more)["fits"])
        if turned is None:
            return None
        values = values | turned
    return values, [of(program, values) for program in found]


# ---------------------------------------------------------------------------------------------------------------- plan


def check_asked(smallest: bool, search: bool, micro_batch: bool, remedies: bool | None, json: str | None) -> None:
    """Before minutes of compiling.

    Args:
      smallest, search, micro_batch: whether a flag is given.
      remedies: None where it is not.
      json: the file to write, or None.

    Raises:
      ValueError: for what would be ignored, or could not be written.
    """
    instead = "--smallest" if smallest else "--search" if search else ""
    others = {"--search": smallest and search, "--micro_batch": micro_batch, "--remedies": remedies is not None}
    for name in [name for name, given in others.items() if instead and given]:
        raise ValueError(f"{instead} is another question than {name}: ask one at a time")
    if json and not files.is_remote(path := files.place(json)):
        if not path.parent.is_dir():
            raise ValueError(f"--json={path}: there is no folder {path.parent}; make it first")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"--json={path}: {'is a folder' if path.is_dir() else 'no file can be written there'}")


def plan(
    config: Any,
    topology: str,
    stages: Sequence[str] | None = None,
    *,
    with_remedies: bool = False,
    with_micro_batches: bool = False,
    with_search: bool = False,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Compiles the programs of a config's stages, and prints a line for each as it is known.

    Args:
      config: of a run.
      topology: as `place_of` takes it.
      stages: all by default.
      with_remedies: also looks for what makes those fit that do not.
      with_micro_batches: also the largest micro-batch of each.
      with_search: instead of all that, ranks meshes and micro-batches.
      say: prints a line.
      keep: is given what is known so far, whenever that is more.

    Raises:
      ValueError: for a topology or a stage that there is not, and a mesh that does not divide the devices.
    """
    place = slices.place_of(topology)
    if with_micro_batches and not math.isfinite(place.hbm_bytes):
        raise ValueError("--micro_batch: the devices of this machine do not say how much they hold: name a slice")
    found: dict[str, Any] = {"config": config.name, "topology": topology, "chips": len(place.devices)}
    if with_search:
        if place.chip is None:
            raise ValueError("--search ranks by what chips can do at best: name a slice, as --topology=v4-128")
        say(f"{config.name} on {topology}: {len(place.devices)} devices of {place.hbm_bytes / GIB:.2f} GiB")
        found |= {"programs": [], "search": {}}
        for program in _on_any_mesh(config, place, stages):
            rows = found["search"][program.stage] = search(config, place, program, say)
            keep(found)
            say(f"{program.stage}: {program.batch} x {program.length} tokens\n{describe_search(rows)}")
        return found
    shape = dict(on_place(config, place).shape)
    say(
        f"{config.name} on {topology}: {len(place.devices)} devices, mesh data={shape['data']} x model={shape['model']}"
    )
    say(head(place.hbm_bytes))
    found |= {"mesh": shape, "programs": []}

    def add(row: dict[str, Any]) -> None:
        found["programs"].append(row)
        keep(found)

    rows = measured(config, place, stages, say, add)
    for line in together(rows):
        say(line)
    misfits = [row["name"] for row in rows if not row["fits"] and "refused" not in row]
    if with_remedies and misfits:
        found["remedies"] = {}
        for name in misfits:
            say(f"what makes {name} fit:")
            made = found["remedies"][name] = remedy(config, place, name, say)
            keep(found)
            if made is None:
                say(f"{name}: nothing that was tried")
            else:
                typed = " ".join(filter(None, (f"--topology={made['topology']}", made["flags"])))
                learnt = f" (which changes what is learnt: {made['changes']})" if made["changes"] else ""
                say(f"{name} fits with {typed}{learnt}\n{describe(made['row'])}")
    if with_micro_batches:
        found["micro_batches"] = []
        for program in made_programs(config, place, stages):
            most = micro_batch(config, place, program, say)
            found["micro_batches"].append(most)
            keep(found)
            say(f"{most['name']}: {most['rows']} rows at a time on a device of the axis data, {most['batch']} on all")
    return found


def _on_any_mesh(config: Any, place: Place, stages: Sequence[str] | None) -> list[programs.Program]:
    """The programs, which have the same names on every mesh: the config's own need not be one that does."""
    error: ValueError | None = None
    for values in meshes_of(config, place):
        try:
            return made_programs(fitting.changed(config, values), place, stages)
        except ValueError as one:
            error = error or one
    raise error
