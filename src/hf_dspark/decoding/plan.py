"""What a round verifies, and what the host hears of it: in one wait where the lengths are chosen on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from hf_dspark.budgets.budget import Budget, Drafts, LiveRows, Proposal, require_confidence
from hf_dspark.cache.layout import DeviceLayout, RowLayout
from hf_dspark.decoding.verify import Conclusion, DraftBlock


@dataclass(frozen=True)
class Plan:
    """What a round drafts and verifies.

    Attributes:
        drafted (`list[int]`): tokens drafted for each live row.
        limits (`list[int]`): most of them that can be verified.
        verified (`list[int]`, *optional*): l_r; None where the device chooses them.
        total (`int`): their sum.
        confidence (`torch.Tensor` of shape `(R, n)`, *optional*): the confidences that decided it, on the host.
    """

    drafted: list[int]
    limits: list[int]
    verified: list[int] | None
    total: int
    confidence: torch.Tensor | None = None

    @classmethod
    def of(cls, budget: Budget, proposal: Proposal, live: LiveRows, block: DraftBlock, *, on_device: bool) -> Plan:
        """What the budget says, never past what a row may still emit.

        Args:
            budget (`Budget`), proposal (`Proposal`), live (`LiveRows`), block (`DraftBlock`): of the round.
            on_device (`bool`): lengths may be left to the device.
        Raises:
            ValueError: if the budget asks for what was not drafted.
        """
        rows = len(live.room)
        if proposal.length == 0:
            return cls([0] * rows, [0] * rows, [0] * rows, 0)
        chosen = None if proposal.rows is None else set(proposal.rows)
        drafted = [proposal.length if chosen is None or r in chosen else 0 for r in range(rows)]
        limits = list(map(min, drafted, live.room))
        total = budget.total(Drafts(tuple(limits), None, live)) if on_device and any(limits) else None
        if total is not None:
            require_confidence(budget, Drafts(tuple(limits), block.confidence))
            if total < 0:
                raise ValueError(f"Budget {budget!r} asked for {total} tokens in all; allowed are 0 and more.")
            total = min(total, sum(limits))
            known = {0: [0] * rows, sum(limits): limits}.get(total, [total] if rows == 1 else None)
            return cls(drafted, limits, known, total)
        confidence = block.confidence.cpu().clone() if budget.needs_confidence and block.confidence is not None else None
        lengths = budget.plan(Drafts(tuple(limits), confidence, live))
        if len(lengths) != rows or not 0 <= min(lengths) <= max(lengths) <= proposal.length:
            raise ValueError(f"Budget {budget!r} planned {lengths} for {rows} rows; allowed are 0..{proposal.length}, one a row.")
        verified = list(map(min, lengths, limits))
        return cls(drafted, limits, verified, sum(verified), confidence)

    def layout(self, starts: Sequence[int], block: DraftBlock, device: torch.device) -> RowLayout:
        """The pass over [x_0, x_1..x_{l_r}] of rows that hold so many tokens."""
        if self.verified is not None:
            return RowLayout(starts, [1 + length for length in self.verified], device)
        host = torch.from_numpy(np.array([starts, self.limits])).to(device, non_blocking=True)
        lengths = top_lengths(cast(torch.Tensor, block.confidence), host[1], self.total)
        # The device alone knows how long the longest row is, so it is taken to be as long as it may be.
        most = [min(limit, self.total) for limit in self.limits]
        ends = [start + 1 + length for start, length in zip(starts, most, strict=True)]
        total = len(most) + self.total
        return DeviceLayout(host[0], 1 + lengths, total=total, max_count=1 + max(most), max_end=max(ends), latest=max(starts))


@dataclass(frozen=True)
class Heard:
    """What the host knows of a round once it is over, for each row: its first place in the pass, tokens verified, accepted, and that
    remain, whether it ends; whether every distribution can be drawn from; the round's confidences `(R, n)`.
    """

    finite: bool
    firsts: list[int]
    verified: list[int]
    accepted: list[int]
    kept: list[int]
    ended: list[bool]
    confidence: torch.Tensor | None = None

    @classmethod
    def of(cls, conclusion: Conclusion, layout: RowLayout, plan: Plan, confidence: torch.Tensor | None) -> Heard:
        """Waits for the device, once.

        Args:
            conclusion (`Conclusion`), layout (`RowLayout`), plan (`Plan`): of the round.
            confidence (`torch.Tensor` of shape `(R, n)`, *optional*): on the device, where the budget is to hear it.
        """
        columns, rows = [conclusion.host], conclusion.host.shape[0]
        if isinstance(layout, DeviceLayout):
            columns += [layout.first[:rows, None], layout.verified[:rows, None]]
        late = confidence if plan.confidence is None else None
        if late is not None:
            columns.append(late[:rows].float().view(torch.int32).long())  # bit for bit
        numbers = np.array((columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)).tolist(), dtype=np.int64)
        firsts, verified = numbers[:, 3:5].T.tolist() if plan.verified is None else (layout.firsts[:rows], plan.verified)
        heard = plan.confidence
        if late is not None:
            heard = torch.from_numpy(numbers[:, -late.shape[1] :].astype(np.int32).view(np.float32))
        accepted, last = numbers[:, 1], numbers[:, 2]
        kept, ended = np.minimum(accepted, last) + 1, last <= accepted
        return cls(bool(numbers[0, 0]), firsts, verified, accepted.tolist(), kept.tolist(), ended.tolist(), heard)


def top_lengths(confidence: torch.Tensor, limits: torch.Tensor, total: int) -> torch.Tensor:
    """l_r of each row if the `total` drafted tokens of highest survival are verified, on their device: `budgets.admission.admit_top`.

    Args:
        confidence (`torch.Tensor` of shape `(R, n)`): c_k; one that is not a number ends its row.
        limits (`torch.LongTensor` of shape `(R,)`): most tokens of each row.
        total (`int`): at most the sum of the limits.
    Returns:
        `torch.LongTensor` of shape `(R,)`.
    """
    rows, length = confidence.shape
    survival = confidence.double().nan_to_num(0.0).cumprod(1)
    inside = torch.arange(length, device=limits.device) < limits[:, None]
    # Of equal ones the earlier position first, then the earlier row.
    order = torch.where(inside, survival, -1.0).t().flatten().sort(descending=True, stable=True).indices[:total]
    return torch.zeros_like(limits).scatter_add_(0, order % rows, torch.ones_like(order))
