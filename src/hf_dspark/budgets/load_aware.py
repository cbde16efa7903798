"""The load-aware budgets: verified lengths that maximise expected tokens per second, and drafts only where they pay.

Source: paper section 3.2.2, Algorithm 1, and section 5.2 (the lagged variant). Differs: whether to draft at all, for whom and how far, is
decided too, from finished rounds only.
"""

from __future__ import annotations

import copy

import numpy as np

from hf_dspark.budgets.admission import admit_early_stop, admit_top, best_count, survivals
from hf_dspark.budgets.budget import Budget, Drafts, FinishedRound, LiveRows, Proposal, check_cap, require_confidence
from hf_dspark.budgets.cost_model import Costs, PassCosts
from hf_dspark.budgets.draft_planner import PLAN_ROUNDS, Backoff, History, forecast
from hf_dspark.budgets.online_costs import OnlineCosts

# Leaving rows out must promise this much more than drafting for all: which rows do not pay is guessed from few blocks of each. It pays
# where drafts are expensive and requests differ (2-3% in simulations); with a margin of 1.01 it loses up to 2% elsewhere.
ROW_MARGIN = 1.03


class LoadAwareBudget(Budget):
    """Algorithm 1 with the early stop, over the time of the whole round; batches and rows that do not pay for drafts back off.

    Every few rounds it estimates, by the survivals that finished rounds have shown, the expected tokens per second of drafting 1..gamma
    tokens for all rows, for the rows that pay, and for none, and takes the best. What is not drafted is probed again at growing intervals.

    Args:
        costs (`Costs`, *optional*): what rounds cost; those that `start` is given where None.
        max_verify_tokens (`int`, *optional*): most tokens of one pass, anchors included.
        learn_costs (`bool`, *optional*): whether finished rounds correct the costs; as in `start` where None. Lossless all the same,
            but what is drafted and verified then depends on the clock: draws no longer repeat by their seed.
    """

    needs_confidence = True
    reads_costs = True
    early_stop = True
    name = "load-aware"

    def __init__(self, costs: Costs | None = None, *, max_verify_tokens: int | None = None, learn_costs: bool | None = None) -> None:
        check_cap(max_verify_tokens)
        self.costs = costs
        self.max_verify_tokens = max_verify_tokens
        self.learn_costs = learn_costs
        self._reset()

    def _reset(self) -> None:
        """Begin a call."""
        self._history = History()
        self._context_tokens = 0
        # The plan in force: tokens to draft (0 for none), live requests left out, for which rows it was made, and for how many rounds more.
        self._length = 0
        self._left_out: frozenset[int] = frozenset()
        self._planned_for: tuple[tuple[int, ...], int] = ((), 0)
        self._rounds_left = 0
        # Expected losses: of a probe of the batch, of a plain round where drafts pay, and of a probe of each row.
        self._probe_length, self._probe_loss, self._plain_loss = 1, 0.0, 0.0
        self._row_loss: dict[int, float] = {}
        self._batch_backoff, self._plain_backoff = Backoff(), Backoff()

    def start(self, costs: Costs | None, *, learn_costs: bool) -> LoadAwareBudget:
        fresh = copy.deepcopy(self, {id(self.costs): self.costs})  # the table is shared, it never changes
        fresh._reset()
        known = self.costs or costs
        if known is None:
            raise ValueError(f"Budget {self!r} needs costs; got none. Give costs=Costs(..) to it or to start().")
        table = known.table if isinstance(known, OnlineCosts) else known
        fresh.costs = OnlineCosts(table) if (learn_costs if self.learn_costs is None else self.learn_costs) else table
        return fresh

    def with_cap(self, max_verify_tokens: int) -> LoadAwareBudget:
        """The same policy with a cap."""
        fresh = copy.copy(self)
        fresh._reset()
        fresh.max_verify_tokens = min(max_verify_tokens, self.max_verify_tokens or max_verify_tokens)
        return fresh

    def __repr__(self) -> str:
        return self.name if self.max_verify_tokens is None else f"{self.name} within {self.max_verify_tokens} tokens"

    # ------------------------------------------------------------------------------------------------------------ before the draft

    def propose(self, live: LiveRows) -> Proposal:
        costs, rows = self._started_costs(), len(live.requests)
        if live.block_size > costs.block_size:
            raise ValueError(
                f"These costs are for blocks of up to {costs.block_size} tokens; the drafter's have {live.block_size}. "
                "Measure them with this drafter."
            )
        self._context_tokens = live.context_tokens
        history = self._history
        history.sync(live.requests)
        room = self._room(rows, rows * live.block_size)
        longest = min(live.block_size, room, max(live.room))
        if longest <= 0:
            return Proposal(0)
        if not history.pool:
            return Proposal(longest)  # nothing is known yet
        self._rounds_left -= 1
        if self._rounds_left < 0 or self._outdated(live, longest):
            self._plan_drafts(live, longest, room)
        if not self._length:
            if not self._batch_backoff.due(self._probe_loss):
                return Proposal(0)
            self._rounds_left = 0  # what the probe shows counts at once
            return Proposal(min(self._probe_length, longest))
        if isinstance(costs, OnlineCosts) and self._plain_backoff.due(self._plain_loss):
            return Proposal(0)  # what drafts cost beside plain rounds shows where both occur
        chosen = tuple(
            r
            for r, request in enumerate(live.requests)
            if request not in self._left_out or history.rows[request].backoff.due(self._row_loss[request])
        )
        return Proposal(self._length if chosen else 0, None if len(chosen) == rows else chosen)

    def _outdated(self, live: LiveRows, longest: int) -> bool:
        """Whether other rows are live than the plan was made for. Where drafts pay new ones are drafted for until the next plan."""
        requests, length = self._planned_for
        changed = len(requests) != len(live.requests) if self._length else requests != live.requests
        return changed or length != longest

    def _plan_drafts(self, live: LiveRows, longest: int, room: int) -> None:
        """Find the best length and rows, and how much it costs to probe the others."""
        costs, history, rows = self._started_costs(), self._history, len(live.requests)
        samples, limits = history.samples(live.requests)[..., :longest], np.minimum(live.room, longest)
        passes = costs.passes(rows, live.context_tokens)
        everyone = best = forecast(samples, limits, passes, costs.draft_s, room=room, early_stop=self.early_stop)
        left_out: frozenset[int] = frozenset()
        pays = np.flatnonzero(everyone.net_s > 0)
        if 0 < len(pays) < rows:
            some = forecast(
                samples[:, pays], limits[pays], passes, costs.draft_s, others=rows - len(pays), room=room, early_stop=self.early_stop
            )
            if some.rate > ROW_MARGIN * best.rate:
                best, left_out = some, frozenset(live.requests) - {live.requests[r] for r in pays}
        plain = rows / float(passes.verify_s[0])
        self._probe_length, self._probe_loss = everyone.length, plain / everyone.rate - 1
        self._plain_loss = best.rate / plain - 1
        self._row_loss = dict(zip(live.requests, (-everyone.net_s * everyone.rate).tolist(), strict=True))
        self._length, self._left_out = (best.length, left_out) if best.rate > plain else (0, frozenset())
        self._planned_for, self._rounds_left = (live.requests, longest), PLAN_ROUNDS - 1
        if self._length:
            self._batch_backoff = Backoff()
            for request in set(live.requests) - left_out:
                history.rows[request].backoff = Backoff()

    # ------------------------------------------------------------------------------------------------------------- after the draft

    def plan(self, drafts: Drafts) -> list[int]:
        survival = survivals(require_confidence(self, drafts).numpy())
        passes, draft_s = self._costs_of(drafts, survival.shape[1])
        # As if the pass were as wide as it may become, so that the first token of a position does not pay for all.
        round_s = passes.convex_s + passes.wide_s[max(drafts.limits)] + draft_s
        return admit_early_stop(survival, drafts.limits, round_s, self._room(drafts.rows, sum(drafts.limits)))

    def _costs_of(self, drafts: Drafts, length: int) -> tuple[PassCosts, float]:
        """What passes over these rows may cost, and a draft of so many tokens."""
        costs = self._started_costs()
        passes = costs.passes(drafts.rows, 0 if drafts.live is None else drafts.live.context_tokens)
        return passes, costs.draft_s(sum(limit > 0 for limit in drafts.limits), length)

    def learn(self, finished: FinishedRound) -> None:
        if isinstance(self.costs, OnlineCosts):
            self.costs.learn(finished, self._context_tokens)
        chosen = [r for r, length in enumerate(finished.drafted) if length]
        if finished.confidence is not None and chosen:
            blocks = survivals(finished.confidence.numpy()[chosen, : max(finished.drafted)])
            self._history.add([finished.requests[r] for r in chosen], blocks, self._started_costs().block_size)

    # ------------------------------------------------------------------------------------------------------------------- its parts

    def _room(self, rows: int, most: int) -> int:
        """Drafted tokens that a pass can take."""
        return most if self.max_verify_tokens is None else min(max(self.max_verify_tokens - rows, 0), most)

    def _started_costs(self) -> Costs:
        if self.costs is None:
            raise RuntimeError(f"Budget {self!r} has no costs yet; call start(costs, learn_costs=..), or give costs=Costs(..).")
        return self.costs


class LaggedLoadAwareBudget(LoadAwareBudget):
    """How many tokens is found by an unconstrained search on the confidences of two rounds ago, which ones by today's rank.

    Jagged costs do not stop it before a cliff, as they stop Algorithm 1. New rows, which have no history, count as survival 1.
    """

    early_stop = False
    name = "load-aware-lag2"

    def plan(self, drafts: Drafts) -> list[int]:
        return admit_top(survivals(require_confidence(self, drafts).numpy()), drafts.limits, self.total(drafts))

    def total(self, drafts: Drafts) -> int:
        old = np.ones((drafts.rows, max(drafts.limits)))
        known = self._history.rows
        for r, request in enumerate(() if drafts.live is None else drafts.live.requests):
            if request in known and known[request].own >= 2:
                old[r] = known[request].blocks[-2][: old.shape[1]]
        passes, draft_s = self._costs_of(drafts, max(drafts.limits))
        count = best_count(old, drafts.limits, passes.verify_s + draft_s, passes.wide_s)
        return min(count, self._room(drafts.rows, sum(drafts.limits)))
