"""Where each token of a flattened pass over rows of different length belongs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch


class RowLayout:
    """Where each token of one flattened pass belongs: tokens of row 0, then of row 1, ..

    Args:
        starts (`list[int]`): tokens that each row already holds.
        counts (`list[int]`): tokens that each row adds in this pass, at least one.
        device (`torch.device`): where the index tensors live.
        first_row (`int`): number of the first of these rows in the cache; rows that join lie behind those that run
            already.
        row_ids (`list[int]`, *optional*): numbers of the rows in the cache, where they do not follow each other.
    """

    def __init__(
        self,
        starts: Sequence[int],
        counts: Sequence[int],
        device: torch.device | str = "cpu",
        first_row: int = 0,
        row_ids: Sequence[int] | None = None,
    ) -> None:
        if len(starts) != len(counts) or not counts or min(counts) < 1:
            raise ValueError(f"A layout needs one start and one positive count a row; got starts={starts}, counts={counts}.")
        self.starts = list(starts)
        self.counts = list(counts)
        self.device = torch.device(device)
        if row_ids is not None:
            first_row = row_ids[0]
            if list(row_ids) == list(range(first_row, first_row + len(counts))):
                row_ids = None
        self.first_row = first_row
        self.row_ids = None if row_ids is None else list(row_ids)
        self.total = sum(self.counts)
        self.max_count = max(self.counts)
        self.max_end = max(s + c for s, c in zip(starts, counts, strict=True))
        self.equal_counts = min(self.counts) == self.max_count
        self._twins: dict[torch.device, RowLayout] = {self.device: self}

    @property
    def num_rows(self) -> int:
        return len(self.counts)

    @cached_property
    def first(self) -> list[int]:
        """Flat index of each row's first token."""
        return [end - count for end, count in zip(accumulate(self.counts), self.counts, strict=True)]

    def on(self, device: torch.device) -> RowLayout:
        """The same layout with its index tensors on `device`; made once, for targets whose layers lie on several devices."""
        if device not in self._twins:
            twin = RowLayout(self.starts, self.counts, device, self.first_row, self.row_ids)
            self._twins[device] = twin
            twin._twins = self._twins
        return self._twins[device]

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.device.type == "cpu" else values.to(self.device, non_blocking=True)

    @cached_property
    def _host(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counts = torch.tensor(self.counts)
        rows = torch.repeat_interleave(torch.arange(self.num_rows), counts)
        first = counts.cumsum(0) - counts
        within = torch.arange(self.total) - first[rows]
        return rows, within, first

    @cached_property
    def rows(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(T,)`: row of each token, as numbered in the cache."""
        rows = self._host[0]
        return self._to_device(rows + self.first_row if self.row_ids is None else torch.tensor(self.row_ids)[rows])

    @cached_property
    def row_index(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: numbers of the rows in the cache."""
        numbers = range(self.first_row, self.first_row + self.num_rows) if self.row_ids is None else self.row_ids
        return self._to_device(torch.tensor(list(numbers)))

    @cached_property
    def positions(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(T,)`: index of each token inside its row, which is also its position id."""
        rows, within, _ = self._host
        return self._to_device(within + torch.tensor(self.starts)[rows])

    @cached_property
    def last(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: flat index of each row's last token."""
        return self._to_device(torch.tensor(self.counts).cumsum(0) - 1)

    @cached_property
    def added(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: tokens that each row adds, `counts` on the device."""
        return self._to_device(torch.tensor(self.counts))

    @cached_property
    def ends(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: tokens that each row holds after the pass."""
        return self._to_device(torch.tensor(self.starts) + torch.tensor(self.counts))

    @cached_property
    def padded_index(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R, max_count)`: flat index of each row's tokens; past a row's count its last
        token again.
        """
        first, counts = self._host[2], torch.tensor(self.counts)
        return self._to_device(first[:, None] + torch.minimum(torch.arange(self.max_count), counts[:, None] - 1))

    @cached_property
    def flat_index(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(T,)`: place of each token in a padded `(R * max_count)` arrangement."""
        rows, within, _ = self._host
        return self._to_device(rows * self.max_count + within)

    def causal_mask(self, window: int | None = None) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(R, max_count, max_end)`: true where a padded query may look.

        A query at position p of its row sees positions 0..p of the same row, or the last `window` of them.
        """
        queries = self.positions[self.padded_index][:, :, None]
        keys = torch.arange(self.max_end, device=self.device)
        allowed = keys <= queries
        return allowed if window is None else allowed & (keys > queries - window)
