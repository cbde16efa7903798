"""Layouts against straight loops, and the row cache against a list of lists."""

from __future__ import annotations

import random

import pytest
import torch

from hf_dspark.cache.kv_cache import RowCache, order_without
from hf_dspark.cache.layout import RowLayout

HEADS, DIM, VALUE_DIM, LAYERS = 2, 3, 4, 2

# ------------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("first_row", [0, 3])
@pytest.mark.parametrize(
    ("starts", "counts"),
    [([0], [1]), ([4], [3]), ([0, 5, 2], [3, 1, 4]), ([7, 0], [2, 2]), ([1, 1, 1, 9], [1, 1, 1, 1])],
)
def test_layout_equals_a_loop_over_tokens(starts: list[int], counts: list[int], first_row: int) -> None:
    """Rows, positions, last tokens and both index maps are what a loop over rows and tokens gives."""
    layout = RowLayout(starts, counts, first_row=first_row)
    rows, positions, last, padded, flat, index = [], [], [], [], [], 0
    longest = max(counts)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        places = list(range(index, index + count))
        rows += [first_row + row] * count
        positions += range(start, start + count)
        padded.append(places + [places[-1]] * (longest - count))
        flat += [row * longest + j for j in range(count)]
        index += count
        last.append(index - 1)
    assert layout.rows.tolist() == rows
    assert layout.positions.tolist() == positions
    assert layout.last.tolist() == last
    assert layout.padded_index.tolist() == padded
    assert layout.flat_index.tolist() == flat
    assert (layout.total, layout.num_rows, layout.max_count) == (index, len(counts), longest)
    assert layout.max_end == max(s + c for s, c in zip(starts, counts, strict=True))
    assert layout.equal_counts == (len(set(counts)) == 1)
    padded_values = torch.arange(layout.total)[layout.padded_index].flatten()
    assert torch.equal(padded_values[layout.flat_index], torch.arange(layout.total))


@pytest.mark.parametrize("window", [None, 1, 3])
def test_causal_mask_equals_a_loop(window: int | None) -> None:
    """A token sees its row's tokens up to itself, and no further back than the window."""
    starts, counts = [0, 5, 2], [3, 1, 4]
    mask = RowLayout(starts, counts).causal_mask(window)
    assert mask.shape == (3, 4, 6)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for j in range(count):
            seen = [p for p in range(6) if p <= start + j and (window is None or p > start + j - window)]
            assert mask[row, j].nonzero().flatten().tolist() == seen


@pytest.mark.parametrize(("starts", "counts"), [([], []), ([0], [1, 2]), ([0, 1], [1, 0]), ([3], [-1])])
def test_impossible_layouts_are_refused(starts: list[int], counts: list[int]) -> None:
    """Every row needs a start and at least one token."""
    with pytest.raises(ValueError, match="one positive count a row"):
        RowLayout(starts, counts)


# -------------------------------------------------------------------------------------------------------------- cache


class ListOfRows:
    """The rows as plain lists: `tokens[row][layer]` is a list of committed (key, value) pairs."""

    def __init__(self) -> None:
        self.tokens: list[list[list[tuple[torch.Tensor, torch.Tensor]]]] = []

    def lengths(self) -> list[int]:
        return [len(row[0]) for row in self.tokens]


def assert_equal(cache: RowCache, reference: ListOfRows) -> None:
    """Every committed token of every layer is where the lists have it."""
    assert cache.num_rows == len(reference.tokens)
    for row, layers in enumerate(reference.tokens):
        for layer, tokens in enumerate(layers):
            if tokens:
                keys, values = cache.view(layer, RowLayout([0], [len(tokens)], first_row=row))
                assert torch.equal(keys[0], torch.stack([k for k, _ in tokens], dim=1))
                assert torch.equal(values[0], torch.stack([v for _, v in tokens], dim=1))


def random_write(cache: RowCache, reference: ListOfRows, rng: random.Random, most: int) -> None:
    """One pass over a run of neighbouring rows; each row then keeps a random part of its new tokens, at once."""
    first = rng.randrange(cache.num_rows)
    rows = range(first, rng.randrange(first, cache.num_rows) + 1)
    counts = [rng.randint(1, most) for _ in rows]
    layout = RowLayout([reference.lengths()[r] for r in rows], counts, first_row=first)
    kept = [rng.randint(0, n) for n in counts]
    for layer in range(LAYERS):
        keys, values = torch.randn(layout.total, HEADS, DIM), torch.randn(layout.total, HEADS, VALUE_DIM)
        cache.write(layer, keys, values, layout)
        index = 0
        for row, count, keep in zip(rows, counts, kept, strict=True):
            reference.tokens[row][layer] += [(keys[index + j], values[index + j]) for j in range(keep)]
            index += count


@pytest.mark.parametrize("seed", range(6))
def test_any_series_of_operations_equals_a_list_of_lists(seed: int) -> None:
    """Adding, writing, committing in part, rolling back and removing rows in any order keep every committed token in
    its place.
    """
    rng, cache, reference = random.Random(seed), RowCache(), ListOfRows()
    torch.manual_seed(seed)
    for step in range(150):
        what = rng.choice(["add", "write", "write", "write", "write", "roll back", "remove"])
        if not reference.tokens or (what == "add" and len(reference.tokens) < 7):
            count = rng.randint(1, 3)
            cache.add_rows(count)
            reference.tokens += [[[] for _ in range(LAYERS)] for _ in range(count)]
        elif what == "write":
            random_write(cache, reference, rng, most=40 if step % 10 == 0 else 6)
        elif what == "roll back":
            row = rng.randrange(cache.num_rows)
            keep = rng.randint(0, reference.lengths()[row])
            reference.tokens[row] = [tokens[:keep] for tokens in reference.tokens[row]]
        elif what == "remove":
            gone = rng.sample(range(cache.num_rows), rng.randint(1, cache.num_rows))
            order = order_without(cache.num_rows, gone)
            cache.keep_rows(order, reference.lengths())
            assert sorted(order) == sorted(set(range(len(reference.tokens))) - set(gone))
            reference.tokens = [reference.tokens[old] for old in order]
        assert_equal(cache, reference)


def filled(rows: int, tokens: int) -> tuple[RowCache, torch.Tensor]:
    cache, layout = RowCache(), RowLayout([0] * rows, [tokens] * rows)
    cache.add_rows(rows)
    keys = torch.randn(rows * tokens, HEADS, DIM)
    cache.write(0, keys, keys.clone(), layout)
    return cache, keys.view(rows, tokens, HEADS, DIM).transpose(1, 2)


def test_views_are_no_copies() -> None:
    """What attention reads is the buffer itself: a later write shows through, and no memory is taken."""
    cache, keys = filled(3, 5)
    view, _ = cache.view(0, RowLayout([5, 5], [1, 2], first_row=1))
    assert view.shape == (2, HEADS, 7, DIM)
    assert view.untyped_storage().data_ptr() == cache.keys[0].untyped_storage().data_ptr()
    assert torch.equal(view[:, :, :5], keys[1:])
    new = torch.ones(1, HEADS, DIM)
    cache.write(0, new, new, RowLayout([5], [1], first_row=1))
    assert torch.equal(view[0, :, 5], new[0])


def test_growing_keeps_tokens_and_doubles() -> None:
    """A token a time, up to 1000: contents stay, and the buffer is replaced about log2 times only."""
    cache, expected, buffers = RowCache(), [], set()
    cache.add_rows(1)
    for position in range(1000):
        token = torch.full((1, HEADS, DIM), float(position))
        cache.write(0, token, -token, RowLayout([position], [1]))
        expected.append(position)
        buffers.add(cache.keys[0].shape[2])
    keys, values = cache.view(0, RowLayout([999], [1]))
    assert keys[0, 0, :, 0].tolist() == expected
    assert torch.equal(values, -keys)
    assert len(buffers) <= 6
    assert max(buffers) < 2100


def test_room_reserved_at_once_is_not_grown_again() -> None:
    """`reserve` before the first write gives the final size."""
    cache = RowCache()
    cache.add_rows(2)
    cache.reserve(300)
    for position in range(0, 300, 50):
        token = torch.zeros(100, HEADS, DIM)
        cache.write(0, token, token, RowLayout([position] * 2, [50] * 2))
        assert cache.keys[0].shape == (2, HEADS, 300, DIM)


def test_rows_that_leave_free_their_place() -> None:
    """Many rows may come and go, and the buffer is as tall as the most that lived at once."""
    cache, _ = filled(4, 3)
    for _ in range(10):
        cache.keep_rows(order_without(4, [0, 2]), [3] * 4)
        cache.add_rows(2)
        token = torch.zeros(2, HEADS, DIM)
        cache.write(0, token, token, RowLayout([0, 0], [1, 1], first_row=2))
    assert cache.keys[0].shape[0] == 4


def test_removing_moves_as_few_rows_as_there_are_holes() -> None:
    """The last rows fill the holes; the others stay where they are."""
    cache, keys = filled(6, 2)
    order = order_without(6, [1, 5])
    cache.keep_rows(order, [2] * 6)
    assert order == [0, 4, 2, 3]
    assert torch.equal(cache.view(0, RowLayout([0] * 4, [2] * 4))[0], keys[order])
    assert cache.num_rows == 4
    assert order_without(4, []) == [0, 1, 2, 3]
    assert order_without(4, [0, 1, 2, 3]) == []


def test_scratch_beyond_a_length_never_holds_nan() -> None:
    """Positions that nobody wrote are zeros: a masked key has weight 0, and 0 * NaN would be NaN."""
    cache, _ = filled(1, 2)
    cache.add_rows(2)
    token = torch.ones(3, HEADS, DIM)
    cache.write(0, token, token, RowLayout([2, 0, 70], [1, 1, 1]))
    keys, values = cache.view(0, RowLayout([2, 0, 70], [1, 1, 1]))
    assert torch.isfinite(keys).all()
    assert torch.isfinite(values).all()
    assert keys[1, :, 1:].abs().sum() == 0
