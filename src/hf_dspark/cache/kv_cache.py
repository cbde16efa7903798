"""Keys and values of the live rows, without padding and without copies.

A row is one request. Its tokens lie at positions 0, 1, .. of its own row of one buffer a layer. The cache holds no lengths: who owns
the rows says with each pass where it writes and how far it reads, so rolling back is writing again at an earlier position, and
positions at or beyond a row's committed length are scratch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_dspark.cache.layout import RowLayout


class RowCache:
    """One buffer of keys and one of values a layer, of shape `(rows, heads, capacity, head_dim)`, grown by doubling up to `limit`.

    Rows are numbered 0..R-1 without holes.

    Args:
        limit (`int`, *optional*): most tokens a row; growing stops there.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.num_rows = 0
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._row_capacity = 0
        self._capacity = 0

    def add_rows(self, count: int) -> None:
        """Append `count` empty rows."""
        self.num_rows += count
        self._row_capacity = max(self._row_capacity, self.num_rows)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a row; growing doubles, so that a token is copied a bounded number of times."""
        if length > self._capacity:
            doubled = max(2 * self._capacity, 64)
            self._capacity = max(length, doubled if self.limit is None else min(doubled, self.limit))

    def grow(self, rows: int, length: int) -> None:
        """Make all buffers large enough for so many rows and tokens a row, at once."""
        self._row_capacity = max(self._row_capacity, rows)
        self.reserve(length)
        for store in (self.keys, self.values):
            for layer, buffer in store.items():
                if buffer.shape[0] < self._row_capacity or buffer.shape[2] < self._capacity:
                    store[layer] = self._grown(buffer, buffer[:, :, 0])

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, layout: RowLayout) -> None:
        """Store the tokens of one flattened pass at their positions.

        Args:
            layer (`int`): layer index.
            keys (`torch.Tensor` of shape `(T, heads, head_dim)`): new keys.
            values (`torch.Tensor` of shape `(T, heads, value_dim)`): new values.
            layout (`RowLayout`): where they go.
        """
        self.reserve(layout.max_end)
        for store, new in ((self.keys, keys), (self.values, values)):
            buffer = store.get(layer)
            if buffer is None or buffer.shape[0] < self._row_capacity or buffer.shape[2] < self._capacity:
                buffer = store[layer] = self._grown(buffer, new)
            if layout.num_rows == 1:
                buffer[layout.first_row, :, layout.starts[0] : layout.max_end] = new.transpose(0, 1)
            else:
                buffer[layout.rows, :, layout.positions] = new

    def _grown(self, old: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked key has weight 0, and 0 * NaN would still be NaN. Also where a call runs under inference mode the next
        # turn, which writes here too, may not.
        with torch.inference_mode(False):
            new = torch.zeros(self._row_capacity, like.shape[1], self._capacity, like.shape[2], dtype=like.dtype, device=like.device)
        if old is not None:
            new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def view(self, layer: int, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the layout's rows up to its longest end.

        Returns:
            two `torch.Tensor` of shape `(R, heads, max_end, head_dim)`: views; copies only where the rows do not follow each other.
        """
        if layout.row_ids is not None:
            return self.keys[layer][layout.row_index, :, : layout.max_end], self.values[layer][layout.row_index, :, : layout.max_end]
        rows = slice(layout.first_row, layout.first_row + layout.num_rows)
        return self.keys[layer][rows, :, : layout.max_end], self.values[layer][rows, :, : layout.max_end]

    def keep_rows(self, order: Sequence[int], lengths: Sequence[int]) -> None:
        """Rows leave: row i becomes what was row `order[i]`.

        Args:
            order (`Sequence[int]`): from `order_without`, so that no row is overwritten before it has moved.
            lengths (`Sequence[int]`): tokens to move of each old row.
        """
        buffers = [*self.keys.values(), *self.values.values()]
        for new, old in enumerate(order):
            length = lengths[old]
            if new != old and length and buffers:  # A row without tokens may lie beyond buffers that have not grown yet.
                torch._foreach_copy_([one[new, :, :length] for one in buffers], [one[old, :, :length] for one in buffers])
        self.num_rows = len(order)

    def fork(self, limit: int | None = None) -> RowCache:
        """The same buffers under another owner, without rows yet: what it writes beyond the committed tokens is scratch to this one."""
        twin = RowCache(limit)
        twin.keys, twin.values = dict(self.keys), dict(self.values)
        twin._row_capacity, twin._capacity = self._row_capacity, self._capacity
        return twin


class BufferCache(RowCache):
    """Buffers that somebody else owns and keeps large enough, for functions that are traced once and run with any of them.

    Args:
        keys, values (`dict[int, torch.Tensor]`): of each layer, `(rows, heads, capacity, head_dim)`.
    """

    def __init__(self, keys: dict[int, torch.Tensor], values: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, layout: RowLayout) -> None:
        self.keys[layer][layout.rows, :, layout.positions] = keys
        self.values[layer][layout.rows, :, layout.positions] = values


def order_without(num_rows: int, gone: Sequence[int]) -> list[int]:
    """The rows that stay: the last ones move into the holes, so that few tokens are copied.

    Returns:
        `list[int]`: for each remaining row, in the new order, its number before.
    """
    leaving = set(gone)
    order = list(range(num_rows))
    for hole in sorted(leaving):
        while order and order[-1] in leaving:
            order.pop()
        if hole >= len(order):
            break
        order[hole] = order.pop()
    return order
