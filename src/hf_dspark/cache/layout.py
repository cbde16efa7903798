"""Where each token of a flattened pass over rows of different length belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
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
        self.equal_ends = all(s + c == self.max_end for s, c in zip(starts, counts, strict=True))
        self._twins: dict[torch.device, RowLayout] = {self.device: self}

    @property
    def num_rows(self) -> int:
        return len(self.counts)

    @property
    def firsts(self) -> list[int]:
        """`first` on the host."""
        return [end - count for end, count in zip(accumulate(self.counts), self.counts, strict=True)]

    def on(self, device: torch.device) -> RowLayout:
        """The same layout with its index tensors on `device`; made once, for targets whose layers lie on several devices."""
        if device not in self._twins:
            twin = RowLayout(self.starts, self.counts, device, self.first_row, self.row_ids)
            self._twins[device] = twin
            twin._twins = self._twins
        return self._twins[device]

    @cached_property
    def _index(self) -> dict[str, torch.Tensor]:
        """All index tensors: built on the host without a kernel, brought to the device in one copy."""
        starts, counts = np.array(self.starts), np.array(self.counts)
        numbers = np.arange(self.first_row, self.first_row + self.num_rows) if self.row_ids is None else np.array(self.row_ids)
        first = counts.cumsum() - counts
        rows = np.repeat(np.arange(self.num_rows), counts)
        within = np.arange(self.total) - first[rows]
        parts = {
            "rows": numbers[rows],
            "row_index": numbers,
            "positions": within + starts[rows],
            "within": within,
            "first": first,
            "last": first + counts - 1,
            "added": counts,
            "ends": starts + counts,
            "padded_index": first[:, None] + np.minimum(np.arange(self.max_count), counts[:, None] - 1),
            "flat_index": rows * self.max_count + within,
        }
        packed = torch.from_numpy(np.concatenate([part.ravel() for part in parts.values()]))
        packed = packed if self.device.type == "cpu" else packed.to(self.device, non_blocking=True)
        flat = packed.split([part.size for part in parts.values()])
        return {name: one.view(part.shape) for (name, part), one in zip(parts.items(), flat, strict=True)}

    @property
    def rows(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(T,)`: row of each token, as numbered in the cache."""
        return self._index["rows"]

    @property
    def row_index(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: numbers of the rows in the cache."""
        return self._index["row_index"]

    @property
    def positions(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(T,)`: index of each token inside its row, which is also its position id."""
        return self._index["positions"]

    @property
    def within(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(T,)`: how many tokens of its row come before each in this pass."""
        return self._index["within"]

    @property
    def first(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: flat index of each row's first token."""
        return self._index["first"]

    @property
    def last(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: flat index of each row's last token."""
        return self._index["last"]

    @property
    def added(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: tokens that each row adds, `counts` on the device."""
        return self._index["added"]

    @property
    def ends(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: tokens that each row holds after the pass."""
        return self._index["ends"]

    @property
    def padded_index(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R, max_count)`: flat index of each row's tokens; past a row's count its last
        token again.
        """
        return self._index["padded_index"]

    @property
    def flat_index(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(T,)`: place of each token in a padded `(R * max_count)` arrangement."""
        return self._index["flat_index"]

    def part(self, first: int, end: int) -> tuple[slice | torch.Tensor, RowLayout]:
        """Rows from place `first` up to `end` alone: where their tokens lie in this pass, and their own layout."""
        rows, firsts = slice(first, end), [*self.firsts, self.total]
        return slice(firsts[first], firsts[end]), RowLayout(self.starts[rows], self.counts[rows], self.device, self.first_row + first)

    def first_key(self, window: int | None) -> int:
        """The first position that a query of this pass sees in any row; 0 where the host does not know."""
        return 0 if window is None or not self.starts else max(min(self.starts) - window + 1, 0)

    def causal_mask(self, window: int | None = None) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(R, max_count, max_end - first_key)`: true where a padded query may look.

        A query at position p of its row sees positions 0..p of the same row, or the last `window` of them.
        """
        queries = self.positions[self.padded_index][:, :, None]
        keys = torch.arange(self.first_key(window), self.max_end, device=self.device)
        allowed = keys <= queries
        return allowed if window is None else allowed & (keys > queries - window)


class TensorLayout(RowLayout):
    """A layout that knows its sizes from its tensors alone, for functions that are traced once and run with any of them.

    Args:
        index (`Mapping[str, torch.Tensor]`): index tensors by the name of `RowLayout`'s property, as far as they are read.
        longest (`torch.Tensor` of shape `(S,)`): its length is `max_end`.
        exact (`bool`): a single row ends there.
    """

    def __init__(self, index: Mapping[str, torch.Tensor], longest: torch.Tensor, *, exact: bool = False) -> None:
        self.starts, self.counts, self.first_row = [], [], 0
        self.row_ids = None
        self.device = longest.device
        self._tensors = dict(index)
        self.total = index["positions"].shape[0] if "positions" in index else 0
        self.max_count = index["padded_index"].shape[1] if "padded_index" in index else 0
        self.max_end = longest.shape[0]
        self.equal_counts = self.num_rows == 1
        self.equal_ends = exact and self.num_rows == 1

    @property
    def num_rows(self) -> int:
        return next(self._tensors[name].shape[0] for name in ("added", "ends", "rows") if name in self._tensors)

    @property
    def _index(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def on(self, device: torch.device) -> RowLayout:
        return self


class DeviceLayout(TensorLayout):
    """A layout whose rows' lengths only the device knows. The host knows how many tokens there are in all, and bounds of the rest.

    Args:
        starts (`torch.LongTensor` of shape `(R,)`): tokens that each row already holds.
        added (`torch.LongTensor` of shape `(R,)`): tokens that each row adds, at least one.
        total (`int`): their sum.
        max_count, max_end (`int`): the most that a row may add, and may then hold.
        latest (`int`): tokens that the longest row already holds.
        verified (`torch.LongTensor` of shape `(R,)`, *optional*): drafted tokens among them, where some are padding.
    """

    def __init__(
        self,
        starts: torch.Tensor,
        added: torch.Tensor,
        *,
        total: int,
        max_count: int,
        max_end: int,
        latest: int,
        verified: torch.Tensor | None = None,
    ) -> None:
        first, ends = added.cumsum(0) - added, starts + added
        places = torch.arange(total, device=added.device)
        rows = torch.searchsorted(first, places, right=True) - 1
        within, grid = places - first[rows], torch.arange(max_count, device=added.device)
        index = {
            "rows": rows,
            "row_index": torch.arange(added.shape[0], device=added.device),
            "positions": starts[rows] + within,
            "within": within,
            "first": first,
            "last": first + added - 1,
            "added": added,
            "ends": ends,
            "padded_index": first[:, None] + torch.minimum(grid, added[:, None] - 1),
            "flat_index": rows * max_count + within,
        }
        super().__init__(index, grid)
        self.max_end, self.latest = max_end, latest
        self._starts, self._verified = starts, verified
        self._twins = {}

    @property
    def verified(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: drafted tokens of each row."""
        return self.added - 1 if self._verified is None else self._verified

    def padded(self, rows: int, total: int, max_count: int, max_end: int) -> DeviceLayout:
        """The same with so many rows and tokens: short rows get longer, the first ones first."""
        missing, spare = total - self.total - (rows - self.num_rows), (0, rows - self.num_rows)
        starts, added = torch.nn.functional.pad(self._starts, spare), torch.nn.functional.pad(self.added, spare, value=1)
        room = max_count - added
        added = added + (missing - (room.cumsum(0) - room)).clamp(min=0).minimum(room)
        verified = torch.nn.functional.pad(self.verified, spare)
        return DeviceLayout(starts, added, total=total, max_count=max_count, max_end=max_end, latest=self.latest, verified=verified)

    def part(self, first: int, end: int) -> tuple[slice | torch.Tensor, RowLayout]:
        """All rows as long as the longest may be, since nobody knows better: behind a row's end its last token again."""
        places = self.padded_index[first:end]
        grid = torch.arange(places.numel(), device=self.device).view(places.shape)
        index = {
            "rows": torch.arange(first, end, device=self.device).repeat_interleave(self.max_count),
            "within": torch.arange(self.max_count, device=self.device).repeat(end - first),
            "positions": self.positions[places].flatten(),
            "first": grid[:, 0],
            "added": self.added[first:end],
            "padded_index": grid,
        }
        return places.flatten(), TensorLayout(index, grid[0])

    def on(self, device: torch.device) -> RowLayout:
        if device == self.device:
            return self
        if device not in self._twins:
            self._twins[device] = DeviceLayout(
                self._starts.to(device),
                self.added.to(device),
                total=self.total,
                max_count=self.max_count,
                max_end=self.max_end,
                latest=self.latest,
                verified=self.verified.to(device),
            )
        return self._twins[device]
