"""Pairs of answers as batches for DPO: the prompt, and what both answers begin with, stands once."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pit_jax import sharding
from pit_jax.data import batches
from pit_jax.data.batches import Ids
from pit_jax.types import Array


class PairBatch(NamedTuple):
    """Chosen and rejected answers to a prompt: index 0 chosen, 1 rejected.

    The two rows x + y_w and x + y_l are one sequence as in `ScoreBatch`. An answer token is learnt where the token
    before it in its row stands; R counts the answer tokens of a pair, with EOS, those that both begin with once.

    Attributes:
      tokens: [B, T] int32, right-padded.
      positions: [B, T] int32, position of the token within its row.
      members: [B, T] int32, bit c is set where the token stands in row c; 0 on padding.
      sources: [B, R] int32, the slot of the token before the answer token in its row.
      targets: [B, R] int32, the answer token.
      target_members: [B, R] int32, bit c is set where the answer token stands in row c; 0 on padding.
      ref_log_probs: [B, 2] float32, sums over answer tokens under ref_policy.
    """

    tokens: Array
    positions: Array
    members: Array
    sources: Array
    targets: Array
    target_members: Array
    ref_log_probs: Array


Pair = tuple[Ids, Ids, Ids]
"""(prompt, chosen, rejected); the answers end with EOS, or whatever ends an answer."""


def pair_rows(pairs: Sequence[Pair], multiple: int = 8, length: int = 0, num_targets: int = 0) -> PairBatch:
    """Pairs laid out for DPO; `ref_log_probs` is NaN until it is filled in.

    Args:
      pairs: ids.
      multiple: T and R are padded to the next multiple of it behind the longest,
      length, num_targets: or to these.

    Returns:
      PairBatch of numpy arrays, one sequence per pair.
    """
    for i, (x, *answers) in enumerate(pairs):
        if not len(x):
            raise ValueError(f"pair {i} has an empty prompt: the first token of its answers would follow nothing")
        if not all(map(len, answers)):
            raise ValueError(f"pair {i} has an answer without ids: an empty answer is what ends it, EOS, alone")
    rows = batches.score_rows([[np.concatenate([x, y]) for y in answers] for x, *answers in pairs], multiple, length)

    before = np.zeros_like(rows.tokens)
    for c in range(2):
        # Slots of a row rise with its positions, so what stands before a token is the last of its own to the left. (Of
        # the first token of a row it is the end of another, but that one is in the prompt and no target.)
        i, slot = np.nonzero(rows.members >> c & 1)
        before[i[1:], slot[1:]] = slot[:-1]

    starts = np.asarray([len(x) for x, _, _ in pairs])
    i, slot = np.nonzero((rows.members > 0) & (rows.positions >= starts[:, None]))
    at = i, slot - starts[i]  # the prompt has the first slots, so those of the answers lie in one piece
    shape = len(pairs), num_targets or batches.round_up(int(at[1].max()) + 1, multiple)
    sources, targets, target_members = (np.zeros(shape, np.int32) for _ in range(3))
    sources[at], targets[at], target_members[at] = before[i, slot], rows.tokens[i, slot], rows.members[i, slot]
    ref_log_probs = np.full((len(pairs), 2), np.nan, np.float32)
    return PairBatch(rows.tokens, rows.positions, rows.members, sources, targets, target_members, ref_log_probs)


def pair_buckets(pairs: Sequence[Pair]) -> tuple[np.ndarray, dict[int, int]]:
    """Few compiled shapes: (padded length of each pair [N] int32, padded length -> R of a batch of that length)."""

    def sizes(some: list[Pair]) -> np.ndarray:
        data = pair_rows(some)
        return np.stack([np.sum(x > 0, axis=1, dtype=np.int32) for x in (data.members, data.target_members)], axis=1)

    slots, answers = batches.measured(pairs, sizes).T
    padded = batches.length_buckets(slots)
    # A batch may hold shorter pairs too, with longer answers to shorter prompts.
    return padded, {int(n): batches.round_up(int(answers[padded <= n].max())) for n in np.unique(padded)}


def make_pair_batch_at(
    pairs: Sequence[Pair], ref_log_probs: np.ndarray, batch_size: int, seed: int
) -> Callable[[int], PairBatch]:
    """`batch_at(step)` whose batches hold pairs of like length and are as long as it, so that little is padding.

    Args:
      pairs: ids.
      ref_log_probs: [len(pairs), 2] of `dpo.reference_log_probs`.
      batch_size, seed: of the batches.
    """
    padded, num_targets = pair_buckets(pairs)

    def batch_at(step: int) -> PairBatch:
        rows, length = batches.like_length_numbers(padded, batch_size, step, seed)

        def make(own: np.ndarray) -> PairBatch:
            data = pair_rows([pairs[i] for i in rows[own]], length=length, num_targets=num_targets[length])
            return data._replace(ref_log_probs=ref_log_probs[rows[own]])

        return sharding.make_batch(batch_size, make)

    return batch_at
