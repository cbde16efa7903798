"""The live rows: the one owner of their ids, their lengths, and of what target and drafter remember of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hf_dspark.cache.kv_cache import RowCache, order_without
from hf_dspark.cache.layout import RowLayout


@dataclass(frozen=True)
class FinishedRow:
    """A row that has ended.

    Attributes:
        request (`int`): its number.
        ids (`torch.LongTensor` of shape `(n,)`): all of it, padding and prompt included.
        prompt_end (`int`): where its answer begins.
    """

    request: int
    ids: torch.Tensor
    prompt_end: int

    @property
    def new_tokens(self) -> list[int]:
        """The answer."""
        return self.ids[self.prompt_end :].tolist()


@dataclass
class State:
    """Rows that are being decoded, by place 0..R-1; a row's place changes as others leave, its request number does not.

    The committed tokens of a row are `ids[place, : lengths[place]]`. The last of them is the anchor x_0: it is in neither cache yet.
    Whatever lies beyond is scratch: a drafted block is written there and overwritten by what is committed.

    Args:
        device (`torch.device`): where ids live.
        limit (`int`, *optional*): longest row that will come, drafted block included; buffers do not grow beyond it.

    Attributes:
        requests (`list[int]`): number of each row's request.
        lengths (`list[int]`): committed tokens of each row, as the caller sees them: masked ones included.
        prompt_ends (`list[int]`): where each row's answer begins.
        masked (`list[int]`): tokens of each prompt that the attention mask hides; they are in no cache and have no position.
        ids (`torch.LongTensor` of shape `(>= R, capacity)`).
        masked_at (`torch.BoolTensor`, *optional*): true at the masked tokens, of the shape of `ids`; None where there are none.
        anchors (`torch.LongTensor` of shape `(R,)`): x_0 of each row.
        target_cache, drafter_cache (`RowCache`): rows as here. The target's holds `context_lengths` tokens of each, the drafter's as
            many less the pending ones.
        pending (`list[list[torch.Tensor]]`): hidden states of the tapped layers, `(n, taps * hidden)`, of each row's committed tokens
            that the drafter has not read yet.
    """

    device: torch.device
    limit: int | None = None
    requests: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prompt_ends: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    pending: list[list[torch.Tensor]] = field(default_factory=list)
    pending_counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        self.masked_at: torch.Tensor | None = None
        self.anchors = torch.empty(0, dtype=torch.long, device=self.device)
        self.target_cache, self.drafter_cache = RowCache(self.limit), RowCache(self.limit)

    @property
    def num_rows(self) -> int:
        return len(self.requests)

    @property
    def context_lengths(self) -> list[int]:
        """Tokens of each row that the target has read: all committed ones but the anchor. Also the anchor's position."""
        return [length - masked - 1 for length, masked in zip(self.lengths, self.masked, strict=True)]

    def add_pending(self, place: int, states: torch.Tensor) -> None:
        """Keep hidden states `(n, taps * hidden)` of a row's newly committed tokens until the drafter reads them."""
        self.pending[place].append(states)
        self.pending_counts[place] += len(states)

    def clear_pending(self) -> None:
        """The drafter has read all hidden states."""
        self.pending, self.pending_counts = [[] for _ in self.pending], [0] * len(self.pending)

    def lengths_on_device(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(R,)`: `lengths`."""
        return torch.tensor(self.lengths).to(self.device, non_blocking=True)

    def prefix(self, place: int, extra: int = 0) -> torch.Tensor:
        """Ids of a row up to `extra` tokens past the committed ones, shape `(1, n)`; a view."""
        return self.ids[place : place + 1, : self.lengths[place] + extra]

    def add_rows(self, requests: Sequence[int], texts: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None = None) -> None:
        """Append rows whose prompts are yet to be read.

        Args:
            requests (`Sequence[int]`): numbers that no live row has.
            texts (`list[torch.LongTensor]` of shapes `(n_r,)`): prompts as the caller sees them.
            masks (`list[torch.BoolTensor]` of shapes `(n_r,)`, *optional*): false at masked tokens.
        """
        first, lengths = self.num_rows, [len(text) for text in texts]
        self.requests += requests
        self.lengths += lengths
        self.prompt_ends += lengths
        self.masked += [0] * len(texts)
        self.pending += [[] for _ in texts]
        self.pending_counts += [0] * len(texts)
        for cache in (self.target_cache, self.drafter_cache):
            cache.add_rows(len(texts))
        self.reserve(self.num_rows, max(self.lengths) + 1)
        if masks is not None and self.masked_at is None and not all(bool(mask.all()) for mask in masks):
            self.masked_at = torch.zeros_like(self.ids, dtype=torch.bool)
        for place, text in enumerate(texts, first):
            self.ids[place, : len(text)] = text
            if self.masked_at is not None:
                self.masked_at[place] = False
                if masks is not None:
                    self.masked_at[place, : len(text)] = ~masks[place - first]
                    self.masked[place] = len(text) - int(masks[place - first].sum())

    def write_draft(self, tokens: torch.Tensor, first: int = 0) -> None:
        """Write drafted tokens behind the committed ones without committing them.

        Args:
            tokens (`torch.LongTensor` of shape `(R - first, n)`): of the rows from place `first` on.
        """
        self.reserve(self.num_rows, max(self.lengths) + tokens.shape[1])
        places = np.add.outer(self.lengths[first:], np.arange(tokens.shape[1]))
        self.ids[first : self.num_rows].scatter_(1, torch.from_numpy(places).to(self.device, non_blocking=True), tokens)

    def commit(self, tokens: torch.Tensor, counts: Sequence[int], anchors: torch.Tensor, first: int = 0) -> None:
        """Commit the first `counts[r]` of `tokens[r]` to each row from place `first` on.

        Args:
            tokens (`torch.LongTensor` of shape `(R - first, n)`): accepted tokens and the target's own; what lies beyond the counts is
                scratch.
            counts (`Sequence[int]`): at least 1 for each row that goes on.
            anchors (`torch.LongTensor` of shape `(R - first,)`): the last committed token of each row that goes on.
            first (`int`): 0, or the first of the rows that have just joined.
        """
        self.write_draft(tokens, first)
        for place, count in enumerate(counts, first):
            self.lengths[place] += count
        self.anchors = torch.cat([self.anchors[:first], anchors]) if first else anchors

    def finish(self, places: Sequence[int]) -> list[FinishedRow]:
        """The rows at these places as they leave."""
        return [FinishedRow(self.requests[p], self.ids[p, : self.lengths[p]].clone(), self.prompt_ends[p]) for p in places]

    def remove_rows(self, gone: Sequence[int]) -> None:
        """Rows leave, and what is remembered of them; the last ones move into their places."""
        order = order_without(self.num_rows, gone)
        context = self.context_lengths
        read = [length - pending for length, pending in zip(context, self.pending_counts, strict=True)]
        self.target_cache.keep_rows(order, context)
        self.drafter_cache.keep_rows(order, read)
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        self.ids, self.anchors = self.ids[index], self.anchors[index]
        self.masked_at = None if self.masked_at is None else self.masked_at[index]
        for name in ("requests", "lengths", "prompt_ends", "masked", "pending", "pending_counts"):
            values = getattr(self, name)
            setattr(self, name, [values[old] for old in order])

    def pending_layout(self) -> tuple[torch.Tensor, RowLayout] | None:
        """Hidden states that the drafter has not read yet, `(T, taps * hidden)`, and where they belong; None where there are none."""
        places = [place for place, count in enumerate(self.pending_counts) if count]
        if not places:
            return None
        counts, context = [self.pending_counts[place] for place in places], self.context_lengths
        starts = [context[place] - count for place, count in zip(places, counts, strict=True)]
        pieces = [piece for place in places for piece in self.pending[place]]
        states = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return states, RowLayout(starts, counts, self.device, row_ids=places)

    def reserve(self, rows: int, width: int) -> None:
        """Make room for so many rows and tokens a row."""
        have_rows, have = self.ids.shape
        if rows <= have_rows and width <= have:
            return
        if width > have:
            grown = width + width // 2 + 64
            have = max(width, grown if self.limit is None else min(grown, self.limit))
        for name in ("ids", "masked_at"):
            old = getattr(self, name)
            if old is not None:
                # Processors write drafted ids under inference mode, whatever comes after them without.
                with torch.inference_mode(False):
                    new = torch.zeros(max(rows, have_rows), have, dtype=old.dtype, device=old.device)
                new[:have_rows, : old.shape[1]] = old
                setattr(self, name, new)
