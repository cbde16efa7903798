"""Cuts training blocks out of padded rows: anchors, labels, masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dspark.training.data import Batch


class BlockTargets(NamedTuple):
    """What position k = 1..block_size of a block behind an anchor at p is compared with, `(batch, anchors, block_size)`.

    Source: paper section 3.2 and Eqs. 8-12. Where `position_mask` is False the other fields are in-range fillers.
    """

    target_ids: Tensor  # the true token at p + k, the label of the cross entropy
    prev_ids: Tensor  # the true token at p + k - 1, fed to the sequential head (teacher forcing)
    target_index: Tensor  # p + k - 1, the row position whose target logits define p_t for position k
    position_mask: Tensor  # bool, supervised: contiguous from k = 1, up to the first token outside the response or the row

    def to(self, device: torch.device) -> BlockTargets:
        return BlockTargets(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Blocks:
    """A batch with its anchors drawn, `(batch, anchors)`, and its blocks cut: everything of a step that needs no model."""

    batch: Batch
    anchor_positions: Tensor
    targets: BlockTargets

    def part(self, rows: slice) -> Blocks:
        """The blocks of some rows; of the first row without any supervised position where the slice is empty, so that every process runs
        the same passes."""
        empty = rows.start >= rows.stop
        rows = slice(0, 1) if empty else rows
        batch, width = self.batch, int(self.batch.lengths[rows].max())
        targets = BlockTargets(*(tensor[rows] for tensor in self.targets))
        if empty:
            targets = targets._replace(position_mask=torch.zeros_like(targets.position_mask))
        part = Batch(batch.input_ids[rows, :width], batch.loss_mask[rows, :width], batch.lengths[rows])
        return Blocks(part, self.anchor_positions[rows], targets)


def sample_anchors(loss_mask: Tensor, num_anchors: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw at most so many anchor positions a row uniformly, without replacement, among response tokens (where the mask `(batch, sequence)`
    is True) whose next token is a response token too.

    Source: DeepSpec's training code (released recipe: 512 anchors a sequence). Differs: the result is no wider than the row with the most
    candidates needs, so short rows cost little.

    Returns:
        increasing positions `(batch, anchors)`, 0 where there is none, and a bool tensor that is True where the anchor exists.
    """
    candidates = loss_mask.clone()
    candidates[:, -1:] = False
    candidates[:, :-1] &= loss_mask[:, 1:]
    counts = candidates.sum(dim=1).clamp(max=num_anchors)
    width = int(counts.max())
    keys = torch.rand(candidates.shape, generator=generator).to(loss_mask.device)
    order = keys.masked_fill(~candidates, 2.0).argsort(dim=1)[:, :width]
    valid = torch.arange(width, device=loss_mask.device) < counts.unsqueeze(1)
    positions = order.masked_fill(~valid, loss_mask.shape[1]).sort(dim=1).values
    return positions.masked_fill(~valid, 0), valid


def block_targets(input_ids: Tensor, loss_mask: Tensor, anchor_positions: Tensor, anchor_valid: Tensor, block_size: int) -> BlockTargets:
    """Labels, previous tokens and masks of the blocks behind anchors from `sample_anchors` in ids `(batch, sequence)`."""
    batch, sequence = input_ids.shape
    previous = anchor_positions.unsqueeze(-1) + torch.arange(block_size, device=input_ids.device)
    here = previous + 1
    rows = torch.arange(batch, device=input_ids.device).view(-1, 1, 1)
    last = sequence - 1
    supervised = loss_mask[rows, here.clamp(max=last)] & (here <= last) & anchor_valid.unsqueeze(-1)
    return BlockTargets(
        target_ids=input_ids[rows, here.clamp(max=last)],
        prev_ids=input_ids[rows, previous.clamp(max=last)],
        target_index=previous.clamp(max=last),
        position_mask=supervised.long().cumprod(dim=-1).bool(),
    )


def cut_blocks(batch: Batch, *, num_anchors: int, block_size: int, generator: torch.Generator) -> Blocks:
    """Draw a batch's anchors and cut the blocks behind them; arguments as in `sample_anchors` and `block_targets`."""
    positions, valid = sample_anchors(batch.loss_mask, num_anchors, generator)
    return Blocks(batch, positions, block_targets(batch.input_ids, batch.loss_mask, positions, valid, block_size))
