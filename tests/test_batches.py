"""Batches: exact rows by hand, and `batch_at` as a pure function of (seed, step)."""

import jax
import numpy as np
import pytest

from pit_jax import sharding
from pit_jax.data import batches
from pit_jax.types import PromptBatch


def test_token_rows_by_hand():
    batch = batches.token_rows([([1, 5], [6, 2]), ([1, 7, 8], [2])], 5)
    np.testing.assert_array_equal(batch.tokens, [[1, 5, 6, 2, 0], [1, 7, 8, 2, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 0]] * 2)
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 0]] * 2)
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.int32, np.bool_]
    dialogue = batches.token_rows([([1, 5], [6, 2], [7], [8, 2])], 8)
    np.testing.assert_array_equal(dialogue.tokens, [[1, 5, 6, 2, 7, 8, 2, 0]])
    np.testing.assert_array_equal(dialogue.segments, [[1] * 7 + [0]])
    np.testing.assert_array_equal(dialogue.loss_mask, [[0, 0, 1, 1, 0, 1, 1, 0]])
    whole = batches.token_rows([([1, 5], [6, 2])], 5, loss_on_prompt=True)
    np.testing.assert_array_equal(whole.loss_mask, [[0, 1, 1, 1, 0]])


def test_packed_rows_by_hand():
    """First fit: sizes 4, 3, 2, 1 into sequences of 6 give (4, 2), (3, 1)."""
    rows = [([1, 5], [6, 2]), ([1], [7, 2]), ([1], [2]), ([], [9])]
    batch = batches.packed_rows(rows, 6)
    np.testing.assert_array_equal(batch.tokens, [[1, 5, 6, 2, 1, 2], [1, 7, 2, 9, 0, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]])
    # Without BOS: the first token of a row would be learnt from the row before it.
    whole = batches.packed_rows([([], [5, 6, 2]), ([], [7, 8, 2])], 6, loss_on_prompt=True)
    np.testing.assert_array_equal(whole.loss_mask, [[0, 1, 1, 0, 1, 1]])
    # Only the newest sequence is open: 4 | 3, 2, 1.
    np.testing.assert_array_equal(
        batches.packed_rows(rows, 6, open_sequences=1).tokens, [[1, 5, 6, 2, 0, 0], [1, 7, 2, 1, 2, 9]]
    )


@pytest.mark.parametrize("open_sequences", [1, 3, 64])
def test_packing_loses_no_row(open_sequences):
    rng = np.random.default_rng(0)
    rows = [
        (list(rng.integers(1, 99, rng.integers(1, 9))), list(rng.integers(1, 99, rng.integers(1, 9))))
        for _ in range(200)
    ]
    batch = batches.packed_rows(rows, 24, open_sequences=open_sequences)
    found = []
    for tokens, segments, positions, mask in zip(*batch, strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert list(positions[here]) == list(range(here.sum()))
            assert np.all(np.diff(np.flatnonzero(here)) == 1), "a row lies in one piece"
            found.append((tuple(tokens[here & ~mask]), tuple(tokens[here & mask])))
        assert not mask[segments == 0].any()
    assert sorted(found) == sorted((tuple(p), tuple(r)) for p, r in rows)
    assert len(batch.tokens) < 200 / 2


def test_a_row_that_is_too_long_is_an_error():
    rows = [([1, 5], [2]), ([1, 5, 6], [7, 2])]
    with pytest.raises(ValueError, match="row 1 has 5 tokens, more than the sequence length 4"):
        batches.token_rows(rows, 4)
    with pytest.raises(ValueError, match="prompt 1 has 3 tokens, more than the window 2"):
        batches.prompt_rows([[1], [1, 2, 3]], 2)


def test_prompt_rows_by_hand():
    prompts = batches.prompt_rows([[1, 5], [1, 6, 7]], 4)
    np.testing.assert_array_equal(prompts.tokens, [[0, 0, 1, 5], [0, 1, 6, 7]])
    np.testing.assert_array_equal(prompts.lengths, [2, 3])


def test_score_rows_by_hand():
    """What rows begin alike with stands once; a row goes on from the one that it shares most with."""
    scores = batches.score_rows([([1, 5, 2], [1, 2]), ([1], [1, 7, 8])], 4)
    np.testing.assert_array_equal(scores.tokens, [[1, 5, 2, 2], [1, 7, 8, 0]])
    np.testing.assert_array_equal(scores.segments, [[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(scores.positions, [[0, 1, 2, 1], [0, 1, 2, 0]])
    np.testing.assert_array_equal(scores.members, [[0b11, 0b01, 0b01, 0b10], [0b11, 0b10, 0b10, 0]])
    np.testing.assert_array_equal(scores.last, [[[2, 3]], [[0, 2]]])
    tree = [[1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [1, 2, 3]]
    scores = batches.score_rows([tree])
    np.testing.assert_array_equal(scores.tokens, [[1, 2, 3, 4, 5, 0, 0, 0]])
    np.testing.assert_array_equal(scores.positions, [[0, 1, 2, 2, 3, 0, 0, 0]])
    np.testing.assert_array_equal(scores.members, [[0b1111, 0b1111, 0b1001, 0b0110, 0b0100, 0, 0, 0]])
    np.testing.assert_array_equal(scores.last, [[[2, 3, 4, 2]]])
    with pytest.raises(ValueError, match="a group has 32 rows; at most 31 share a sequence"):
        batches.score_rows([[[1]] * 32])


def test_groups_one_behind_the_other_by_hand():
    """Two groups, none and one; of the last sequence the second place is empty."""
    first, second, third = ([1, 5, 2], [1, 2]), ([1], [1, 7, 8]), ([1, 9], [1, 9])
    batch = batches.lay_out_groups([[first, second], [], [third]], 8, 2, 2)
    np.testing.assert_array_equal(batch.tokens, [[1, 5, 2, 2, 1, 7, 8, 0], [0] * 8, [1, 9, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 2, 2, 2, 0], [0] * 8, [1, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 1, 0, 1, 2, 0], [0] * 8, [0, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.members, [[3, 1, 1, 2, 3, 2, 2, 0], [0] * 8, [3, 3, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.last, [[[2, 3], [4, 6]], [[0, 0]] * 2, [[1, 1], [0, 0]]])
    assert all(x.dtype == np.int32 for x in batch)
    assert batches.lay_out_groups([[], []], 8, 2, 4).last.shape == (2, 2, 4), "a process may have no group"
    np.testing.assert_array_equal(batches.group_sizes([first, second, third]), [[4, 2], [3, 2], [2, 2]])


@pytest.mark.parametrize(("num_rows", "batch_size"), [(12, 4), (10, 4), (3, 8)])
def test_every_row_comes_once_per_epoch_in_a_new_order(num_rows, batch_size):
    """Also where an epoch ends within a batch, and where a batch is longer than an epoch."""
    num_steps = 3 * num_rows // batch_size + 1
    stream = np.concatenate([batches.row_numbers(num_rows, batch_size, s, seed=1) for s in range(num_steps)])
    epochs = stream[: 3 * num_rows].reshape(3, num_rows)
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_rows))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = np.concatenate([batches.row_numbers(num_rows, batch_size, s, seed=2) for s in range(num_steps)])
    assert list(other) != list(stream)


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no rows"):
        batches.row_numbers(0, 8, 0, seed=3)


def test_rows_are_encoded_once_and_when_they_are_asked_for():
    asked = []
    rows = batches.Rows("abcd", lambda x: asked.append(x) or ([ord(x)], [1, 2]))
    assert len(rows) == 4 and asked == []
    for i in (2, 0, 2):
        first, second = rows[i]
        assert (first.tolist(), second.tolist(), second.dtype) == ([ord("abcd"[i])], [1, 2], np.int32)
    assert asked == ["c", "a"]
    assert [row[0] for row in rows] == [97, 98, 99, 100] and asked == ["c", "a", "b", "d"]
    assert list(batches.Rows("ab", lambda x: [ord(x)])) == [[97], [98]], "a row of one piece is a list"


@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_what_is_learnt_of_a_row_is_what_is_laid_out(loss_on_prompt):
    rows = [([1, 5], [6, 2]), ([], [7, 8, 2]), ([], [], [9], [4]), ([1, 5], [6, 2], [7], [8, 2]), ([3],), ([], [])]
    batch = batches.token_rows(rows, 8, loss_on_prompt=loss_on_prompt)
    expected = batch.loss_mask.sum(1).tolist()
    assert [batches.num_learnt(row, loss_on_prompt) for row in rows] == expected
    assert expected == ([3, 2, 1, 6, 0, 0] if loss_on_prompt else [2, 2, 1, 4, 0, 0])


def test_rows_are_measured_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(batches, "MEASURED", 3)
    sizes = []
    found = batches.measured(range(8), lambda some: sizes.append(len(some)) or np.asarray([[i, -i] for i in some]))
    assert sizes == [3, 3, 2]
    np.testing.assert_array_equal(found, [[i, -i] for i in range(8)])


@pytest.mark.usefixtures("one_device")
def test_batch_at_is_pure():
    """Whatever was read before, and in whatever order, a step gives the same rows; it does not write to the arrays."""
    arrays = PromptBatch(np.arange(40, dtype=np.int32).reshape(10, 4), 2 * np.arange(10, dtype=np.int32))
    before = jax.tree.map(np.copy, arrays)
    make = lambda rows: jax.tree.map(lambda x: x[rows], arrays)  # noqa: E731
    forward = [batches.make_batch_at(make, 10, 4, seed=7)(step) for step in range(6)]
    batch_at = batches.make_batch_at(make, 10, 4, seed=7)
    for step in (5, 0, 3, 3, 1, 4, 2):
        for a, b in zip(batch_at(step), forward[step], strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)
    rows = np.concatenate([np.asarray(b.lengths) // 2 for b in forward[:5]])
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    for batch in forward[:1]:  # rows stay together across the arrays of a batch
        np.testing.assert_array_equal(np.asarray(batch.tokens)[:, 0] // 4, np.asarray(batch.lengths) // 2)
        assert jax.typeof(batch.tokens).sharding.spec == sharding.RULES.spec("batch", None)


def test_length_buckets_by_hand():
    """Multiples of 8; 4 of 40 rows are less than an eighth and go up; the longest keep a bucket of their own length."""
    lengths = np.repeat([3, 9, 15, 20, 30, 41], [4, 5, 15, 10, 4, 2])
    expected = np.repeat([16, 24, 48], [24, 10, 6])
    np.testing.assert_array_equal(batches.length_buckets(lengths), expected)
    np.testing.assert_array_equal(batches.length_buckets(np.asarray([5, 5, 40]), smallest=0.6), [8, 8, 40])


@pytest.mark.usefixtures("one_device")
def test_score_batches_of_like_length():
    """Nothing is cut off, padding is short, an epoch reads whole batches of different rows, and a step is a step."""
    rng = np.random.default_rng(0)
    groups = [[[i + 1] * n, [i + 1] + [200] * (n // 2)] for i, n in enumerate(rng.integers(2, 60, 101))]
    data = batches.score_rows(groups)
    sizes = batches.group_sizes(groups)
    lengths = sizes[:, 0]
    np.testing.assert_array_equal(lengths, np.sum(data.members > 0, axis=1))
    batch_at = batches.make_score_batch_at(groups, sizes, 8, seed=3, num_steps=32)
    seen, padding = [], 0
    for step in range(2 * 12):  # 101 rows: 12 batches of 8, and 5 rows that this epoch leaves out
        batch = jax.tree.map(np.asarray, batch_at(step))
        rows, length = batch.tokens[:, 0] - 1, batch.tokens.shape[1]
        for got, whole in zip(batch[:4], data[:4], strict=True):
            np.testing.assert_array_equal(got, whole[rows, :length])
        np.testing.assert_array_equal(batch.last, data.last[rows])
        assert lengths[rows].max() <= length
        padding += length - lengths[rows].mean()
        seen.append(rows)
    epochs = np.reshape(seen, (2, 96))
    assert all(len(set(epoch)) == 96 for epoch in epochs)
    assert set(epochs[0]) != set(epochs[1]), "other rows are left out"
    assert padding / 24 < 10, "88 - 46 without buckets"
    again = batches.make_score_batch_at(groups, sizes, 8, seed=3, num_steps=32)
    for step in (13, 2):
        np.testing.assert_array_equal(np.asarray(again(step).tokens)[:, 0] - 1, seen[step])
    few = batches.make_score_batch_at(groups[:3], sizes[:3], 8, 3, 32)(0)
    assert set(np.asarray(few.tokens)[:, 0]) == {1, 2, 3}
    short = batches.make_score_batch_at(
        groups, sizes, 8, 3, num_steps=4
    )  # too few steps for more than one compiled shape
    assert {short(step).tokens.shape[1] for step in range(4)} == {batches.round_up(int(lengths.max()))}


def test_padded_lengths_of_prompts_by_hand():
    """Quarters of 520 are 130, 260 and 390; of 300 there are two parts, of 100 one."""
    lengths = np.asarray([1, 136, 137, 264, 392, 393, 520])
    np.testing.assert_array_equal(batches.prompt_lengths(lengths, 518), [136, 136, 264, 264, 392, 520, 520])
    np.testing.assert_array_equal(batches.prompt_lengths(np.asarray([3, 152, 153, 300]), 300), [152, 152, 304, 304])
    np.testing.assert_array_equal(batches.prompt_lengths(np.asarray([3, 100]), 100), [104, 104])
    prompts = [[1] * n for n in (30, 140, 20)]
    assert batches.longest_prompt_length(prompts, 518) == 264
    assert batches.longest_prompt_length(prompts[::2], 518) == 136
    with pytest.raises(ValueError, match="prompt 0 has 521 tokens, more than the window 520"):
        batches.prompt_rows([[1] * 521], batches.longest_prompt_length([[1] * 521], 518))
    never = batches.Rows(range(3), lambda i: pytest.fail("of a short window there is nothing to measure"))
    assert batches.longest_prompt_length(never, 100) == 104


def test_batches_of_like_length_by_hand():
    found = batches.like_length_batches(np.asarray([16, 8, 16, 8, 24, 8, 16]), 3)
    assert [(rows.tolist(), length) for rows, length in found] == [([1, 3, 5], 8), ([0, 2, 6], 16), ([4, 4, 4], 24)]
    found = batches.like_length_batches(np.asarray([8, 8, 8, 8]), 3)
    assert [(rows.tolist(), length) for rows, length in found] == [([0, 1, 2], 8), ([3, 3, 3], 8)]
    assert batches.like_length_batches(np.zeros(0, np.int32), 3) == []


def test_batches_of_mixed_lengths_by_hand():
    """Three batches of 2: the three longest rows go to one each, the longest first, and so do the three shortest."""
    lengths = np.asarray([5, 40, 6, 41, 42, 7], np.int32)
    epochs = [batches.mixed_length_numbers(lengths, 2, epoch, seed=1) for epoch in range(12)]
    for epoch in epochs:
        assert epoch.shape == (3, 2)
        assert set(epoch[:, 0]) == {1, 3, 4} and set(epoch[:, 1]) == {0, 2, 5}
    assert len({tuple(epoch.ravel()) for epoch in epochs}) > 6, "which, is drawn"
    assert len({epoch[0, 0] for epoch in epochs}) == len({epoch[0, 1] for epoch in epochs}) == 3
    again = [batches.mixed_length_numbers(lengths, 2, epoch, seed=1) for epoch in range(12)]
    np.testing.assert_array_equal(again, epochs)
    left_out = [set(range(6)) - set(batches.mixed_length_numbers(lengths, 4, e, 1).ravel()) for e in range(12)]
    assert {len(rows) for rows in left_out} == {2} and len(set.union(*left_out)) > 4, "others in other epochs"
    assert sorted(batches.mixed_length_numbers(lengths, 8, 0, 1)[0])[1:-1] and len(lengths) < 8
    assert set(batches.mixed_length_numbers(lengths, 8, 0, 1)[0]) == set(range(6)), "few rows are repeated"


@pytest.mark.usefixtures("one_device")
def test_packed_groups():
    """Each step has its groups, whole and once; there are few shapes, and an epoch reads whole batches."""
    rng = np.random.default_rng(0)
    groups = [[[i + 1] * n, [i + 1] + [200] * (n // 2)] for i, n in enumerate(rng.integers(2, 60, 101))]
    sizes = batches.group_sizes(groups)
    short = np.flatnonzero(sizes[:, 0] <= 80)
    assert 80 < len(short) < 101
    steps = len(short) // 8
    batch_at, padding = batches.make_packed_score_batch_at(groups, sizes, 8, seed=3, num_steps=2 * steps, length=80)
    alone = batches.score_rows(groups)
    seen, tokens, slots_of_all, shapes = [], 0, 0, set()
    for step in range(2 * steps):
        batch = jax.tree.map(np.asarray, batch_at(step))
        shapes.add((batch.tokens.shape, batch.last.shape))
        rows = []
        for s, segments in enumerate(batch.segments):
            for e in range(segments.max()):
                (slots,) = np.nonzero(segments == e + 1)
                i = batch.tokens[s, slots[0]] - 1
                assert np.all(np.diff(slots) == 1) and len(slots) == sizes[i, 0], "a group lies in one piece"
                for got, whole in zip(
                    (batch.tokens, batch.positions, batch.members), (alone[0], *alone[2:4]), strict=True
                ):
                    np.testing.assert_array_equal(got[s, slots], whole[i, : len(slots)])
                np.testing.assert_array_equal(batch.last[s, e], slots[0] + alone.last[i, 0])
                rows.append(i)
        assert len(set(rows)) == 8
        tokens, slots_of_all = tokens + np.sum(batch.segments > 0), slots_of_all + batch.segments.size
        seen.append(rows)
    epochs = np.reshape(seen, (2, -1))
    assert all(len(set(epoch)) == 8 * steps and set(epoch) <= set(short) for epoch in epochs)
    assert len(shapes) <= 2 and padding == pytest.approx(1 - tokens / slots_of_all) and padding < 0.25
    again, _ = batches.make_packed_score_batch_at(groups, sizes, 8, seed=3, num_steps=2 * steps, length=80)
    for step in (13, 2):
        for a, b in zip(again(step), batch_at(step), strict=True):
            np.testing.assert_array_equal(a, b)
    eights, _ = batches.make_packed_score_batch_at(groups, sizes, 8, 3, 24, 80, multiple=8)
    assert len(eights(0).tokens) == 8 > max(tokens[0] for tokens, _ in shapes)
    with pytest.raises(ValueError, match="all 101 groups have more than 2 tokens: set sequence_length above that"):
        batches.make_packed_score_batch_at(groups, sizes, 8, 3, 24, 2)


def test_round_up():
    assert [batches.round_up(n) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert batches.round_up(129, 128) == 256
