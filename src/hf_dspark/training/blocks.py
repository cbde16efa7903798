"""Cuts training blocks out of padded rows: anchors, labels, masks. Does not know models, losses or files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockTargets:
    """What every block position is compared with. All tensors have the shape `(batch, anchors, block_size)`.

    Source: paper section 3.2 and Eqs. 8-12. With anchor position p and block position k = 1..block_size:

    Args:
        target_ids (`torch.Tensor`): the true token at p + k, the label of the cross entropy.
        prev_ids (`torch.Tensor`): the true token at p + k - 1, fed to the sequential head (teacher forcing).
        target_index (`torch.Tensor`): p + k - 1, the row position whose target logits define p_t for position k.
        position_mask (`torch.Tensor`): bool; True where the position is supervised. Contiguous from k = 1: it ends at
            the first token outside the response or the row. Masked entries of the other fields are in-range fillers.
    """

    target_ids: Tensor
    prev_ids: Tensor
    target_index: Tensor
    position_mask: Tensor


def _inside(loss_mask: Tensor, lengths: Tensor) -> Tensor:
    if loss_mask.dim() != 2 or loss_mask.dtype != torch.bool:
        raise ValueError(
            f"loss_mask has dtype {loss_mask.dtype} and shape {tuple(loss_mask.shape)}; allowed: bool, (batch, "
            "sequence). Build it with hf_dspark.training.data.collate."
        )
    if lengths.shape != loss_mask.shape[:1]:
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}; allowed: one length a row, ({loss_mask.shape[0]},). Pass the rows' own lengths."
        )
    columns = torch.arange(loss_mask.shape[1], device=loss_mask.device)
    return loss_mask & (columns < lengths.unsqueeze(1))


def sample_anchors(loss_mask: Tensor, lengths: Tensor, num_anchors: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw anchor positions uniformly, without replacement, among those with something to predict.

    An anchor is a response token whose next token is a response token too. The result is no wider than the row with
    the most candidates needs, so short rows cost little.

    Source: DeepSpec's training code (released recipe: 512 anchors a sequence). Differs: the width is trimmed.

    Args:
        loss_mask (`torch.Tensor` of shape `(batch, sequence)`): bool, True on response tokens.
        lengths (`torch.Tensor` of shape `(batch,)`): tokens of each row without padding.
        num_anchors (`int`): at most this many anchors a row.
        generator (`torch.Generator`, *optional*): CPU generator of the draw; the same state gives the same anchors.
    Returns:
        `tuple` of `torch.Tensor` of shape `(batch, anchors)`: increasing positions (0 where there is none), and a
        bool tensor that is True where the anchor exists.
    Raises:
        ValueError: if num_anchors is below 1 or the mask has another dtype or shape.
    """
    if num_anchors < 1:
        raise ValueError(f"num_anchors is {num_anchors}; allowed: 1 or more. Use 16 to 512.")
    response = _inside(loss_mask, lengths)
    candidates = response.clone()
    candidates[:, -1:] = False
    candidates[:, :-1] &= response[:, 1:]
    counts = candidates.sum(dim=1).clamp(max=num_anchors)
    width = int(counts.max()) if counts.numel() else 0
    keys = torch.rand(candidates.shape, generator=generator).to(loss_mask.device)
    order = keys.masked_fill(~candidates, 2.0).argsort(dim=1)[:, :width]
    valid = torch.arange(width, device=loss_mask.device) < counts.unsqueeze(1)
    positions = order.masked_fill(~valid, loss_mask.shape[1]).sort(dim=1).values
    return positions.masked_fill(~valid, 0), valid


def block_targets(
    input_ids: Tensor,
    loss_mask: Tensor,
    lengths: Tensor,
    anchor_positions: Tensor,
    anchor_valid: Tensor,
    block_size: int,
) -> BlockTargets:
    """Labels, previous tokens and masks of the blocks behind the given anchors.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, sequence)`): token ids, padded on the right.
        loss_mask (`torch.Tensor` of shape `(batch, sequence)`): bool, True on response tokens.
        lengths (`torch.Tensor` of shape `(batch,)`): tokens of each row without padding.
        anchor_positions (`torch.Tensor` of shape `(batch, anchors)`): from `sample_anchors`.
        anchor_valid (`torch.Tensor` of shape `(batch, anchors)`): bool, from `sample_anchors`.
        block_size (`int`): gamma, tokens predicted behind one anchor.
    Returns:
        `BlockTargets`: tensors of shape `(batch, anchors, block_size)`.
    Raises:
        ValueError: if block_size is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; allowed: 1 or more. Take it from the drafter's config.")
    response = _inside(loss_mask, lengths)
    batch, sequence = input_ids.shape
    previous = anchor_positions.unsqueeze(-1) + torch.arange(block_size, device=input_ids.device)
    here = previous + 1
    rows = torch.arange(batch, device=input_ids.device).view(-1, 1, 1)
    last = sequence - 1
    supervised = response[rows, here.clamp(max=last)] & (here <= last) & anchor_valid.unsqueeze(-1)
    return BlockTargets(
        target_ids=input_ids[rows, here.clamp(max=last)],
        prev_ids=input_ids[rows, previous.clamp(max=last)],
        target_index=previous.clamp(max=last),
        position_mask=supervised.long().cumprod(dim=-1).bool(),
    )
