"""The load-aware budgets: verified lengths that maximise accepted tokens a second, and drafts only where they pay. Pure policy; knows no
model, no loop and no clock: what things cost comes from a table, and where asked from what finished rounds took.

Source: paper section 3.2.2, Algorithm 1, and section 5.2 (the lagged variant). Differs: whether to draft at all, for whom and how far, is
decided too, from finished rounds only.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_dspark.budgets.admission import admit_early_stop, admit_top, best_count, early_stop_s, survivals
from hf_dspark.budgets.budget import Budget, Drafts, FinishedRound, LiveRows, Proposal, check_cap, require_confidence
from hf_dspark.budgets.cost_model import Costs, PassCosts
from hf_dspark.budgets.draft_planner import FIRST_REST, Memory, outlook
from hf_dspark.budgets.online_costs import FollowedCosts

# Draft lengths to choose from, beside the whole block.
_LENGTHS = (1, 2, 3, 5)
# What rests is tried again after FIRST_REST rounds, then after twice as many, up to this.
LONGEST_REST = 64
# Where shorter blocks pay, the whole block is drafted once in this many rounds, to see what lies behind the cut.
_WHOLE_BLOCK_EVERY = 64
# Leaving out more than rows none of whose last blocks was worth a token must promise this much more than drafting for all: which rows pay
# is guessed from few blocks of each, and what was chosen for its promise keeps less of it. A row more costs little beside the others.
_WORTH_CHOOSING = 1.03
# Who follows costs must see what a plain round takes, too: after so many drafted rounds one is plain, then after twice as many, up to the
# limit; after that many at once where drafting promises so many times the tokens.
_FIRST_PLAIN_ROUND, _PLAIN_ROUND_EVERY = 8, 128
_CLEARLY = 1.2
# As long as the same rows are live and known, what to draft is thought over once in so many rounds: survivals of a row change slowly.
_REVIEW_EVERY = 8
# Close to the break-even followed costs, which are noisy, decide by chance: then not drafting is taken, which costs what it costs.
_WORTH_DRAFTING = 1.02


@dataclass
class _Decision:
    """What was found best for these rows, and for how many rounds more it holds."""

    requests: tuple[int, ...]
    gamma: int
    choice: Proposal
    rounds: int


class LoadAwareBudget(Budget):
    """Algorithm 1 with the early stop, over the time of the whole round; rows and batches that do not pay for drafts rest.

    Before a round it asks, of the survivals that finished rounds have shown, what drafting 1, 2, 4 .. gamma tokens for all rows, for the
    rows that pay, or for none would give, and takes the best. What rests is probed again at growing intervals.

    Args:
        costs (`Costs`, *optional*): what rounds cost; given by `start` where None.
        max_verify_tokens (`int`, *optional*): most tokens of one pass, anchors included.
        skipping (`bool`): whether to leave rows or batches undrafted; False always drafts whole blocks for all.
        follow_costs (`bool`): correct the costs by what finished rounds took, for a machine that is not as it was when it was measured.
            Lossless all the same, but what is drafted and verified then depends on the clock: draws no longer repeat by their seed.
    """

    needs_confidence = True
    early_stop = True
    name = "load-aware"

    def __init__(
        self, costs: Costs | None = None, *, max_verify_tokens: int | None = None, skipping: bool = True, follow_costs: bool = False
    ) -> None:
        check_cap(max_verify_tokens)
        self.costs = costs
        self.max_verify_tokens = max_verify_tokens
        self.skipping = skipping
        self.follow_costs = follow_costs
        self._forget()

    def _forget(self) -> None:
        """Begin a call."""
        self._memory: Memory | None = None
        self._idle, self._rest, self._drafted_rounds = 0, FIRST_REST, 0
        self._resting: tuple[int, ...] = ()
        self._probe_length, self._start = 1, 0.0
        self._draft_s = 0.0
        self._context_tokens = 0
        self._plain_wait = self._next_plain = _FIRST_PLAIN_ROUND
        self._decided: _Decision | None = None
        self._clear = False  # whether drafting was last found to pay well

    def start(self, costs: Costs, *, learn_costs: bool) -> LoadAwareBudget:
        fresh = copy.copy(self)
        known = self.costs.table if isinstance(self.costs, FollowedCosts) else self.costs or costs
        fresh.follow_costs = self.follow_costs or learn_costs
        fresh.costs = FollowedCosts(known) if fresh.follow_costs else known
        fresh._forget()
        return fresh

    def with_cap(self, max_verify_tokens: int) -> LoadAwareBudget:
        """The same policy with a cap."""
        most = max_verify_tokens if self.max_verify_tokens is None else min(max_verify_tokens, self.max_verify_tokens)
        fresh = copy.copy(self)
        fresh.max_verify_tokens = most
        fresh._forget()
        return fresh

    def __repr__(self) -> str:
        return self.name if self.max_verify_tokens is None else f"{self.name} within {self.max_verify_tokens} tokens"

    # ------------------------------------------------------------------------------------------------------------ before the draft

    def propose(self, live: LiveRows) -> Proposal:
        self._context_tokens = live.context_tokens
        proposal = self._propose(live)
        drafted = len(live.requests) if proposal.rows is None else len(proposal.rows)
        self._draft_s = self._known_costs().draft_s(drafted, proposal.length)
        return proposal

    def _propose(self, live: LiveRows) -> Proposal:
        gamma, rows = live.block_size, len(live.requests)
        if self._memory is None or self._memory.block_size != gamma:
            self._memory = Memory(gamma)
            longest = self._known_costs().block_size
            if gamma > longest:
                raise ValueError(f"These costs are for blocks of up to {longest} tokens; the drafter's have {gamma}. Measure them with it.")
        memory, costs = self._memory, self._known_costs()
        memory.keep(live.requests)
        room = rows * gamma if self.max_verify_tokens is None else self.max_verify_tokens - rows
        gamma = min(gamma, room, max(live.room))
        if gamma <= 0:
            return Proposal(0)
        if live.requests == self._resting:
            return self._probe_batch(gamma)  # The same rows, and nothing new is known of their texts.
        decided = self._decided
        if decided is not None and decided.rounds > 0 and (decided.requests, decided.gamma) == (live.requests, gamma):
            decided.rounds -= 1
            return self._draft(self._usually(live, decided.choice, gamma))
        samples = memory.samples(live.requests) if self.skipping else None
        if samples is None:
            return self._draft(Proposal(gamma))
        passes = costs.passes(rows, live.context_tokens)
        plain = rows / passes.verify_s[0]
        limits = np.minimum(live.room, gamma)
        how: dict[str, Any] = {"room": room, "early_stop": self.early_stop}
        lengths = sorted({n for n in _LENGTHS if n < gamma} | {gamma})
        everyone = outlook(samples, limits, passes, costs.draft_s, lengths, **how)
        choice, best, self._start = Proposal(everyone.length), everyone.rate, everyone.start
        for part, factor in ((everyone.hopeful | ~memory.known(live.requests), 1.0), (everyone.net_s > 0, _WORTH_CHOOSING)):
            worth = np.flatnonzero(part)
            if 0 < len(worth) < rows:
                others = rows - len(worth)
                some = outlook(samples[:, worth], limits[worth], passes, costs.draft_s, lengths, others=others, **how)
                if some.rate > factor * best:
                    choice, best, self._start = Proposal(some.length, tuple(worth.tolist())), some.rate, some.start
        if best <= plain * (_WORTH_DRAFTING if self.follow_costs else 1.0):
            self._resting, self._probe_length = live.requests, everyone.length
            return self._probe_batch(gamma)
        self._idle, self._rest, self._clear = 0, FIRST_REST, best > _CLEARLY * plain
        self._decided = _Decision(live.requests, gamma, choice, _REVIEW_EVERY - 1 if memory.known(live.requests).all() else 0)
        return self._draft(self._usually(live, choice, gamma))

    def _usually(self, live: LiveRows, choice: Proposal, gamma: int) -> Proposal:
        """A choice, but now and then what tells more."""
        self._plain_wait -= self.follow_costs
        if self._plain_wait == 0:
            self._next_plain = _PLAIN_ROUND_EVERY if self._clear else min(2 * self._next_plain, _PLAIN_ROUND_EVERY)
            self._plain_wait = self._next_plain
            return Proposal(0)
        if self._drafted_rounds % _WHOLE_BLOCK_EVERY == 0:
            choice = Proposal(gamma, choice.rows)
        return self._probe_rows(live, choice)

    def _probe_batch(self, gamma: int) -> Proposal:
        """Nothing pays: rest, and after a while draft as would be best if it did, which close to the break-even costs next to nothing."""
        self._idle += 1
        if self._idle < self._rest:
            return Proposal(0)
        self._resting = ()
        self._idle, self._rest = 0, min(2 * self._rest, LONGEST_REST)
        return Proposal(min(self._probe_length, gamma))

    def _probe_rows(self, live: LiveRows, choice: Proposal) -> Proposal:
        """Rows that rest beside others are looked at again, each at growing intervals of its own."""
        assert self._memory is not None
        if choice.rows is None:
            for request in live.requests:
                row = self._memory.rows[request]
                row.idle, row.rest = 0, FIRST_REST
            return choice
        drafted = set(choice.rows)
        for r, request in enumerate(live.requests):
            row = self._memory.rows[request]
            if r in drafted:
                row.idle, row.rest = 0, FIRST_REST
                continue
            row.idle += 1
            if row.idle >= row.rest:
                row.idle, row.rest = 0, min(2 * row.rest, LONGEST_REST)
                drafted.add(r)
        return Proposal(choice.length, tuple(sorted(drafted)) if len(drafted) < len(live.requests) else None)

    def _draft(self, proposal: Proposal) -> Proposal:
        self._drafted_rounds += proposal.length > 0
        return proposal

    # ------------------------------------------------------------------------------------------------------------- after the draft

    def plan(self, drafts: Drafts) -> list[int]:
        survival = survivals(require_confidence(self, drafts).numpy())
        passes = self._known_costs().passes(drafts.rows, 0 if drafts.live is None else drafts.live.context_tokens)
        most = None if self.max_verify_tokens is None else max(self.max_verify_tokens - drafts.rows, 0)
        return self._admit(survival, drafts, passes, most)

    def _admit(self, survival: np.ndarray, drafts: Drafts, passes: PassCosts, most: int | None) -> list[int]:
        drafted = sum(limit > 0 for limit in drafts.limits)
        round_s = early_stop_s(passes, drafted, max(drafts.limits), self._start) + self._draft_s
        return admit_early_stop(survival, drafts.limits, round_s, most)

    def learn(self, finished: FinishedRound) -> None:
        if isinstance(self.costs, FollowedCosts):
            self.costs.learn(finished, self._context_tokens)
        if self._memory is None or finished.confidence is None:
            return
        chosen = [r for r, length in enumerate(finished.drafted) if length]
        if chosen:
            requests = [finished.requests[r] for r in chosen]
            survival = survivals(finished.confidence.numpy()[chosen, : max(finished.drafted)])
            self._memory.add(requests, survival)
            self._remember(requests, self._memory, survival)

    def _remember(self, requests: list[int], memory: Memory, survival: np.ndarray) -> None:
        """Hear of the blocks `(R, n)` that a finished round drafted for some requests, which the memory holds already."""

    def _known_costs(self) -> Costs:
        if self.costs is None:
            raise RuntimeError(f"Budget {self!r} has no costs yet; generate measures them, or give costs=Costs(..), then call start().")
        return self.costs


class LaggedLoadAwareBudget(LoadAwareBudget):
    """How many tokens is found by an unconstrained search on the confidences of two rounds ago, which ones by today's rank.

    Jagged costs do not stop it before a cliff, as they stop Algorithm 1. New rows, which have no history, count as survival 1.
    """

    early_stop = False
    name = "load-aware-lag2"

    def _forget(self) -> None:
        super()._forget()
        self._before: dict[int, deque[np.ndarray]] = {}

    def _admit(self, survival: np.ndarray, drafts: Drafts, passes: PassCosts, most: int | None) -> list[int]:
        length = survival.shape[1]
        requests = range(drafts.rows) if drafts.live is None else drafts.live.requests
        old = np.ones_like(survival)
        for r, request in enumerate(requests):
            history = self._before.get(request)
            if history is not None and len(history) == 2:
                old[r] = history[0][:length]
        alive = set(requests)
        self._before = {request: kept for request, kept in self._before.items() if request in alive}
        count = best_count(old, drafts.limits, passes.verify_s + self._draft_s, passes.wide_s)
        return admit_top(survival, drafts.limits, count if most is None else min(count, most))

    def _remember(self, requests: list[int], memory: Memory, survival: np.ndarray) -> None:
        for request, block in zip(requests, memory.continued(survival), strict=True):
            self._before.setdefault(request, deque(maxlen=2)).append(block)
