"""Budgets: how many tokens are drafted, and how many of them go to verification. Pure policy over confidences; knows no model and no loop.

A budget may look at c_1..c_k when it decides about token k + 1 or any later one, never at anything that depends on the token it decides
about: c_{k+1} depends on x_k, so looking ahead of the cut would let x_k decide whether x_k is verified, and bias the output (paper,
Appendix A). What it knows of rounds that are over cannot leak: their tokens are committed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_dspark.decoding.ngram_copy import Copied


@dataclass(frozen=True)
class LiveRows:
    """What is known before a round is drafted.

    Attributes:
        requests (`tuple[int, ...]`): number of each live row's request; the same all its life, and nobody else's.
        block_size (`int`): gamma, the most that can be drafted.
        room (`tuple[int, ...]`): most tokens of each row that can be of use: gamma, or fewer where the row is about to end.
        context_tokens (`int`): tokens that the longest row holds.
    """

    requests: tuple[int, ...]
    block_size: int
    room: tuple[int, ...]
    context_tokens: int = 0


@dataclass(frozen=True)
class Proposal:
    """What to draft in a round.

    Attributes:
        length (`int`): tokens a row, 0..gamma; 0 drafts nothing.
        rows (`tuple[int, ...]`, *optional*): which of the live rows, by their place among them, ascending; all where None.
    """

    length: int
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Drafts:
    """A round's drafts as a budget sees them.

    Attributes:
        limits (`tuple[int, ...]`): most tokens of each live row that can be verified: what was drafted and is of use; 0 for rows
            that were not drafted.
        confidence (`torch.Tensor` of shape `(R, n)`, *optional*): c_k, calibrated, on the host; of no meaning beyond a row's limit.
        live (`LiveRows`, *optional*): the rows.
    """

    limits: tuple[int, ...]
    confidence: torch.Tensor | None = None
    live: LiveRows | None = None

    @property
    def rows(self) -> int:
        """Live rows R."""
        return len(self.limits)


@dataclass(frozen=True)
class FinishedRound:
    """A round that is over.

    Attributes:
        requests (`tuple[int, ...]`): of each row that was live.
        drafted (`tuple[int, ...]`): tokens drafted for each.
        verified (`tuple[int, ...]`): of these, sent to verification.
        accepted (`tuple[int, ...]`): of these, standing.
        judged (`tuple[int, ...]`): of the verified ones, those before the row's end: what was decided about later ones is unknown.
        confidence (`torch.Tensor` of shape `(R, n)`, *optional*): c_k, calibrated, on the host; given where the budget needs it.
        confidence_logits (`torch.Tensor` of shape `(R, n)`, *optional*): the same before calibration and sigmoid; where someone listens.
        copied (`Copied`, *optional*): what the draft was mixed with, on the host; where someone listens.
        seconds (`float`, *optional*): that the round took.
        draft_seconds (`float`, *optional*): of these, the draft's; None where the device does not tell while it works.
        waited_seconds (`float`): between the end of the round before and the beginning of this one.
    """

    requests: tuple[int, ...]
    drafted: tuple[int, ...]
    verified: tuple[int, ...]
    accepted: tuple[int, ...]
    judged: tuple[int, ...]
    confidence: torch.Tensor | None = None
    confidence_logits: torch.Tensor | None = None
    seconds: float | None = None
    draft_seconds: float | None = None
    copied: Copied | None = None
    waited_seconds: float = 0.0


class Budget:
    """Decides, once a round, what is drafted and how much of it is verified. Subclass it for a policy of your own.

    `needs_confidence` says whether `plan` reads confidences; where it does not, they are not computed. `longest` is the most tokens that
    `propose` ever asks for, None for gamma; 0 never drafts at all, and the drafter is left alone.
    """

    needs_confidence: bool = False
    longest: int | None = None

    def start(self, costs: Callable[[], Any]) -> Budget:
        """The budget of one call, with no memory of others.

        Args:
            costs (`Callable`): gives the machine's `Costs`; measuring them takes time, so only who needs them asks.
        """
        return self

    def propose(self, live: LiveRows) -> Proposal:
        """What to draft, before anything is drafted: all rows, the whole block."""
        return Proposal(live.block_size if self.longest is None else min(self.longest, live.block_size))

    def plan(self, drafts: Drafts) -> list[int]:
        """Verified lengths l_r, one a row, each 0..limit."""
        raise NotImplementedError

    def learn(self, finished: FinishedRound) -> None:
        """Hear of a round that is over."""


class FullBudget(Budget):
    """Verify the whole block: l_r = gamma."""

    def plan(self, drafts: Drafts) -> list[int]:
        return list(drafts.limits)

    def __repr__(self) -> str:
        return "full"


class StaticBudget(Budget):
    """Draft and verify the first `tokens` of every block."""

    def __init__(self, tokens: int) -> None:
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            raise ValueError(f"A static budget is a whole number of tokens, 0 or more; got {tokens!r}. Example: 'static:4'.")
        self.tokens = self.longest = tokens

    def plan(self, drafts: Drafts) -> list[int]:
        return [min(self.tokens, limit) for limit in drafts.limits]

    def __repr__(self) -> str:
        return f"static:{self.tokens}"


class ThresholdBudget(Budget):
    """Verify up to, and not including, the first token whose confidence c_k is below `probability`."""

    needs_confidence = True

    def __init__(self, probability: float) -> None:
        if not isinstance(probability, (int, float)) or not 0.0 <= probability <= 1.0:
            raise ValueError(f"A confidence threshold lies between 0 and 1; got {probability!r}. Example: 'threshold:0.5'.")
        self.probability = float(probability)

    def plan(self, drafts: Drafts) -> list[int]:
        confidence = require_confidence(self, drafts)
        lengths = (confidence >= self.probability).long().cumprod(dim=1).sum(dim=1).tolist()
        return [min(length, limit) for length, limit in zip(lengths, drafts.limits, strict=True)]

    def __repr__(self) -> str:
        return f"threshold:{self.probability:g}"


class CappedBudget(Budget):
    """Another budget, with at most `max_verify_tokens` tokens in a verification pass, each row's anchor included.

    Tokens are admitted position by position, and within a position row by row, until the pass is full: who is cut never depends on the
    token that is cut. Anchors always go, so with more rows than tokens nothing is drafted.

    Args:
        budget (`Budget`): what to cap.
        max_verify_tokens (`int`): at least 1.
    """

    def __init__(self, budget: Budget, max_verify_tokens: int) -> None:
        check_cap(max_verify_tokens)
        self.budget = budget
        self.max_verify_tokens = max_verify_tokens
        self.needs_confidence = budget.needs_confidence
        self.longest = budget.longest

    def start(self, costs: Callable[[], Any]) -> Budget:
        return CappedBudget(self.budget.start(costs), self.max_verify_tokens)

    def propose(self, live: LiveRows) -> Proposal:
        proposal = self.budget.propose(live)
        return Proposal(min(proposal.length, max(self.max_verify_tokens - len(live.requests), 0)), proposal.rows)

    def plan(self, drafts: Drafts) -> list[int]:
        return capped(self.budget.plan(drafts), max(self.max_verify_tokens - drafts.rows, 0))

    def learn(self, finished: FinishedRound) -> None:
        self.budget.learn(finished)

    def __repr__(self) -> str:
        return f"{self.budget!r} within {self.max_verify_tokens} tokens"


def capped(lengths: Sequence[int], tokens: int) -> list[int]:
    """Cut planned lengths down to `tokens` in all, later positions first, and within a position later rows first.

    Args:
        lengths (`list[int]`): planned l_r.
        tokens (`int`): sum allowed.
    Returns:
        `list[int]`: never longer, with the sum `min(sum(lengths), tokens)`.
    """
    kept = [0] * len(lengths)
    left = min(tokens, sum(lengths))
    position = 0
    while left:
        for row, length in enumerate(lengths):
            if length > position and left:
                kept[row] += 1
                left -= 1
        position += 1
    return kept


def check_cap(max_verify_tokens: int | None) -> None:
    """Refuse a cap that is no positive whole number; None is no cap.

    Raises:
        ValueError: with what is allowed.
    """
    if max_verify_tokens is not None and (
        not isinstance(max_verify_tokens, int) or isinstance(max_verify_tokens, bool) or max_verify_tokens < 1
    ):
        raise ValueError(f"max_verify_tokens is a whole number of tokens in one pass, 1 or more; got {max_verify_tokens!r}.")


def require_confidence(budget: Budget, drafts: Drafts) -> torch.Tensor:
    """The drafts' confidences.

    Raises:
        ValueError: if there are none.
    """
    if drafts.confidence is None:
        raise ValueError(
            f"Budget {budget!r} needs a drafter with a confidence head; this one has none. Use 'full' or 'static:N', "
            "or train the drafter with a confidence head."
        )
    return drafts.confidence
