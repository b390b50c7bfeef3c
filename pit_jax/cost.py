"""What a program costs, read off before it runs: operations from its jaxpr, bytes and collectives from compiled HLO.

`compiled.cost_analysis()` counts the body of a loop once, and a decoder is a loop over its layers. Here a body counts
as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Operations


_RUNS = re.compile(r"\bkernel_runs_(\d+)")


def matmul_flops(jaxpr, while_trips: int = 1, runs: int = 0) -> float:
    """Operations of a program's matrix products on one device: 2 B M N K for [B, M, K] x [B, K, N].

    What is done again for the gradient (remat) counts again. A product is divided by the sizes of all mesh axes along
    which one of its operands lies; one whose operands lie on every device whole is done on every device whole.

    The body of a Pallas kernel counts as often as its grid has steps. A kernel that leaves some out stands in a
    `jax.named_scope` whose name is kernel_runs_N, and counts N times.

    Args:
      jaxpr: `jax.make_jaxpr(f)(...)`, or a traced jit's `.jaxpr`, on the explicit mesh that it is for.
      while_trips: how often the body of a loop runs whose end depends on data (tokens that are sampled).
      runs: N of the scope that it stands in; 0: none.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        scope = _RUNS.search(str(eqn.source_info.name_stack))
        here = int(scope[1]) if scope else runs
        inner = lambda j, here=here: matmul_flops(j, while_trips, here)  # noqa: E731
        if name == "dot_general":
            total += _dot_flops(eqn) / _num_shards(eqn.invars)
        elif name == "scan":
            total += params["length"] * inner(params["jaxpr"])
        elif name == "while":
            trips = _counted_to(params["cond_jaxpr"].jaxpr) or while_trips
            total += trips * (inner(params["body_jaxpr"]) + inner(params["cond_jaxpr"]))
        elif name == "cond":
            total += max(inner(branch) for branch in params["branches"])
        elif name == "pallas_call":
            total += (here or math.prod(params["grid_mapping"].grid)) * inner(params["jaxpr"])
        else:
            total += sum(inner(j) for value in params.values() for j in _jaxprs_in(value))
    return total


def _counted_to(condition) -> int:
    """n of a loop that ends where its counter, from 0 on, is no longer below it; 0 for another loop."""
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return 0
    counter, bound = condition.eqns[0].invars
    counts = counter.aval.dtype.kind == "i" and any(counter is x for x in condition.invars)
    return int(bound.val) if counts and hasattr(bound, "val") else 0  # a literal


def _jaxprs_in(value) -> Iterator:
    """Programs among the parameters of an operation (jit, remat, custom gradients)."""
    for one in value if isinstance(value, tuple | list) else (value,):
        if hasattr(getattr(one, "jaxpr", one), "eqns"):
            yield one


def _dot_flops(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    out, left = eqn.outvars[0].aval, eqn.invars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)


def _num_shards(operands) -> int:
    sizes: dict[str, int] = {}
    for operand in operands:
        sharding = getattr(operand.aval, "sharding", None)
        for entry in () if sharding is None else sharding.spec:
            axes = entry if isinstance(entry, tuple) else (entry,)
            sizes |= {axis: sharding.mesh.shape[axis] for axis in axes if axis is not None}
    return math.prod(sizes.values())


# Compiled HLO


class Op(NamedTuple):
    """One line of an HLO computation.

    Attributes:
      name, kind: %name = ... kind(...).
      type: of its result, as written: f32[2,3]{1,0}, or a tuple of such.
      arguments: what stands in the brackets: %names, or the value of a constant.
      attributes: what stands behind them.
      is_root: whether it is what its computation gives.
    """

    name: str
    kind: str
    type: str
    arguments: str
    attributes: str
    is_root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


Computations = dict[str, list[Op]]

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_KIND = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


def parse(text: str) -> tuple[Computations, str]:
    """(computations by name, name of the entry) of `compiled.as_text()`."""
    computations: Computations = {}
    entry, ops = "", []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            ops = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif found := _OP.match(line):
            rest = re.sub(r"/\*.*?\*/", "", found[3])
            end = _end_of_type(rest)
            if kind := _KIND.match(rest[end:]):
                arguments, attributes = _split_at_close(rest[end + kind.end() :])
                ops.append(Op(found[2], kind[1], rest[:end], arguments, attributes, bool(found[1])))
    return computations, entry


def _end_of_type(text: str) -> int:
    """Where the type of a result ends: the first space that stands in no bracket."""
    depth = 0
    for i, character in enumerate(text):
        depth += character in "([{"
        depth -= character in ")]}"
        if character == " " and depth == 0:
            return i
    return len(text)


def _split_at_close(text: str) -> tuple[str, str]:
    depth = 1
    for i, character in enumerate(text):
        depth += character == "("
        depth -= character == ")"
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def num_bytes(type_: str, in_memory: Callable[[str], bool] = lambda layout: True) -> int:
    """Bytes of all arrays of a type whose layout `in_memory` accepts."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_):
        if in_memory(layout or ""):
            digits = re.search(r"\d+", dtype)
            bits = _BITS.get(dtype, int(digits[0]) if digits else 32)
            total += math.prod(int(n) for n in shape.split(",") if n) * bits / 8
    return math.ceil(total)


def is_in_hbm(layout: str) -> bool:
    """Whether an array with this layout is in the main memory: S(n) names another one, on the chip."""
    return re.search(r"S\((?!5\))\d+\)", layout) is None


def trip_count(op: Op, computations: Computations, default: int) -> int:
    """How often the body of a while loop runs: the bound of its counter, or `default` where data decide."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', op.attributes):
        return int(known[1])
    condition = computations.get(_called(op, "condition"), [])
    values = {o.name: int(o.arguments) for o in condition if o.kind == "constant" and o.type.startswith("s32[]")}
    roots = [o for o in condition if o.is_root and o.kind == "compare" and "direction=LT" in o.attributes]
    return next((values[name] for o in roots for name in o.operands if name in values), default)


def _called(op: Op, field: str) -> str:
    found = re.search(rf"{field}=%?([\w.\-]+)", op.attributes)
    return found[1] if found else ""


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of a program.

    Attributes:
      kind: of COLLECTIVES.
      bytes: of the whole array that a group of devices gathers, adds up or exchanges: per device, all times together.
      count: how often it happens.
      group: devices that take part.
    """

    kind: str
    bytes: int
    count: int
    group: int

    @property
    def bytes_sent(self) -> float:
        """By a device, where they stand in a ring: (n - 1) / n of the array, twice for all-reduce."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


class Traffic(NamedTuple):
    """What one device moves: bytes to and from its main memory, and its collectives, largest first."""

    hbm_bytes: int
    collectives: list[Collective]


KERNELS = ("tpu_custom_call", "__cudnn$")
"""What targets of custom calls begin with that read and write the main memory; others are annotations."""

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "domain",
}  # fmt: skip


def traffic(text: str, while_trips: int = 1) -> Traffic:
    """Main memory and interconnect, read off `compiled.as_text()`.

    Every operation reads its operands and writes its result once, but for what the compiler keeps on the chip. Of an
    operand that a fusion only slices, the slices count; of a result that is an update in place, the update. Of branches
    all count.

    Args:
      text: of the compiled program.
      while_trips: as for `matmul_flops`.
    """
    computations, entry = parse(text)
    found: dict[tuple[str, int], list[int]] = {}
    total = 0

    def visit(name: str, times: int) -> None:
        nonlocal total
        types = {op.name: op.type for op in computations[name]}
        begun: set[str] = set()
        for op in computations[name]:
            if op.kind == "while":
                visit(_called(op, "body"), times * trip_count(op, computations, while_trips))
            elif op.kind == "conditional":
                for names in re.findall(r"(?:branch|true|false)_computations?=(\{[^}]*\}|[%\w.\-]+)", op.attributes):
                    for branch in re.findall(r"[\w.\-]+", names):
                        visit(branch, times)
            elif op.kind in ("call", "async-start"):
                visit(_called(op, "to_apply") or _called(op, "calls"), times)
            for kind, size, group, channel in _exchanges(op, types, computations):
                # One that goes on beside other work is in the fusions that begin it, go on with it and end it.
                is_new = not channel or channel not in begun
                begun.add(channel)
                if group > 1 and is_new:
                    entry_of = found.setdefault((kind, group), [0, 0])
                    entry_of[0] += times * size
                    entry_of[1] += times
            total += times * _hbm_bytes(op, types, computations)

    visit(entry, 1)
    collectives = [Collective(kind, size, count, group) for (kind, group), (size, count) in found.items()]
    return Traffic(total, sorted(collectives, key=lambda c: -c.bytes))


def _exchanges(op: Op, types: dict[str, str], computations: Computations) -> Iterator[tuple[str, int, int, str]]:
    """(kind, bytes of the whole array, devices of a group, channel of one in a fusion) of each collective of an
    operation."""
    kind = op.kind.removesuffix("-start")
    if op.kind == "fusion":
        name = _called(op, "calls")
        inside = computations.get(name, [])
        of_inside = {o.name: o.type for o in inside}
        for o in inside:
            if o.kind in COLLECTIVES:
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else o.kind
                size = max(num_bytes(o.type), sum(num_bytes(of_inside.get(x, "")) for x in o.operands))
                channel = re.search(r"channel_id=(\d+)", o.attributes)
                yield kind, size, _group(o), channel[1] if channel else ""
    elif kind in COLLECTIVES and not op.kind.endswith("-done"):
        read = sum(num_bytes(types.get(name, "")) for name in op.operands)
        written = num_bytes(op.type) - (read if op.kind.endswith("-start") and op.type.startswith("(") else 0)
        yield kind, max(read, written), _group(op), ""


def _group(op: Op) -> int:
    """Devices of a group of a collective, in any of the three ways in which HLO writes groups."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", op.attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", op.attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", op.attributes):
        return found[1].count(",") + 1
    return 2 if "source_target_pairs" in op.attributes else 1


def _hbm_bytes(op: Op, types: dict[str, str], computations: Computations) -> int:
    if op.kind in _FREE or op.kind.endswith("-done"):
        return 0
    if op.kind == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
        if not (target and target[1].startswith(KERNELS)):
            return 0
    in_hbm = lambda type_: num_bytes(type_, is_in_hbm)  # noqa: E731
    if op.kind in ("copy-start", "slice-start"):  # (source, result, flag), or the like: what is moved is the result
        moved = _ARRAY.findall(op.type)[1]
        size = num_bytes(f"{moved[0]}[{moved[1]}]")
        sides = [is_in_hbm(layout) for _, _, layout in _ARRAY.findall(op.type)[:2]]
        return size * sum(sides)
    if op.kind in ("dynamic-slice", "slice", "gather"):
        source = types.get(op.operands[0], "") if op.operands else ""
        return in_hbm(op.type) + (num_bytes(op.type) if in_hbm(source) else 0)
    if op.kind == "dynamic-update-slice":
        return 2 * in_hbm(types.get(op.operands[1], ""))
    if op.kind == "fusion":
        return _fusion_bytes(op, types, computations)
    return in_hbm(op.type) + sum(in_hbm(types.get(name, "")) for name in op.operands)


def _fusion_bytes(op: Op, types: dict[str, str], computations: Computations) -> int:
    inside = {o.name: o for o in computations.get(_called(op, "calls"), [])}

    def source(o: Op) -> Op:
        """What an operation passes on."""
        while o.kind in ("bitcast", "reshape", "copy") and o.operands and o.operands[0] in inside:
            o = inside[o.operands[0]]
        return o

    root = next((o for o in inside.values() if o.is_root), op)
    arrays = list(_ARRAY.finditer(op.type))
    results = [inside[name] for name in root.operands] if root.kind == "tuple" else [root] * len(arrays)
    total, updated = 0, set()
    passed: dict[int, int] = {}  # what a part of a collective hands on to the next part: result -> operand
    if any(o.kind in COLLECTIVES for o in inside.values()):
        found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.attributes)
        pairs = re.findall(r"\{(\d*)\}: \((\d+),", found[1]) if found else []
        passed = {int(result or 0): int(operand) for result, operand in pairs}
    for number, (array, result) in enumerate(zip(arrays, map(source, results), strict=False)):
        if number in passed:
            continue
        is_update = result.kind == "dynamic-update-slice"
        if is_update:
            updated.add(source(inside[result.operands[0]]).name)
        if is_in_hbm(array[3] or ""):
            total += num_bytes(inside[result.operands[1]].type if is_update else array[0])
    parameters = {int(o.arguments): o.name for o in inside.values() if o.kind == "parameter"}
    for i, name in enumerate(op.operands):
        size, parameter = num_bytes(types.get(name, ""), is_in_hbm), parameters.get(i, "")
        if parameter in updated or i in passed.values():
            size = 0
        elif size:
            size = min(size, _bytes_read(parameter, size, inside, computations))
        total += size
    return total


def _bytes_read(name: str, size: int, inside: dict[str, Op], computations: Computations) -> int:
    """Of an operand of `size` bytes: all of it, or where it is only sliced, here or in a fusion within, the slices."""
    total = 0
    for op in inside.values():
        if name not in op.operands:
            continue
        if op.kind in ("dynamic-slice", "slice", "gather"):
            total += num_bytes(op.type)
        elif op.kind == "bitcast":
            total += _bytes_read(op.name, size, inside, computations)
        elif op.kind == "fusion":
            within = {o.name: o for o in computations.get(_called(op, "calls"), [])}
            parameters = {int(o.arguments): o.name for o in within.values() if o.kind == "parameter"}
            for i, operand in enumerate(op.operands):
                if operand == name:
                    total += _bytes_read(parameters.get(i, ""), size, within, computations)
        else:
            return size
    return total
