"""The budget interface, its records, and the budgets that need no costs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hf_dspark.budgets.cost_model import Costs


@dataclass(frozen=True)
class LiveRows:
    """The live rows before a round is drafted.

    Attributes:
        requests (`tuple[int, ...]`): number of each row's request, unique and unchanged for the whole call.
        block_size (`int`): gamma, the most tokens that can be drafted for a row.
        room (`tuple[int, ...]`): most drafted tokens of each row that can be of use: gamma, or fewer where the row is about to end.
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
        rows (`tuple[int, ...]`, *optional*): which of the live rows, by ascending index; all where None.
    """

    length: int
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Drafts:
    """A round's drafts.

    Attributes:
        limits (`tuple[int, ...]`): most tokens of each live row that can be verified: what was drafted and is of use; 0 for rows
            that were not drafted for.
        confidence (`torch.Tensor` of shape `(R, n)`, *optional*): c_k, calibrated, on the host; undefined beyond a row's limit.
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
    """A finished round.

    Attributes:
        requests (`tuple[int, ...]`): of each row that was live.
        drafted (`tuple[int, ...]`): tokens drafted for each row.
        verified (`tuple[int, ...]`): of these, sent to verification.
        accepted (`tuple[int, ...]`): of these, accepted.
        judged (`tuple[int, ...]`): of the verified ones, those before the row's end: the verdict on later ones is unknown.
        confidence (`torch.Tensor` of shape `(R, n)`, *optional*): c_k, calibrated, on the host; present where the budget needs it.
        confidence_logits (`torch.Tensor` of shape `(R, n)`, *optional*): the same before calibration and sigmoid; for a round callback.
        seconds (`float`, *optional*): that the round took.
        draft_seconds (`float`, *optional*): of these, the draft's; None where the device cannot tell without a wait.
        copy_features (`torch.Tensor` of shape `(R, n, 9)`, *optional*): the features of n-gram copies, on the host; for a round callback
            with `wants_copy_features`.
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
    copy_features: torch.Tensor | None = None


class RoundCallback(Protocol):
    """Called after every finished round; may set the temperatures of the next.

    Attributes:
        temperatures (`Sequence[float]`, *optional*): T_1..T_gamma of the confidences; the checkpoint's where None.
        wants_copy_features (`bool`): whether `FinishedRound.copy_features` is to be filled in.
    """

    wants_copy_features: bool

    @property
    def temperatures(self) -> Sequence[float] | None: ...

    def on_round_end(self, finished: FinishedRound) -> None: ...


class Budget:
    """Decides, once a round, what is drafted and how much of it is verified. Subclass it for a policy of your own.

    A round calls `propose` before the draft, `plan` after it and `learn` when it is over; `plan` is left out where nothing was drafted.
    A call of `generate` uses the copy that `start` gives, so a budget may keep state in its attributes.

    To stay exact, `plan` must not let anything that depends on a drafted token decide whether that token is verified: c_{k+1} depends on
    x_k (Source: paper, Appendix A). Whatever `learn` is given may be used, because its tokens are committed.

    Attributes:
        needs_confidence (`bool`): whether `plan` reads confidences; where it does not, they are not computed.
        reads_costs (`bool`): whether `start` reads costs; where it does not, they are not looked up.
        longest (`int`, *optional*): most tokens that `propose` ever returns, gamma where None; 0 leaves the drafter out altogether.
    """

    needs_confidence: bool = False
    reads_costs: bool = False
    longest: int | None = None

    def start(self, costs: Costs | None, *, learn_costs: bool) -> Budget:
        """The budget of one call of `generate`: a copy, so that no state passes from call to call or between threads.

        Args:
            costs (`Costs`, *optional*): what rounds cost, from a stored profile or from `prior_costs`; None without `reads_costs`.
            learn_costs (`bool`): whether finished rounds may correct them. What is drafted and verified then depends on the clock, so it is
                False for sampled calls, whose draws repeat by their seed.
        Returns:
            `Budget`: started.
        """
        return copy.deepcopy(self)

    def propose(self, live: LiveRows) -> Proposal:
        """Decides what is drafted; called before each round's draft. The base class proposes the whole block for all rows.

        May read `live`, and everything that `learn` was given before. Reads no confidence: there is none yet.

        Args:
            live (`LiveRows`): the R live rows.
        Returns:
            `Proposal`: with a length of 0..gamma tokens; anything else is a ValueError of the round.
        """
        return Proposal(live.block_size if self.longest is None else min(self.longest, live.block_size))

    def plan(self, drafts: Drafts) -> list[int]:
        """Decides how many drafted tokens of each row are verified; called between draft and verification.

        Whether token k of a row is verified may depend on c_1..c_k of that row, on confidences of other rows as long as these are ranked
        by survival (see `LoadAwareBudget`), and on finished rounds; never on c_{k+1} or any later one of the row.

        Args:
            drafts (`Drafts`): limits of the R live rows, and confidences `(R, n)` where `needs_confidence` is True.
        Returns:
            `list[int]`: l_r of each row, 0..n; the round cuts it to the row's limit.
        Raises:
            ValueError: where `needs_confidence` is True and the drafter has no confidence head.
        """
        raise NotImplementedError

    def total(self, drafts: Drafts) -> int | None:
        """How many drafted tokens are verified in all, where finished rounds alone decide that: those of highest survival are chosen on
        the device then, `plan` is not called, and the host need not wait for the draft. None, as here, leaves it to `plan`. Where
        logits processors have to be called one by one, `plan` decides all the same.

        Args:
            drafts (`Drafts`): without confidences.
        Raises:
            ValueError: by the round, where the drafter has no confidence head to rank tokens by.
        """
        return None

    def learn(self, finished: FinishedRound) -> None:
        """Takes in a finished round; called once after each, before the next `propose`.

        Args:
            finished (`FinishedRound`): counts of tokens by row, confidences where `needs_confidence` is True, and seconds.
        """


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

    Tokens are admitted position by position, and within a position row by row, until the pass is full: whether a token is cut never
    depends on the token itself. Anchors always go, so with more rows than tokens nothing is drafted.

    Args:
        budget (`Budget`): what to cap.
        max_verify_tokens (`int`): at least 1.
    """

    def __init__(self, budget: Budget, max_verify_tokens: int) -> None:
        check_cap(max_verify_tokens)
        self.budget = budget
        self.max_verify_tokens = max_verify_tokens
        self.needs_confidence = budget.needs_confidence
        self.reads_costs = budget.reads_costs
        self.longest = budget.longest

    def start(self, costs: Costs | None, *, learn_costs: bool) -> Budget:
        return CappedBudget(self.budget.start(costs, learn_costs=learn_costs), self.max_verify_tokens)

    def propose(self, live: LiveRows) -> Proposal:
        proposal = self.budget.propose(live)
        return Proposal(min(proposal.length, max(self.max_verify_tokens - len(live.requests), 0)), proposal.rows)

    def plan(self, drafts: Drafts) -> list[int]:
        return capped(self.budget.plan(drafts), max(self.max_verify_tokens - drafts.rows, 0))

    def total(self, drafts: Drafts) -> int | None:
        total = self.budget.total(drafts)
        return None if total is None else min(total, max(self.max_verify_tokens - drafts.rows, 0))

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
    admitted = [0] * len(lengths)
    left = min(tokens, sum(lengths))
    position = 0
    while left:
        for row, length in enumerate(lengths):
            if length > position and left:
                admitted[row] += 1
                left -= 1
        position += 1
    return admitted


def check_cap(max_verify_tokens: int | None) -> None:
    """Refuse a cap that is not a positive whole number; None is no cap.

    Raises:
        ValueError: with what is allowed.
    """
    if max_verify_tokens is not None and (
        not isinstance(max_verify_tokens, int) or isinstance(max_verify_tokens, bool) or max_verify_tokens < 1
    ):
        raise ValueError(f"max_verify_tokens is a whole number of tokens in one pass, 1 or more; got {max_verify_tokens!r}.")


def require_confidence(budget: Budget, drafts: Drafts) -> torch.Tensor:
    """The drafts' confidences, `(R, n)`.

    Raises:
        ValueError: if there are none.
    """
    if drafts.confidence is None:
        raise ValueError(
            f"Budget {budget!r} needs a drafter with a confidence head; this one has none. Use 'full' or 'static:N', "
            "or train the drafter with a confidence head."
        )
    return drafts.confidence
