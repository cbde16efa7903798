"""Lengths that are chosen on the device, and the layout of their pass, are those that the host works out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_dspark.budgets.admission import admit_top, survivals
from hf_dspark.cache.layout import DeviceLayout, RowLayout
from hf_dspark.decoding.plan import top_lengths

INDEXES = ("rows", "row_index", "positions", "first", "last", "added", "ends", "padded_index", "flat_index")


@pytest.mark.parametrize("seed", range(20))
def test_the_tokens_of_highest_survival_are_chosen(seed: int) -> None:
    """Ties go to the earlier position, then the earlier row; a confidence that is not a number ends its row; limits hold."""
    random = np.random.default_rng(seed)
    confidence = random.choice(np.array([0.0, 0.25, 0.5, 1.0, np.nan], dtype=np.float32), (5, 7), p=[0.1, 0.2, 0.3, 0.3, 0.1])
    limits = random.integers(0, 8, 5).tolist()
    for total in range(sum(limits) + 1):
        chosen = top_lengths(torch.from_numpy(confidence), torch.tensor(limits), total)
        assert chosen.tolist() == admit_top(survivals(confidence), limits, total)


def test_its_layout_is_that_of_lengths_which_the_host_knows() -> None:
    """Index for index; the grid may be wider than the longest row, of whose last token it then holds more."""
    starts, counts = [4, 0, 9, 2], [1, 3, 2, 4]
    known = RowLayout(starts, counts)
    found = DeviceLayout(torch.tensor(starts), torch.tensor(counts), total=sum(counts), max_count=4, max_end=11, latest=9)
    for name in INDEXES:
        assert torch.equal(getattr(found, name), getattr(known, name)), name
    assert (found.total, found.max_count, found.max_end) == (known.total, known.max_count, known.max_end)
    wider = DeviceLayout(torch.tensor(starts), torch.tensor(counts), total=sum(counts), max_count=6, max_end=15, latest=9)
    assert torch.equal(wider.padded_index[:, :4], known.padded_index)
    assert torch.equal(wider.padded_index.flatten()[wider.flat_index], torch.arange(sum(counts)))


def test_padding_lengthens_short_rows_and_adds_rows_that_nobody_has() -> None:
    """No row gets longer than the grid, and what is verified stays as it is."""
    found = DeviceLayout(torch.tensor([4, 0, 9]), torch.tensor([1, 3, 2]), total=6, max_count=4, max_end=11, latest=9).padded(4, 11, 4, 11)
    assert found.added.tolist() == [4, 4, 2, 1]
    assert found.verified.tolist() == [0, 2, 1, 0]
    assert found.positions.tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 9, 10, 0]
