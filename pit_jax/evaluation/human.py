"""Comparisons by people (PIT appendix I): a blind sheet to fill in, and what the filled-in sheets say.

sheet(pairs, seed, title)      one HTML file for the annotators; it works from the disk, without a network
key(pairs, seed, title)        which side of which item is what; it stays with us
read_verdicts(key, exports)    the files that annotators saved -> one row per annotator
agreed(annotations)            a win where two annotators agree
agreement(annotations)         how often they do
"""

import hashlib
import html
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pit_jax.evaluation import report
from pit_jax.evaluation.win_rate import Verdicts

INSTRUCTIONS = (
    "Each item shows a prompt and two answers to it. Say which answer is better: more helpful, correct, and in keeping "
    "with all that the prompt asks for. The order of the answers is random and says nothing about them; length by "
    "itself is no merit. Choose Tie where neither is better."
)

_SIDES = {"A": 1, "B": -1, "tie": 0}


class Pair(NamedTuple):
    """Two answers to one prompt; an outcome of 1 means that `first` wins."""

    prompt: str
    first: str
    second: str


class Annotations(NamedTuple):
    """What each of A annotators says of n pairs.

    Attributes:
      annotators: A names.
      outcome: [A, n] int8, as in `Verdicts`.
      mask: [A, n] bool, false where the annotator gave no verdict.
    """

    annotators: tuple[str, ...]
    outcome: np.ndarray
    mask: np.ndarray


def sheet(pairs: Sequence[Pair], seed: int, title: str, instructions: str = INSTRUCTIONS) -> str:
    """A blind sheet as one HTML file.

    Items are in random order, and the first answer is A in half of them, at random. Neither the file nor its id says
    which: whoever knows the seed and this code does, so keep the seed with the key.

    Args:
      pairs: n of them.
      seed: of the order of items and sides.
      title: shown above; it should name no system.
      instructions: shown to annotators; the paper gives them those of its GPT-4 judge.

    Raises:
      ValueError: where there are no pairs.
    """
    items, _ = _items(pairs, seed)
    template = Path(__file__).with_name("sheet.html").read_text("utf-8")
    parts = {
        "policy": report.policy(template),
        "title": html.escape(title),
        "instructions": html.escape(instructions),
        "data": report.script_json({"sheet": _sheet_id(items), "items": items}),
    }
    return report.fill(template, parts)


def key(pairs: Sequence[Pair], seed: int, title: str = "") -> dict:
    """What `read_verdicts` needs to know of `sheet(pairs, seed, ...)`, as plain JSON. It does not go to annotators.

    Returns:
      {"sheet": id, "title", "num_pairs": n, "items": {item id: {"pair": row in pairs, "first": "A" or "B"}}}.

    Raises:
      ValueError: where there are no pairs.
    """
    items, sides = _items(pairs, seed)
    return {"sheet": _sheet_id(items), "title": title, "num_pairs": len(pairs), "items": sides}


def read_verdicts(key: Mapping, exports: Mapping[str, Mapping]) -> Annotations:
    """The verdicts of all annotators, aligned with the pairs of the sheet.

    Args:
      key: of the sheet.
      exports: file name -> content of the file that an annotator saved. A name is only used in errors.

    Returns:
      One row per file, in their order. Items that a file lacks are masked.

    Raises:
      ValueError: where a file is of another sheet, is no export of a sheet, holds an item that the sheet lacks or an
        item twice, or two files are of the same annotator.
    """
    num_pairs, names = key["num_pairs"], []
    outcome = np.zeros((len(exports), num_pairs), np.int8)
    mask = np.zeros((len(exports), num_pairs), bool)
    owner: dict[str, str] = {}
    for row, (file, export) in enumerate(exports.items()):
        annotator, verdicts = _export(file, export, key["sheet"])
        same = unicodedata.normalize("NFKC", annotator).casefold()
        if same in owner:
            raise ValueError(f"{file} and {owner[same]} are both of the annotator {annotator!r}: keep the later file.")
        owner[same] = file
        names.append(annotator)
        for item, verdict in verdicts:
            if item not in key["items"]:
                raise ValueError(f"{file}: the sheet {key['sheet']} has no item {item!r}: take the key of its sheet.")
            if verdict not in _SIDES:
                raise ValueError(f"{file}: the verdict on {item} is {verdict!r}, and not one of A, B and tie.")
            place = key["items"][item]
            if mask[row, place["pair"]]:
                raise ValueError(f"{file}: {item} has two verdicts of {annotator!r}: leave the one that counts.")
            mask[row, place["pair"]] = True
            outcome[row, place["pair"]] = _SIDES[verdict] * (1 if place["first"] == "A" else -1)
    return Annotations(tuple(names), outcome, mask)


def same_annotator(first: Mapping, second: Mapping) -> bool:
    """Whether two saved files are of one person."""
    name = lambda export: unicodedata.normalize("NFKC", str(export.get("annotator"))).casefold()  # noqa: E731
    return name(first) == name(second)


def agreed(annotations: Annotations, num_annotators: int = 2) -> Verdicts:
    """A win only where all annotators of a pair agree, else a tie (appendix I).

    Args:
      annotations: of any number of annotators; each may have judged a part of the pairs.
      num_annotators: a pair with fewer verdicts has no verdict. One annotator alone cannot agree with anybody.
    """
    outcome, mask = annotations.outcome, annotations.mask
    enough = mask.sum(axis=0) >= num_annotators
    first_wins = np.all((outcome == 1) | ~mask, axis=0)
    second_wins = np.all((outcome == -1) | ~mask, axis=0)
    wins = first_wins.astype(np.int8) - second_wins.astype(np.int8)
    return Verdicts(np.where(enough, wins, 0).astype(np.int8), enough, np.ones(enough.shape, np.bool_))


def agreement(annotations: Annotations) -> list[dict]:
    """How often two annotators say the same of a pair, for each two that have judged some pairs both.

    Returns:
      [{"annotators": [a, b], "n": pairs that both judged, "agreement": share of the same verdict, "kappa": Cohen's,
      that is how much of the agreement beyond chance there is; None where both always say one and the same}].
    """
    found = []
    for a, b in itertools.combinations(range(len(annotations.annotators)), 2):
        both = annotations.mask[a] & annotations.mask[b]
        n = int(both.sum())
        if not n:
            continue
        x, y = annotations.outcome[a, both], annotations.outcome[b, both]
        same = float(np.mean(x == y))
        chance = float(sum(np.mean(x == verdict) * np.mean(y == verdict) for verdict in (-1, 0, 1)))
        names = [annotations.annotators[a], annotations.annotators[b]]
        kappa = None if chance == 1.0 else (same - chance) / (1 - chance)
        found.append({"annotators": names, "n": n, "agreement": same, "kappa": kappa})
    return found


def _items(pairs: Sequence[Pair], seed: int) -> tuple[list[dict], dict[str, dict]]:
    """What annotators see, in their order, and what they do not."""
    if not pairs:
        raise ValueError("there are no pairs: a sheet needs at least one.")
    rng = np.random.default_rng(seed)
    order, first_is_a = rng.permutation(len(pairs)), rng.permutation(len(pairs)) % 2 == 0
    items, sides = [], {}
    for i, (row, straight) in enumerate(zip(order.tolist(), first_is_a.tolist(), strict=True)):
        prompt, first, second = pairs[row]
        name = f"item-{i + 1}"
        a, b = (first, second) if straight else (second, first)
        items.append({"id": name, "prompt": prompt, "a": a, "b": b})
        sides[name] = {"pair": row, "first": "A" if straight else "B"}
    return items, sides


def _sheet_id(items: list[dict]) -> str:
    """Depends on nothing but what the sheet shows."""
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:12]


def _export(file: str, export: Mapping, sheet_id: str) -> tuple[str, list[tuple[str, str]]]:
    """Annotator and (item, verdict) of one file."""
    if not isinstance(export, Mapping) or not {"sheet", "annotator", "verdicts"} <= set(export):
        raise ValueError(f"{file} is not what a sheet saves: it lacks sheet, annotator or verdicts.")
    if export["sheet"] != sheet_id:
        raise ValueError(f"{file} is of the sheet {export['sheet']!r}, and the key of the sheet {sheet_id}.")
    annotator, verdicts = export["annotator"], export["verdicts"]
    if not isinstance(annotator, str) or not annotator.strip():
        raise ValueError(f"{file} does not name its annotator.")
    entries = verdicts if isinstance(verdicts, list) else [verdicts]
    for entry in entries:
        values = [entry.get(name) for name in ("item", "verdict")] if isinstance(entry, Mapping) else []
        if len(values) != 2 or not all(isinstance(value, str) for value in values):
            raise ValueError(f'{file}: {entry!r} is not {{"item": ..., "verdict": ...}}, both text.')
    return " ".join(annotator.split()), [(entry["item"], entry["verdict"]) for entry in entries]
