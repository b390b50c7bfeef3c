"""Preference rows from files, in the layouts that such sets are published in; mixtures of sets; how rows are divided.

jsonl        {"prompt", "chosen", "rejected"}: our own fields, texts as they are; a prompt that ends with a blank line
             is a dialogue as `split_dialogue` gives it
hh_rlhf      Anthropic's dialogues
summarize    OpenAI's comparisons of summaries
tldr         summaries of Reddit posts by a model and by the author, judged
columns      columns of other names; chat messages

Every reader returns (rows, counts). `counts` says how many rows were dropped, by cause; a row is never dropped without
being counted, and what cannot be read is a DataError that names file, line and field. Rows that are too long for the
windows are dropped later, by `encode.drop_over_length`.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from pit_jax.config import DataConfig
from pit_jax.data import layouts
from pit_jax.data.layouts import (
    EMPTY_ANSWER,
    EMPTY_PROMPT,
    NOT_A_DIALOGUE,
    PROMPTS_DIFFER,
    SAME_ANSWERS,
    split_dialogue as split_dialogue,
)
from pit_jax.data.row_files import (
    DataError as DataError,
    RawLine as RawLine,
    files_of,
    parse_object as parse_object,
    raw_lines as raw_lines,
    read_rows,
    string_field as string_field,
)
from pit_jax.types import PreferenceExample

Rows = list[PreferenceExample]
Counts = dict[str, int]


def read_jsonl(path: str | Path, *, drop_empty: bool = False, answers: bool = True) -> tuple[Rows, Counts]:
    """Rows {"prompt", "chosen", "rejected"[, "reflection"][, "requirements": [{"kind"[, "value"]}, ...]]}.

    Texts stay as they are, other fields are not looked at, and null is as good as no reflection and no requirements.
    Requirements are in all rows or in none. Pairs of equal answers teach no preference: they are dropped and counted.

    Args:
      path: a file or folder, see `row_files.read_rows`.
      drop_empty: drops and counts rows with an empty answer, which are otherwise an error.
      answers: False: rows may be prompts without chosen and rejected, all of them or none; both are then empty.

    Returns:
      (rows, number of dropped rows by cause).

    Raises:
      DataError: names file, line and field.
    """
    rows, counts = [], collections.Counter()
    for where, row in read_rows(path):
        bare = not answers and all(row.get(field, "") == "" for field in ("chosen", "rejected"))
        fields = ("prompt",) if bare else ("prompt", "chosen", "rejected")
        texts = {field: string_field(row, field, where) for field in fields}
        empty = [field for field, text in texts.items() if not text.strip()]
        if empty == ["prompt"] or (empty and not drop_empty):
            hint = "" if "prompt" in empty else "; --config.data.format=columns drops and counts such rows"
            raise DataError(f"{where}: field {empty[0]!r} is empty{hint}")
        layouts.check_names(row, where)
        example = PreferenceExample(
            **{"chosen": "", "rejected": ""} | texts,
            reflection="" if row.get("reflection") is None else string_field(row, "reflection", where),
            requirements=layouts.requirements(row, where),
        )
        if empty:
            counts[EMPTY_ANSWER] += 1
        elif example.chosen.strip() == example.rejected.strip() and not bare:
            counts[SAME_ANSWERS] += 1
        elif rows and bare != has_no_answers(rows[:1]):
            raise DataError(f"{where}: fields 'chosen' and 'rejected' must be in all rows or in none")
        elif rows and bool(example.requirements) != bool(rows[0].requirements):
            raise DataError(f"{where}: field 'requirements' must be in all rows or in none")
        else:
            rows.append(example)
    return _some(path, rows, counts)


DUPLICATE = "duplicate_row"
"""Prompt and both answers are those of an earlier row."""


def without_repeats(rows: Rows, counts: Counts, seen: set[tuple[str, ...]]) -> tuple[Rows, Counts]:
    """Each row once; prompts without answers stay, as there is nothing in them to be learnt twice.

    Args:
      rows, counts: of a reader.
      seen: what was read before; it grows.
    """
    kept = []
    for row in rows:
        texts = tuple(text.strip() for text in (row.prompt, row.chosen, row.rejected))
        if texts not in seen or not row.chosen:
            kept.append(row)
        seen.add(texts)
    return kept, counts | ({DUPLICATE: len(rows) - len(kept)} if len(kept) < len(rows) else {})


def has_no_answers(rows: Sequence[PreferenceExample]) -> bool:
    """Whether rows are prompts alone."""
    return bool(rows) and not rows[0].chosen


def read_hh_rlhf(path: str | Path) -> tuple[Rows, Counts]:
    """Rows {"chosen": dialogue, "rejected": dialogue} of HH-RLHF, whose turns open with Human: and Assistant:.

    The published files hold pairs without use, which are dropped and counted: `prompts_differ`, `empty_answer`,
    `same_answers`, `not_a_dialogue`.

    Args:
      path: as for `read_jsonl`.

    Returns:
      (rows, number of dropped rows by cause).

    Raises:
      DataError: names file, line and field.
    """
    rows, counts = [], collections.Counter()
    for where, row in read_rows(path):
        chosen, rejected = (split_dialogue(string_field(row, field, where)) for field in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            counts[NOT_A_DIALOGUE] += 1
        elif chosen[0] != rejected[0]:
            counts[PROMPTS_DIFFER] += 1
        elif not chosen[1] or not rejected[1]:
            counts[EMPTY_ANSWER] += 1
        elif chosen[1] == rejected[1]:
            counts[SAME_ANSWERS] += 1
        else:
            rows.append(PreferenceExample(prompt=chosen[0], chosen=chosen[1], rejected=rejected[1]))
    return _some(path, rows, counts)


def _some(path: str | Path, rows: Rows, counts: Counts) -> tuple[Rows, Counts]:
    if not rows:
        hint = "; for rows of prompt, chosen, rejected: --config.data.format=jsonl" if counts[NOT_A_DIALOGUE] else ""
        if counts[NOT_A_DIALOGUE] or counts[EMPTY_PROMPT] or counts[PROMPTS_DIFFER]:
            hint += "; another column of prompts is named by --config.data.columns=prompt:NAME"
        raise DataError(f"{path}: no row is left; all were dropped: {dict(counts)}{hint}")
    return rows, dict(counts)


def _read(path: str | Path, convert: Callable[..., PreferenceExample | str], **keywords) -> tuple[Rows, Counts]:
    """Rows by a function of `layouts`; `columns` gets what it sees of each file as a whole, and keywords."""
    rows, counts = [], collections.Counter()
    for file in files_of(path):
        if convert is layouts.columns:
            keywords["seen"] = layouts.look_at(read_rows(file), keywords["names"])
        for where, row in read_rows(file):
            found = convert(row, where, **keywords)
            if isinstance(found, str):
                counts[found] += 1
            elif rows and has_no_answers([found]) != has_no_answers(rows[:1]):
                raise DataError(f"{where}: answers must be in all rows or in none")
            elif rows and bool(found.requirements) != bool(rows[0].requirements):
                raise DataError(f"{where}: field 'requirements' must be in all rows or in none")
            else:
                rows.append(found)
    return _some(path, rows, counts)


FORMATS = ("jsonl", "hh_rlhf", "summarize", "tldr", "columns")


def detect_format(path: str | Path, *, answers: bool = True) -> str:
    """One of FORMATS, from the first row: HH-RLHF rows have both answers and no prompt.

    Rows of prompt, chosen, rejected are jsonl only where that loses nothing: not where one of the first hundred has a
    system text or an input beside the prompt, or a prompt or an answer written as a dialogue of HH-RLHF.

    Args:
      path: a file or folder.
      answers: False: prompts alone will do.
    """
    first = list(itertools.islice(read_rows(path), 100))
    where, row = first[0]
    text = lambda *fields: not any(isinstance(row.get(field), list | dict) for field in fields)  # noqa: E731
    if {"info", "summaries", "choice"} <= row.keys():
        return "summarize"
    if {"query", "postprocessed_response", "reference_responses", "preferred"} <= row.keys():
        return "tldr"
    both = {"chosen", "rejected"} <= row.keys()
    if "prompt" in row and text("prompt", "chosen", "rejected") and (both or not layouts.is_pair(row)):
        more = {*layouts.COLUMNS["system"], *layouts.COLUMNS["context"]}  # of which jsonl knows nothing
        texts = (fields.get(name) for _, fields in first for name in ("prompt", "chosen"))
        dialogues = (isinstance(value, str) and layouts.dialogue_prompt(value) is not None for value in texts)
        return "columns" if any(dialogues) or any(more & fields.keys() for _, fields in first) else "jsonl"
    if both and text("chosen", "rejected"):
        return "columns" if any(name in row for name in layouts.COLUMNS["prompt"]) else "hh_rlhf"
    if layouts.is_pair(row) or (
        not answers and any(row.get(name) for name in (*layouts.COLUMNS["prompt"], "messages"))
    ):
        return "columns"
    raise DataError(
        f"{where}: neither the fields 'prompt', 'chosen', 'rejected' (jsonl) nor 'chosen', 'rejected' (hh_rlhf), and "
        f"{layouts.NO_PAIR}; the row has {sorted(row)}"
    )


def read(
    path: str | Path,
    format: str = "auto",
    *,
    answers: bool = True,
    columns: Mapping[str, str] | None = None,
    seen: set[tuple[str, ...]] | None = None,
) -> tuple[Rows, Counts]:
    """Reads preference rows, each once: what comes again is dropped and counted.

    Args:
      path: a file, or a folder whose files (also in subfolders) are read in the order of their names; .gz and .xz are
        decompressed. JSON lines, .json, .parquet: see `row_files.read_rows`.
      format: one of FORMATS, or auto, which looks at the first row.
      answers: False: prompts alone will do, see `read_jsonl` and `layouts.columns`.
      columns: names of columns, see `layouts.columns`; for format columns, and makes auto that.
      seen: rows of other files, as for `without_repeats`.

    Returns:
      (rows, number of dropped rows by cause).

    Raises:
      DataError: names file, line and field.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(f"format is {format!r}: use auto, {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if format == "auto":
        format = "columns" if columns else detect_format(path, answers=answers)
    if columns and format != "columns":
        raise DataError(f"{path}: config.data.columns is for format columns, but the format is {format}")
    if format == "jsonl":
        found = read_jsonl(path, answers=answers)
    elif format == "hh_rlhf":
        found = read_hh_rlhf(path)
    elif format == "columns":
        found = _read(path, layouts.columns, names=columns or {}, answers=answers)
    else:
        found = _read(path, {"summarize": layouts.summarize, "tldr": layouts.tldr}[format])
    return without_repeats(*found, set() if seen is None else seen)


def column_names(columns: Sequence[str]) -> dict[str, str]:
    """config.data.columns, "prompt:instruction", "chosen:good", .. as {"prompt": "instruction", "chosen": "good"}.

    Raises:
      DataError: for what is no such thing.
    """
    found: dict[str, str] = {}
    for text in columns:
        role, colon, name = (part.strip() for part in text.partition(":"))
        if not colon or not name or role not in layouts.COLUMNS or role in found:
            raise DataError(
                f"config.data.columns has {text!r}: use ROLE:COLUMN, each role once, of {', '.join(layouts.COLUMNS)}"
            )
        found[role] = name
    return found


# ------------------------------------------------------------------------------------------------------------- mixtures


class Part(NamedTuple):
    """A part of a mixture: which share of the rows comes from where."""

    path: str
    format: str
    weight: Fraction


def mixture_parts(mixture: Sequence[str]) -> list[Part]:
    """config.data.mixture: [FORMAT@]PATH[:WEIGHT], format auto and weight 1 where they are left out.

    Raises:
      DataError: for what is no such thing, for a path that is named twice, and for one within another.
    """
    parts: list[Part] = []
    for text in mixture:
        head, colon, tail = text.rpartition(":")
        named, at, _ = text.partition("@")
        number = re.fullmatch(r"\d+(\.\d+)?", tail)
        path, weight = (head, Fraction(tail)) if colon and number else (text, Fraction(1))
        format = "auto"
        if at and named in FORMATS:
            format, path = named, path.removeprefix(f"{named}@")
        if not path or not weight:
            raise DataError(f"config.data.mixture has {text!r}: use [FORMAT@]PATH[:WEIGHT], the weight above 0")
        for other in (part.path for part in parts):
            one, two = Path(path).resolve(), Path(other).resolve()
            if one == two:
                raise DataError(f"config.data.mixture names {path} twice: give it one weight")
            if one in two.parents or two in one.parents:
                raise DataError(f"config.data.mixture names {other} and {path}, one of which is in the other")
        parts.append(Part(path, format, weight))
    return parts


def quotas(sizes: Sequence[int], weights: Sequence[Fraction], num_rows: int = 0) -> list[int]:
    """How many rows of each part a mixture takes.

    Args:
      sizes: rows that there are.
      weights: relative shares.
      num_rows: of all parts together, dealt by largest remainders; 0: as many as there can be, that is s * weight of
        each part, rounded down, with the largest s for which no part is exceeded.

    Raises:
      DataError: where a part has too few rows, or would give none.
    """
    scale = min(Fraction(size) / weight for size, weight in zip(sizes, weights, strict=True))
    exact = [scale * weight for weight in weights]
    if num_rows:
        exact = [num_rows * weight / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    if num_rows:
        by_remainder = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])  # stable: the first of equals
        for i in by_remainder[: num_rows - sum(found)]:
            found[i] += 1
    for i, (number, size) in enumerate(zip(found, sizes, strict=True), 1):
        if number > size:
            raise DataError(
                f"config.data.num_rows={num_rows} takes {number} rows of part {i}, which has {size}: at most "
                f"{sum(quotas(sizes, weights))} rows can be had by these weights"
            )
        if not number:
            raise DataError(
                f"config.data.mixture: part {i} has so small a weight that none of its {size} rows is taken"
            )
    return found


def sampled(rows: Sequence[PreferenceExample], num_rows: int, seed: int) -> Rows:
    """Rows without replacement, in their order: those whose texts have the smallest hashes.

    So neither the order of the rows nor the file that they came from plays a part, and fewer rows are some of more.
    """

    def key(i: int) -> bytes:
        texts = "\0".join((rows[i].prompt, rows[i].chosen, rows[i].rejected))
        return hashlib.sha256(f"rows {seed} {texts}".encode("utf-8", "surrogatepass")).digest()

    chosen = sorted(range(len(rows)), key=key)[:num_rows]
    return [rows[i] for i in sorted(chosen)]


def read_config(config: DataConfig, seed: int, *, answers: bool = True) -> tuple[Rows, Counts, list[dict[str, Any]]]:
    """The rows of config.data with source file: of its path, or of the parts of its mixture one after the other.

    In a mixture in which some prompts end with a blank line, as dialogues do, all others get one too: a model learns
    one form.

    Args:
      config: of the data.
      seed: of the hash by which rows are taken where not all are.
      answers: False: prompts alone will do.

    Returns:
      (rows, number of dropped rows by cause, and of each file or folder: path, format, weight, rows that were read,
      rows that were dropped by cause, and rows that were taken of the others).

    Raises:
      DataError: where something cannot be read, or the parts do not go together.
    """
    listed = lambda text: [part.strip() for part in text.split(",") if part.strip()]  # noqa: E731
    names = column_names(listed(config.columns))
    parts = mixture_parts(listed(config.mixture)) or [Part(config.path, config.format, Fraction(1))]
    if names and config.mixture and not any(part.format == "columns" for part in parts):
        raise DataError("config.data.columns is for the parts of config.data.mixture that are named columns@PATH")
    found, report, seen = [], [], set()
    for part in parts:
        columns = names if not config.mixture or part.format == "columns" else {}
        format = part.format
        if format == "auto":
            format = "columns" if columns else detect_format(part.path, answers=answers)
        rows, dropped = read(part.path, format, answers=answers, columns=columns, seen=seen)
        if not rows:
            raise DataError(f"{part.path}: all rows are those of other parts of config.data.mixture")
        found.append(rows)
        report.append({"path": str(part.path), "format": format, "weight": float(part.weight), "dropped": dropped})
        report[-1]["read"] = len(rows) + sum(dropped.values())
    for name, has in (("answers", lambda row: bool(row.chosen)), ("requirements", lambda row: bool(row.requirements))):
        if len({has(rows[0]) for rows in found}) > 1:
            raise DataError(f"config.data.mixture: {name} must be in all parts or in none")
    if config.mixture or config.num_rows:
        numbers = quotas([len(rows) for rows in found], [part.weight for part in parts], config.num_rows)
        found = [sampled(rows, number, seed) for rows, number in zip(found, numbers, strict=True)]
    for line, rows in zip(report, found, strict=True):
        line["taken"] = len(rows)
    everything = [row for rows in found for row in rows]
    if config.mixture and any(row.prompt.endswith("\n\n") for row in everything):
        ended = lambda x: x if x.endswith("\n\n") else layouts.one_turn(x.rstrip("\n")) + "\n\n"  # noqa: E731
        everything = [dataclasses.replace(row, prompt=ended(row.prompt)) for row in everything]
    counts = collections.Counter()
    for line in report:
        counts.update(line["dropped"])
    return everything, dict(counts), report


# ------------------------------------------------------------------------------------------------------------- division


_ASSISTANT = re.compile(r"\n\nAssistant:(?=\s|$)")
SYSTEM_TEXT = 10
"""What so many different texts follow is taken for a system text, or an instruction, and not for the question."""
_HEAD = 8  # paragraphs that a system text has at most


def _first_turn(prompt: str) -> str:
    return _ASSISTANT.split(prompt, maxsplit=1)[0].strip()


def prompt_keys(prompts: Sequence[str]) -> list[str]:
    """What two prompts that ask the same have in common, for each.

    It is the words of the first turn in lower case: without marks and spaces, a leading "Human:", and the paragraphs at
    its beginning that stand before at least SYSTEM_TEXT different texts. A dialogue and the same dialogue one turn
    later are two prompts, of which one is most of the other.
    """
    paragraphs = {}  # first turn -> the words of each paragraph
    for turn in map(_first_turn, prompts):
        if turn not in paragraphs:
            texts = re.sub(r"Human:\s", "", turn, count=1) if turn.startswith("Human:") else turn
            words = (" ".join(re.findall(r"\w+", text)) for text in texts.casefold().split("\n\n"))
            paragraphs[turn] = [text for text in words if text] or [turn]
    cuts = lambda texts: range(min(len(texts) - 1, _HEAD), 0, -1)  # noqa: E731
    hashed = lambda texts: hash(" ".join(texts))  # noqa: E731
    followers = collections.defaultdict(set)
    for texts in paragraphs.values():
        for k in cuts(texts):
            followers[hashed(texts[:k])].add(hashed(texts[k:]))
    shared = {head for head, texts in followers.items() if len(texts) >= SYSTEM_TEXT}
    keys = {}
    for turn, texts in paragraphs.items():
        start = next((k for k in cuts(texts) if hashed(texts[:k]) in shared), 0)
        keys[turn] = " ".join(texts[start:])
    return [keys[_first_turn(prompt)] for prompt in prompts]


def _prompt_groups(rows: Sequence[PreferenceExample], seed: int, purpose: str) -> list[list[int]]:
    """Row numbers by `prompt_keys`, in the order of a hash: order of rows and processes play no part."""
    groups, places = collections.defaultdict(list), {}

    @functools.cache
    def place(turn: str) -> bytes:
        return hashlib.sha256(f"{purpose} {seed} {turn}".encode("utf-8", "surrogatepass")).digest()

    for i, key in enumerate(prompt_keys([row.prompt for row in rows])):
        groups[key].append(i)
        here = place(_first_turn(rows[i].prompt))
        places[key] = min(places.get(key, here), here)
    return [groups[key] for key in sorted(groups, key=places.get)]


def folds(rows: Sequence[PreferenceExample], seed: int, num_parts: int = 3) -> list[Rows]:
    """Equal parts, by default for SFT, reward models and RL (PIT section 4.1), that share no prompt (`prompt_keys`).

    First turns are dealt in the order of a hash, the most frequent first, each to the smallest part, so sizes differ by
    at most one row where first turns do not repeat, and by at most the rows of one first turn otherwise. Within a part
    rows keep their order.
    """
    groups = sorted(_prompt_groups(rows, seed, "folds"), key=len, reverse=True)  # stable: hash order within a size
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for group in groups:
        min(parts, key=len).extend(group)
    if not all(parts):
        raise DataError(
            f"{len(groups)} different prompts cannot be dealt into {num_parts} parts; at least {num_parts} are needed"
        )
    return [[rows[i] for i in sorted(part)] for part in parts]


def split_off(
    rows: Sequence[PreferenceExample], num_selection: int, num_test: int, seed: int
) -> tuple[Rows, Rows, Rows]:
    """Takes rows to select checkpoints with and rows to test with; no two parts share a prompt (`prompt_keys`).

    Args:
      rows: all rows.
      num_selection, num_test: rows of the two parts. A part falls short only where prompts repeat so often that they
        do not add up to the number.
      seed: of the hash that prompts are ordered by.

    Returns:
      (training rows, selection rows, test rows), each in the order of `rows`.

    Raises:
      DataError: where nothing would be left for training, or no prompt's rows fit a part.
    """
    if min(num_selection, num_test) < 0:
        raise DataError(f"num_selection={num_selection} and num_test={num_test} must not be negative")
    if num_selection + num_test >= len(rows):
        raise DataError(
            f"num_selection={num_selection} and num_test={num_test} leave nothing of {len(rows)} rows for training: "
            "lower --config.data.num_selection and --config.data.num_test, or give more rows"
        )
    selection, test, training = [], [], []
    for group in _prompt_groups(rows, seed, "split"):
        if len(test) + len(group) <= num_test:
            test += group
        elif len(selection) + len(group) <= num_selection:
            selection += group
        else:
            training += group
    for name, part, number in (("selection", selection, num_selection), ("test", test, num_test)):
        if number and not part:
            raise DataError(f"no prompt repeats so seldom that its rows fit num_{name}={number}")
    return tuple([rows[i] for i in sorted(part)] for part in (training, selection, test))


TEST_PROMPT = "prompt_of_a_test_row"


def split_published(
    training: Rows, published: Rows, num_selection: int, num_test: int, seed: int
) -> tuple[Rows, Rows, Rows, Counts]:
    """`split_off` for a set that has test rows of its own: these alone are tested on, selection is of the others.

    Args:
      training, published: rows for training and for tests, as they were published.
      num_selection, num_test: rows of the two parts; of fewer test rows all are taken.
      seed: of the hash that prompts are ordered by.

    Returns:
      (training rows, selection rows, test rows, number of training rows that ask what a published test row does: they
      are dropped).

    Raises:
      DataError: where nothing would be left for training, or no prompt's rows fit a part.
    """
    keys = prompt_keys([row.prompt for row in (*training, *published)])
    asked = {*keys[len(training) :]}
    kept = [row for row, key in zip(training, keys, strict=False) if key not in asked]
    rest, selection, _ = split_off(kept, num_selection, 0, seed)
    test = published if len(published) <= num_test else split_off(published, 0, num_test, seed)[2]
    dropped = len(training) - len(kept)
    return rest, selection, list(test), {TEST_PROMPT: dropped} if dropped else {}
