"""What to change where a program does not fit, how large a micro-batch may be, which mesh is best: pure searches.

What a program takes is asked of a function that the caller gives (`pit_jax.planner` compiles), so each search asks as
seldom as it can: memory falls along the values of a lever, and grows by the row.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Values = dict[str, Any]
"""Field of the config -> value: {"srt.accumulation": 4, "mesh.model": 8}."""


class Lever(NamedTuple):
    """A field of the config, and values for it from the present one on, each of which takes less memory.

    Attributes:
      field: as in Values.
      values: the first is the present one.
      changes: what is learnt differently with another value; empty: nothing is.
    """

    field: str
    values: tuple
    changes: str = ""


def changed(config: Any, values: Values) -> Any:
    """A config (nested dataclasses) with other values."""
    for path, value in values.items():
        config = _with(config, path.split("."), value)
    return config


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})


def flags(values: Values) -> str:
    """What to type."""
    return " ".join(f"--config.{path}={value}" for path, value in values.items())


def divisors(number: int) -> list[int]:
    """The largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def levers(config: Any, settings: str, model: str, stage: str, data: int) -> list[Lever]:
    """What may be turned for a program, the most harmless first.

    Args:
      config: of a run.
      settings, model, stage: of the program.
      data: devices along the batch.
    """
    group, kind = _field(config, settings), stage.rpartition(": ")[2]
    has = lambda name: hasattr(group, name)  # noqa: E731
    found = []
    if kind in ("answers", "critiques"):
        rows = -(-group.batch_size // data)
        found.append(Lever(f"{settings}.batch_size", tuple(n * data for n in divisors(rows))))
    elif has("accumulation") and kind != "log-probs":
        rows = max(group.batch_size // (data * group.accumulation), 1)
        found.append(Lever(f"{settings}.accumulation", tuple(group.accumulation * rows // n for n in divisors(rows))))
    if kind == "update" or (has("accumulation") and kind != "log-probs"):
        for name in dict.fromkeys((model, "reward_model") if kind == "update" else (model,)):
            policies = ("none", "dots", "full")
            found.append(Lever(f"{name}.remat", policies[policies.index(_field(config, name).remat) :]))
    if has("chunk_size") and kind != "rollout":
        smaller = (size for size in (512, 128, 32) if not group.chunk_size or size < group.chunk_size)
        found.append(Lever(f"{settings}.chunk_size", (group.chunk_size, *smaller)))
    if has("rollout_size"):
        rows, pieces = max(group.rollout_size // (group.num_minibatches * data), 1), group.num_minibatches
        sizes = tuple(pieces * rows // n for n in divisors(rows))
        found.append(
            Lever(f"{settings}.num_minibatches", sizes, "more updates, of fewer rows")
            if kind == "update"
            else Lever(f"{settings}.rollout_size", tuple(n * pieces * data for n in divisors(rows)), "fewer answers")
        )
    return [lever for lever in found if len(lever.values) > 1]


def _field(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def mildest(values: Sequence, fits: Callable[[Any], bool]) -> Any:
    """The first of `values` that fits, by bisection: the last is known to fit, and all behind one that does."""
    if fits(values[0]):
        return values[0]
    low, high = 0, len(values) - 1  # the first does not fit, the last does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(values[middle]) else (middle, high)
    return values[high]


def turned(levers: Sequence[Lever], fits: Callable[[Values], bool]) -> Values | None:
    """What has to be changed: no lever further than it must be, and the later ones rather not; None: nothing will do.

    Args:
      levers: the most harmless first.
      fits: of these values.
    """
    values = {lever.field: lever.values[-1] for lever in levers}
    if not fits(values):
        return None
    for lever in reversed(levers):
        values[lever.field] = mildest(lever.values, lambda v, name=lever.field: fits(values | {name: v}))
    present = {lever.field: lever.values[0] for lever in levers}
    return {field: value for field, value in values.items() if value != present[field]}


def first_place(
    places: Iterable[Any], levers: Callable[[Any], Sequence[Lever]], fits: Callable[[Any, Values], bool]
) -> tuple[Any, Values] | None:
    """(place, what else has to be changed there) of the first place where a program can be made to fit.

    Args:
      places: a mesh, a slice: the best first.
      levers: of a place.
      fits: (place, values).
    """
    for place in places:
        found = turned(levers(place), lambda values, place=place: fits(place, values))
        if found is not None:
            return place, found
    return None


class RowsFound(NamedTuple):
    """The largest number of rows that fits, and what was asked: rows -> GiB, None where it was refused unsaid."""

    rows: int
    asked: dict[int, float | None]


def most_rows(gib: Callable[[int], tuple[bool, float | None]], limit: float, most: int = 4096) -> RowsFound:
    """The largest number of rows at a time that fits: one more does not, which is asked too.

    Lines through what was found say what to ask. Memory is not quite a line in the rows, so where these do not close
    in on it, halves do.

    Args:
      gib: rows -> (whether they fit, what they take, None where that is not known).
      limit: GiB that there are.
      most: rows, at most.
    """
    asked: dict[int, float | None] = {}
    known: dict[int, bool] = {}

    def fits(rows: int) -> bool:
        if rows not in known:
            known[rows], asked[rows] = gib(rows)
        return known[rows]

    if not fits(1):
        return RowsFound(0, asked)
    good, bad = 1, most + 1
    while bad - good > 1:
        line = _line_meets(asked, limit) if len(asked) < 6 else None
        guess = math.isqrt(good * bad) if line is None else line
        guess = 2 if good == 1 else min(max(guess, good + 1), bad - 1)
        good, bad = (guess, bad) if fits(guess) else (good, guess)
    return RowsFound(good, asked)


def _line_meets(asked: dict[int, float | None], limit: float) -> int | None:
    """The rows at which a line through the two largest known sizes meets the limit."""
    points = sorted((rows, gib) for rows, gib in asked.items() if gib is not None)[-2:]
    if len(points) < 2 or points[1][1] <= points[0][1]:
        return None
    (r0, g0), (r1, g1) = points
    return int(r0 + (limit - g0) * (r1 - r0) / (g1 - g0))


class Candidate(NamedTuple):
    """A mesh and a micro-batch.

    Attributes:
      data, model: axes of the mesh.
      rows: of a micro-batch on a device of the axis data.
      values: fields of the config that say so.
    """

    data: int
    model: int
    rows: int
    values: Values


def model_axes(config: Any, num_devices: int) -> list[int]:
    """Sizes of the mesh's axis `model` over which the models of a config can be cut: powers of two."""
    models = [getattr(config, name) for name in ("policy_model", "pit_model", "reward_model") if hasattr(config, name)]
    found, size = [], 1
    while size <= num_devices:
        data = num_devices // size
        cut = lambda m, size=size, data=data: not (m.num_kv_heads % size or m.mlp_dim % size or m.d_model % data)  # noqa: E731
        if num_devices % size == 0 and all(map(cut, models)):
            found.append(size)
        size *= 2
    return found


def candidates(config: Any, settings: str, num_devices: int) -> list[Candidate]:
    """Meshes and micro-batches of a program that give the batch of its settings; per mesh the smallest first."""
    group, found = _field(config, settings), []
    size = "rollout_size" if hasattr(group, "rollout_size") else "batch_size"
    total = getattr(group, size)
    for model in model_axes(config, num_devices):
        data = num_devices // model
        mesh = {"mesh.data": data, "mesh.model": model}
        if hasattr(group, "accumulation"):
            accumulation = f"{settings}.accumulation"
            rows = reversed(divisors(total // data)) if total % data == 0 else ()
            found += [Candidate(data, model, n, mesh | {accumulation: total // (data * n)}) for n in rows]
        else:  # PPO's minibatches and the batches of sampling stay what they are
            pieces = getattr(group, "num_minibatches", 1)
            rows = -(-total // (data * pieces))
            if pieces == 1 or total % (data * pieces) == 0:
                found.append(Candidate(data, model, rows, mesh))
    return found


def search(found: Sequence[Candidate], measure: Callable[[Candidate], dict]) -> list[tuple[Candidate, dict]]:
    """Every candidate with what it takes, the fastest per token first and those that do not fit last.

    Of a mesh on which some rows do not fit, more are not asked about.

    Args:
      found: per mesh, the smallest micro-batch first.
      measure: {"fits": ..., "seconds": ..., "tokens": ..., "peak_gib": ...} of a candidate.
    """
    rows, full = [], {}
    for one in found:
        mesh = one.data, one.model
        row = {"fits": False, "peak_gib": None, "said": f"{full[mesh]} rows do not fit"} if mesh in full else None
        row = measure(one) if row is None else row
        if not row["fits"]:
            full.setdefault(mesh, one.rows)
        rows.append((one, row))
    return sorted(rows, key=lambda pair: seconds_per_token(pair[1]))


def seconds_per_token(row: dict) -> float:
    """The bound of a program that fits; infinite for one that does not."""
    return row["seconds"] / row["tokens"] if row["fits"] and "seconds" in row else float("inf")
