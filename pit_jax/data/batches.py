"""From rows of ids to batches: `batch_at(step)` is a pure function of (seed, step).

The data state of a run is its step number: nothing has to be saved to resume. Which rows a batch has is the same in all
processes; each encodes and lays out those that its own devices hold (`Rows`, `sharding.make_batch`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pit_jax import processes, sharding
from pit_jax.types import PromptBatch, ScoreBatch, TokenBatch

Ids = Sequence[int]
Turns = Sequence[Ids]
"""Read, learnt, read, learnt, ...: (prompt ids, response ids) and longer dialogues."""


class Rows(Sequence):
    """Rows of ids, encoded when they are first asked for.

    A process asks for those that it lays out and its share of those that are measured, and encodes no others.
    """

    def __init__(self, examples: Sequence, encode: Callable[[Any], Ids | tuple[Ids, ...]]):
        """Args: examples: what is encoded. encode: example -> ids, or a tuple of them: turns, a group, a pair."""
        self._examples, self._encode, self._found = examples, encode, {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> Ids | tuple[np.ndarray, ...]:
        if i not in self._found:
            row = self._encode(self._examples[i])
            # What stays for a whole stage does so as arrays: lists of it take ten times the memory.
            self._found[i] = tuple(np.asarray(ids, np.int32) for ids in row) if isinstance(row, tuple) else row
        return self._found[i]


MEASURED = 256
"""Rows that are laid out at a time to be measured."""


def measured(rows: Sequence, measure: Callable[[list], np.ndarray]) -> np.ndarray:
    """What `measure` says of each row, in shares.

    Args:
      rows: of ids.
      measure: n rows, at most MEASURED -> [n, ...] int32.
    """

    def share(numbers: np.ndarray) -> np.ndarray:
        starts = range(0, len(numbers), MEASURED)
        return np.concatenate([measure([rows[i] for i in numbers[start : start + MEASURED]]) for start in starts])

    return processes.in_shares(len(rows), share)


def token_rows(rows: Sequence[Turns], length: int, *, loss_on_prompt: bool = False) -> TokenBatch:
    """One row per sequence, right-padded to `length`.

    Args:
      rows: turns that are read and turns that are learnt, in alternation: (prompt ids, response ids with EOS), or more
        of them in a dialogue; together at most `length` tokens.
      length: T.
      loss_on_prompt: True trains on what is read as well (language modelling), except the first token.

    Returns:
      TokenBatch of numpy arrays [len(rows), T].
    """
    return packed_rows(rows, length, loss_on_prompt=loss_on_prompt, rows_per_sequence=1)


def packed_rows(
    rows: Sequence[Turns],
    length: int,
    *,
    loss_on_prompt: bool = False,
    rows_per_sequence: int | None = None,
    open_sequences: int = 64,
) -> TokenBatch:
    """As `token_rows`, with several rows per sequence: see `pack`.

    Rows of one sequence have segments 1, 2, ... and positions from 0, and do not see each other.
    """
    held = pack([num_tokens(turns) for turns in rows], length, rows_per_sequence, open_sequences)
    return lay_out([[rows[i] for i in numbers] for numbers in held], length, loss_on_prompt=loss_on_prompt)


def pack(
    sizes: Sequence[int], length: int, rows_per_sequence: int | None = None, open_sequences: int = 64
) -> list[list[int]]:
    """Row numbers of each sequence: first fit over the last `open_sequences` sequences.

    Args:
      sizes: tokens of each row.
      length: T.
      rows_per_sequence: at most.
      open_sequences: to which a row may still go.
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for i, size in enumerate(sizes):
        if size > length:
            raise ValueError(f"row {i} has {size} tokens, more than the sequence length {length}")
        for j in range(max(0, len(sequences) - open_sequences), len(sequences)):
            if room[j] >= size and (rows_per_sequence is None or len(sequences[j]) < rows_per_sequence):
                break
        else:
            j = len(sequences)
            sequences.append([])
            room.append(length)
        sequences[j].append(i)
        room[j] -= size
    return sequences


def lay_out(sequences: Sequence[Sequence[Turns]], length: int, *, loss_on_prompt: bool = False) -> TokenBatch:
    """Sequences of one or more rows, right-padded to `length`; see `token_rows` and `packed_rows`."""
    shape = (len(sequences), length)
    batch = TokenBatch(*(np.zeros(shape, np.int32) for _ in range(3)), np.zeros(shape, np.bool_))
    for j, rows in enumerate(sequences):
        end = 0
        for segment, turns in enumerate(rows, 1):
            start = end
            for turn, ids in enumerate(turns):
                at, end = end, end + len(ids)
                batch.tokens[j, at:end] = ids
                batch.loss_mask[j, at:end] = loss_on_prompt or turn % 2 == 1
            batch.segments[j, start:end] = segment
            batch.positions[j, start:end] = np.arange(end - start)
            batch.loss_mask[j, start] = False  # what stands before it in the sequence is another row
    return batch


def num_tokens(turns: Turns) -> int:
    """Length of a row."""
    return sum(map(len, turns))


def num_learnt(turns: Turns, loss_on_prompt: bool = False) -> int:
    """Tokens of a row that `lay_out` marks to be learnt."""
    sizes = [(len(ids), loss_on_prompt or turn % 2 == 1) for turn, ids in enumerate(turns) if len(ids)]
    return sum(size for size, is_learnt in sizes if is_learnt) - (bool(sizes) and sizes[0][1])


def row_sizes(rows: Sequence[Turns], loss_on_prompt: bool = False) -> np.ndarray:
    """(`num_tokens`, `num_learnt`) of each row, [N, 2] int32, `measured` in shares."""
    sizes = lambda some: [(num_tokens(turns), num_learnt(turns, loss_on_prompt)) for turns in some]  # noqa: E731
    return measured(rows, lambda some: np.asarray(sizes(some), np.int32))


def score_rows(groups: Sequence[Sequence[Ids]], multiple: int = 8, length: int = 0) -> ScoreBatch:
    """Groups of C rows for a reward model; what rows of a group begin alike with is laid out once.

    Args:
      groups: [groups][C] rows of ids; none is empty.
      multiple: sequences are padded to the next multiple of it behind the longest,
      length: or to this.

    Returns:
      ScoreBatch of numpy arrays, one sequence per group.
    """
    num_groups, C = len(groups), len(groups[0])
    if C > 31:
        raise ValueError(f"a group has {C} rows; at most 31 share a sequence")
    lengths = np.asarray([[len(ids) for ids in group] for group in groups], np.int32)
    depth = np.arange(lengths.max(), dtype=np.int32)
    rows = np.zeros((num_groups, C, len(depth)), np.int32)
    for i, group in enumerate(groups):
        for c, ids in enumerate(group):
            rows[i, c, : len(ids)] = ids

    # slots[:, c, t]: where token t of row c stands. It is that of the earlier row with the longest like beginning, as
    # far as that goes, and new slots behind all that are taken from there on.
    slots = np.zeros_like(rows)
    taken = np.zeros(num_groups, np.int32)
    for c in range(C):
        shared = np.zeros(num_groups, np.int32)
        for other in range(c):
            bound = np.minimum(lengths[:, c], lengths[:, other])[:, None]
            alike = np.logical_and.accumulate((rows[:, c] == rows[:, other]) & (depth < bound), axis=1)
            alike = np.sum(alike, axis=1, dtype=np.int32)
            longer = alike > shared
            slots[longer, c] = slots[longer, other]
            shared = np.maximum(shared, alike)
        new = taken[:, None] + depth - shared[:, None]
        slots[:, c] = np.where(depth < shared[:, None], slots[:, c], new)
        taken += lengths[:, c] - shared

    batch = _no_groups(num_groups, length or round_up(int(taken.max()), multiple), 1, C)
    for c in range(C):
        i, t = np.nonzero(depth < lengths[:, c, None])
        at = i, slots[i, c, t]
        batch.tokens[at], batch.segments[at], batch.positions[at] = rows[i, c, t], 1, t
        batch.members[at] |= 1 << c
        batch.last[:, 0, c] = slots[np.arange(num_groups), c, lengths[:, c] - 1]
    return batch


def _no_groups(num_sequences: int, length: int, num_groups: int, num_rows: int) -> ScoreBatch:
    shape = num_sequences, length
    return ScoreBatch(
        *(np.zeros(shape, np.int32) for _ in range(4)), np.zeros((num_sequences, num_groups, num_rows), np.int32)
    )


def lay_out_groups(
    sequences: Sequence[Sequence[Sequence[Ids]]], length: int, num_groups: int, num_rows: int
) -> ScoreBatch:
    """Sequences of any number of groups, one behind the other, as `score_rows` lays each of them out.

    Args:
      sequences: [sequences][up to num_groups][num_rows] rows of ids.
      length: T.
      num_groups: E.
      num_rows: C.

    Returns:
      ScoreBatch of numpy arrays.
    """
    batch = _no_groups(len(sequences), length, num_groups, num_rows)
    places = [(s, e) for s, groups in enumerate(sequences) for e in range(len(groups))]
    if not places:
        return batch
    alone = score_rows([sequences[s][e] for s, e in places])
    sizes, start = np.sum(alone.segments, axis=1), 0
    for i, (s, e) in enumerate(places):
        start = start if e else 0
        stop = start + sizes[i]
        for all, one in zip(batch[:4], alone[:4], strict=True):
            all[s, start:stop] = one[i, : sizes[i]]
        batch.segments[s, start:stop] = e + 1
        batch.last[s, e] = start + alone.last[i, 0]
        start = stop
    return batch


def group_sizes(groups: Sequence[Sequence[Ids]]) -> np.ndarray:
    """(tokens that `score_rows` lays out, rows) of each group, [N, 2] int32, `measured` in shares."""

    def sizes(some: list) -> np.ndarray:
        tokens = np.sum(score_rows(some).segments, axis=1, dtype=np.int32)
        return np.stack([tokens, np.full_like(tokens, len(some[0]))], axis=1)

    return measured(groups, sizes)


def prompt_rows(prompts: Sequence[Ids], length: int) -> PromptBatch:
    """Left-padded prompts: tokens [len(prompts), P], lengths [len(prompts)]."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for i, ids in enumerate(prompts):
        if len(ids) > length:
            raise ValueError(f"prompt {i} has {len(ids)} tokens, more than the window {length}")
        tokens[i, length - len(ids) :] = ids
    return PromptBatch(tokens, np.asarray([len(ids) for ids in prompts], np.int32))


def prompt_lengths(lengths: np.ndarray, window: int) -> np.ndarray:
    """The padded length of each prompt [N], of `lengths` [N] tokens up to `window`: quarters of the window.

    They do not depend on what prompts there are: each is a compiled shape of several programs. Of a short window there
    are fewer parts, of 128 tokens at least.
    """
    window = round_up(window)
    parts = min(max(window // 128, 1), 4)
    padded = np.asarray([round_up(-(-window * part // parts)) for part in range(1, parts + 1)], np.int32)
    return padded[np.minimum(np.searchsorted(padded, lengths), parts - 1)]


def longest_prompt_length(prompts: Sequence[Ids], window: int) -> int:
    """That of `prompt_lengths` to which all prompts of a batch are padded, the same in all processes."""
    if prompt_lengths(np.asarray(1), window) == round_up(window):
        return round_up(window)  # there is no other, and nothing to measure
    lengths = measured(prompts, lambda some: np.asarray([len(ids) for ids in some], np.int32))
    return int(prompt_lengths(lengths.max(), window))


def like_length_batches(padded: np.ndarray, batch_size: int) -> list[tuple[np.ndarray, int]]:
    """(row numbers [batch_size], length) of batches of all rows, from the shortest padded length [N] to the longest.

    The last batch repeats its last row; rows of one length keep their order.
    """
    order, found = np.argsort(padded, kind="stable"), []
    for start in range(0, len(order), batch_size):
        numbers = order[np.minimum(np.arange(start, start + batch_size), len(order) - 1)]
        found.append((numbers, int(padded[numbers].max())))
    return found


def row_numbers(num_rows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Which rows are the batch of `step`: a fresh permutation every epoch, batches that run across epoch ends.

    Every row comes once per epoch.
    """
    if num_rows < 1:
        raise ValueError("there are no rows to make a batch of")
    index = step * batch_size + np.arange(batch_size)
    epochs, offsets = index // num_rows, index % num_rows
    permutations = {e: np.random.default_rng([seed, int(e)]).permutation(num_rows) for e in np.unique(epochs)}
    return np.asarray([permutations[e][o] for e, o in zip(epochs, offsets, strict=True)])


def make_batch_at(make: Callable[[np.ndarray], Any], num_rows: int, batch_size: int, seed: int) -> Callable[[int], Any]:
    """`batch_at(step)`, put on the mesh, of what `make` gives for row numbers [n]: host arrays [n, ...]."""

    def batch_at(step: int):
        rows = row_numbers(num_rows, batch_size, step, seed)
        return sharding.make_batch(batch_size, lambda own: make(rows[own]))

    return batch_at


def length_buckets(lengths: np.ndarray, multiple: int = 8, smallest: float = 0.125) -> np.ndarray:
    """The padded length of each row, [N] int32: few distinct ones, as each is another compiled shape.

    Args:
      lengths: [N] int32 tokens of each row.
      multiple: of which padded lengths are.
      smallest: share of the rows that a bucket must hold; a smaller one goes into the next longer one.
    """
    padded = -(-np.asarray(lengths, np.int32) // multiple) * multiple
    bounds, count = [], 0
    for bound in np.unique(padded):
        count += np.sum(padded == bound)
        if count >= smallest * len(padded):
            bounds.append(bound)
            count = 0
    bounds = [*bounds, padded.max()] if count else bounds
    return np.asarray(bounds, np.int32)[np.searchsorted(bounds, padded)]


def like_length_numbers(padded: np.ndarray, batch_size: int, step: int, seed: int) -> tuple[np.ndarray, int]:
    """Which rows are the batch of `step`, and its padded length.

    An epoch is a fresh permutation: what is left of it over whole batches is not read in this epoch, the rest is sorted
    by padded length [N] and cut into batches, and the batches are shuffled. Fewer rows than a batch are repeated.
    """
    num_batches = max(len(padded) // batch_size, 1)
    rng = np.random.default_rng([seed, step // num_batches])
    rows = np.resize(rng.permutation(len(padded)), num_batches * batch_size)
    rows = rows[np.argsort(padded[rows], kind="stable")].reshape(num_batches, batch_size)
    rows = rows[rng.permutation(num_batches)[step % num_batches]]
    return rows, int(padded[rows].max())


def mixed_length_numbers(lengths: np.ndarray, batch_size: int, epoch: int, seed: int) -> np.ndarray:
    """Which rows are the batches of an epoch, [batches, batch_size]: all batches are about as long in sum.

    Of n batches each gets one of the n longest rows [N], one of the next n, and so on, in this order; which one, is
    drawn anew every epoch. What is left of a fresh permutation over whole batches is not read in this epoch. Fewer rows
    than a batch are repeated.
    """
    num_batches = max(len(lengths) // batch_size, 1)
    rng = np.random.default_rng([seed, epoch])
    rows = np.resize(rng.permutation(len(lengths)), num_batches * batch_size)
    rows = rows[np.argsort(-lengths[rows], kind="stable")].reshape(batch_size, num_batches)
    return rng.permuted(rows, axis=1).T


def make_packed_score_batch_at(
    groups: Sequence[Sequence[Ids]],
    sizes: np.ndarray,
    batch_size: int,
    seed: int,
    num_steps: int,
    length: int,
    multiple: int = 1,
) -> tuple[Callable[[int], ScoreBatch], float]:
    """`batch_at(step)` of `batch_size` groups each, packed into sequences of one length.

    Batches are about as long in sum, so there are two or three numbers of sequences, each another compiled shape. What
    batches need, and how many groups the fullest sequence holds, is known beforehand: it follows from the sizes, the
    seed and the number of steps.

    Args:
      groups: of rows of ids; those of more than `length` tokens are left out.
      sizes: their `group_sizes`.
      batch_size: groups.
      seed, num_steps: of the training.
      length: T.
      multiple: of which the number of sequences is.

    Returns:
      (batch_at, the share of its tokens that is padding).

    Raises:
      ValueError: where no group has so few tokens.
    """
    fitting = np.flatnonzero(sizes[:, 0] <= length)
    if not len(fitting):
        raise ValueError(f"all {len(sizes)} groups have more than {length} tokens: set sequence_length above that")
    lengths = sizes[fitting, 0]
    num_batches = max(len(fitting) // batch_size, 1)

    @functools.lru_cache(maxsize=1)
    def epoch(number: int) -> list[list[np.ndarray]]:
        """Numbers of the groups of each sequence of each batch."""
        batches = mixed_length_numbers(lengths, batch_size, number, seed)
        held = (pack(lengths[rows].tolist(), length, open_sequences=batch_size) for rows in batches)
        return [[fitting[rows[at]] for at in sequences] for rows, sequences in zip(batches, held, strict=True)]

    all_batches = [held for number in range(-(-num_steps // num_batches)) for held in epoch(number)]
    num_sequences = length_buckets(np.asarray([len(held) for held in all_batches]), multiple)
    num_groups = max(len(numbers) for held in all_batches for numbers in held)
    num_tokens = sum(int(sizes[numbers, 0].sum()) for held in all_batches for numbers in held)

    def batch_at(step: int) -> ScoreBatch:
        held = epoch(step // num_batches)[step % num_batches]

        def make(own: np.ndarray) -> ScoreBatch:
            sequences = [[groups[i] for i in held[n]] if n < len(held) else [] for n in own]
            return lay_out_groups(sequences, length, num_groups, int(sizes[0, 1]))

        return sharding.make_batch(int(num_sequences[step]), make)

    return batch_at, 1 - num_tokens / (int(num_sequences.sum()) * length)


def make_score_batch_at(
    groups: Sequence[Sequence[Ids]],
    sizes: np.ndarray,
    batch_size: int,
    seed: int,
    num_steps: int,
    steps_per_shape: int = 4,
) -> Callable[[int], ScoreBatch]:
    """`batch_at(step)` whose batches hold groups of like length and are as long as it, so that little is padding.

    `sizes` are the `group_sizes` of the groups.

    Each length is another compiled shape, so there is one for every `steps_per_shape` of the `num_steps` at most, and
    eight at most.
    """
    smallest = max(0.125, min(1.0, steps_per_shape / num_steps))
    padded = length_buckets(sizes[:, 0], smallest=smallest)

    def batch_at(step: int) -> ScoreBatch:
        rows, length = like_length_numbers(padded, batch_size, step, seed)
        make = lambda own: score_rows([groups[i] for i in rows[own]], length=length)  # noqa: E731
        return sharding.make_batch(batch_size, make)

    return batch_at


def round_up(n: int, multiple: int = 8) -> int:
    """The next multiple: lengths of compiled shapes."""
    return -(-n // multiple) * multiple
