"""The load-aware budgets: verified lengths that maximise accepted tokens a second, and drafts only where they pay. Pure policy; knows no
model, no loop and no clock: what things cost comes from a table.

Source: paper section 3.2.2, Algorithm 1, and section 5.2 (the lagged variant). Differs: the objective is tokens over the time of the whole
round, draft included, not tokens a verification pass; and whether to draft at all, for whom and how far, is decided too, from finished
rounds only.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .costs import Costs, PassCosts
from .followed_costs import FollowedCosts
from .scheduling import Budget, Drafts, FinishedRound, LiveRows, Proposal, check_cap, require_confidence

# Recent blocks of a row, and of all rows, whose survivals stand for those to come.
_ROW_SAMPLES = 4
_POOL_SAMPLES = 64
# What was left undrafted is tried again after this many rounds, then after twice as many, up to the limit.
FIRST_REST, LONGEST_REST = 4, 64
# Where shorter blocks pay, the whole block is drafted once in this many rounds, to see what lies behind the cut.
_WHOLE_BLOCK_EVERY = 64
# Costs that rise steeply at first and then less so: Algorithm 1 may look at them from no tokens on, or from half a token a row.
_STARTS = (0.0, 0.5)
# Leaving out more than rows none of whose last blocks was worth a token must promise this much more than drafting for all: which rows pay
# is guessed from few blocks of each, and what was chosen for its promise keeps less of it. A row more costs little beside the others.
_WORTH_CHOOSING = 1.03
# Who follows costs must see what a plain round takes, too: after so many drafted rounds one is plain, then after twice as many, up to the
# limit.
_FIRST_PLAIN_ROUND, _PLAIN_ROUND_EVERY = 8, 128
# Close to the break-even followed costs, which are noisy, decide by chance: then not drafting is taken, which costs what it costs.
_WORTH_DRAFTING = 1.02


# ------------------------------------------------------------------------------------------------------------- how much to verify


def admission_order(survival: np.ndarray) -> np.ndarray:
    """All (row, position) pairs by survival, highest first; of equal ones the earlier position first, then the earlier row.

    Args:
        survival (`numpy.ndarray` of shape `(R, n)`): a_{r,j}, non-increasing along each row.
    Returns:
        `numpy.ndarray` of shape `(n * R,)`: indices into the transposed, flattened survivals: j * R + r.
    """
    return np.argsort(-survival.T.ravel(), kind="stable")


def _gains(survival: np.ndarray, limits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The admissible pairs in order, and their survivals."""
    open_ = np.arange(survival.shape[1])[:, None] < np.asarray(limits)[None, :]
    order = admission_order(np.where(open_.T, survival, -1.0))[: int(open_.sum())]
    return order, survival.T.ravel()[order]


def _lengths(order: np.ndarray, rows: int) -> list[int]:
    return np.bincount(order % rows, minlength=rows).tolist()


def rate(
    gains: np.ndarray, rows: int, round_s: np.ndarray, order: np.ndarray | None = None, wide_s: np.ndarray | None = None
) -> np.ndarray:
    """Theta of admitting the first 0, 1, .. tokens: expected tokens of the round over its seconds, `(1 + len(gains),)`.

    Args:
        gains (`numpy.ndarray` of shape `(n,)`): survivals in the order of admission.
        rows (`int`): live rows.
        round_s (`numpy.ndarray` of shape `(>= 1 + n,)`): seconds with 0, 1, .. drafted tokens in the pass.
        order (`numpy.ndarray` of shape `(n,)`, *optional*): from `admission_order`; with it
        wide_s (`numpy.ndarray` of shape `(1 + gamma,)`): seconds to add, by drafted tokens of the longest row.
    """
    seconds = round_s[: len(gains) + 1]
    if order is not None and wide_s is not None:
        seconds = seconds + wide_s[_longest(order // rows)]
    return (rows + _from_none(gains)) / seconds


def _from_none(values: np.ndarray) -> np.ndarray:
    """Running sums along the last dimension, beginning with the sum of nothing."""
    return np.concatenate((np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)), axis=-1)


def _longest(places: np.ndarray) -> np.ndarray:
    """Drafted tokens of the longest row with the first 0, 1, .. tokens admitted.

    Args:
        places (`numpy.ndarray` of shape `(.., n)`): block position (from 0) of each token in the order of admission; -1 where it counts for
            nothing.
    """
    nothing = np.zeros((*places.shape[:-1], 1), dtype=np.int64)
    return np.concatenate((nothing, np.maximum.accumulate(places + 1, axis=-1)), axis=-1)


def admit_early_stop(survival: np.ndarray, limits: Sequence[int], round_s: np.ndarray, most: int | None = None) -> list[int]:
    """Algorithm 1: admit tokens by survival while Theta strictly grows, stop at the first that does not help.

    The stop is what keeps the output exact: whether a token is admitted depends on larger survivals only, so on earlier tokens of its row.

    Args:
        survival (`numpy.ndarray` of shape `(R, n)`): a_{r,j} = prod_{i<=j} c_{r,i}.
        limits (`Sequence[int]`): most tokens of each row.
        round_s (`numpy.ndarray` of shape `(>= 1 + sum(limits),)`): seconds of the round with 0, 1, .. drafted tokens in its pass.
        most (`int`, *optional*): tokens in all.
    Returns:
        `list[int]`: l_r of each row.
    """
    order, gains = _gains(survival, limits)
    theta = rate(gains, len(limits), round_s)
    worse = np.flatnonzero(theta[1:] <= theta[:-1])
    count = int(worse[0]) if len(worse) else len(gains)
    return _lengths(order[: count if most is None else min(count, most)], len(limits))


def best_count(survival: np.ndarray, limits: Sequence[int], round_s: np.ndarray, wide_s: np.ndarray | None = None) -> int:
    """How many tokens the unconstrained search admits: the arg-max of Theta over all of them, whatever lies between.

    Not to be applied to the tokens whose survivals it has read: it looks past the cut.
    """
    order, gains = _gains(survival, limits)
    return int(rate(gains, len(limits), round_s, order, wide_s).argmax())


def admit_top(survival: np.ndarray, limits: Sequence[int], count: int) -> list[int]:
    """The `count` tokens of highest survival: by rank alone, so exact however `count` was found from finished rounds."""
    order, _ = _gains(survival, limits)
    return _lengths(order[:count], len(limits))


# --------------------------------------------------------------------------------------------------------------- what to draft


@dataclass
class _Row:
    """What finished rounds say of one row."""

    survivals: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=_ROW_SAMPLES))
    idle: int = 0
    rest: int = FIRST_REST


class _Memory:
    """Survivals of recent blocks, row by row and of all rows; later positions than were drafted are continued at the usual rate."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.rows: dict[int, _Row] = {}
        self.pool: deque[np.ndarray] = deque(maxlen=_POOL_SAMPLES)
        self._mean = np.ones(block_size)

    def keep(self, requests: Sequence[int]) -> None:
        """Forget rows that are gone."""
        for gone in self.rows.keys() - set(requests):
            del self.rows[gone]
        for request in requests:
            self.rows.setdefault(request, _Row())

    def continued(self, survival: np.ndarray) -> np.ndarray:
        """The survivals of a whole block, `(gamma,)`, of which the first n were seen."""
        known = len(survival)
        whole = np.empty(self.block_size)
        whole[:known] = survival
        if known < self.block_size:
            mean = self._mean
            whole[known:] = survival[-1] * mean[known:] / max(mean[known - 1], 1e-9)
        return whole

    def add(self, request: int, survival: np.ndarray) -> None:
        known, whole = len(survival), self.continued(survival)
        self.rows.setdefault(request, _Row()).survivals.append(whole)
        self.pool.append(whole)
        if known == self.block_size:
            self._mean = whole.copy() if len(self.pool) == 1 else 0.95 * self._mean + 0.05 * whole

    def known(self, requests: Sequence[int]) -> np.ndarray:
        """Which rows have shown as many blocks of their own as an outlook is made of."""
        return np.array([len(self.rows[request].survivals) == _ROW_SAMPLES for request in requests])

    def samples(self, requests: Sequence[int]) -> np.ndarray | None:
        """Plausible survivals of the coming round, `(W, R, gamma)`: a row's own, else other rows', nothing before any was seen."""
        if not self.pool:
            return None
        out = np.empty((_ROW_SAMPLES, len(requests), self.block_size))
        for r, request in enumerate(requests):
            own = self.rows[request].survivals or self.pool
            for w in range(_ROW_SAMPLES):
                out[w, r] = own[-1 - (w + (0 if own is not self.pool else _ROW_SAMPLES * r)) % len(own)]  # the newest
        return out


@dataclass(frozen=True)
class _Outlook:
    """What drafting `length` tokens for some rows is expected to give."""

    length: int
    rate: float
    hopeful: np.ndarray  # for each row: whether any of its tokens would be verified
    net_s: np.ndarray  # for each row: time that drafting for it saves, in seconds a round
    start: float  # drafted tokens a row from which the costs that Algorithm 1 reckons with are close to the real ones


def _outlook(
    samples: np.ndarray,
    limits: np.ndarray,
    passes: PassCosts,
    draft_s: Callable[[int, int], float],
    lengths: Sequence[int],
    *,
    others: int = 0,
    room: int | None = None,
    early_stop: bool = False,
) -> _Outlook:
    """The best of some draft lengths, over sampled survivals, with each of these rows drafted for.

    Args:
        samples (`numpy.ndarray` of shape `(W, R, gamma)`): plausible survivals.
        limits (`numpy.ndarray` of shape `(R,)`): most tokens of each row.
        passes (`PassCosts`): of passes of all live rows.
        draft_s (`Callable`): seconds of drafting for so many rows so many tokens.
        lengths (`Sequence[int]`): draft lengths to choose from.
        others (`int`): live rows that are not drafted for; their anchors go into the pass, and each gives a token.
        room (`int`, *optional*): drafted tokens that the pass can take.
        early_stop (`bool`): tokens will be admitted by Algorithm 1, which stops where the rate first does not grow.
    """
    width, rows, gamma = samples.shape
    positions = np.repeat(np.arange(gamma), rows)
    flat = np.where(np.arange(gamma)[:, None] < limits, samples.transpose(0, 2, 1), 0.0).reshape(width, -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    gains, places = np.take_along_axis(flat, order, axis=1), positions[order]
    # Every length at once, along a first dimension; where the search stops early, from every place that its costs may begin to be convex.
    how = [(length, start) for length in lengths for start in (_STARTS if early_stop else _STARTS[:1])]
    drafts = np.array([draft_s(rows, length) for length, _ in how])
    inside = places < np.array([length for length, _ in how])[:, None, None]
    counts = _from_none(inside).astype(np.int64)
    tokens = rows + others + _from_none(gains * inside)
    seconds = passes.verify_s[counts] + passes.wide_s[_longest(np.where(inside, places, -1))] + drafts[:, None, None]
    if early_stop:
        believed = np.stack([early_stop_s(passes, rows, length, start)[count] for (length, start), count in zip(how, counts, strict=True)])
        theta = tokens / (believed + drafts[:, None, None])
        worse = (theta[..., 1:] <= theta[..., :-1]) & inside
        cut = np.where(worse.any(axis=-1), worse.argmax(axis=-1), worse.shape[-1])
    else:
        cut = (tokens / seconds).argmax(axis=-1)
    if room is not None:
        cut = np.minimum(cut, (counts <= room).sum(axis=-1) - 1)
    at = cut[..., None]
    values = np.take_along_axis(tokens, at, axis=-1).sum(axis=(1, 2)) / np.take_along_axis(seconds, at, axis=-1).sum(axis=(1, 2))
    best = int(values.argmax())
    admitted = (np.arange(gains.shape[1]) < cut[best, :, None]) & inside[best]
    by_row = order[admitted] % rows
    gained = np.bincount(by_row, weights=gains[admitted], minlength=rows) / width
    verified = np.bincount(by_row, minlength=rows) / width
    mean, verify_s = verified.sum(), passes.verify_s
    token_s = (np.interp(mean, np.arange(len(verify_s)), verify_s) - verify_s[0]) / mean if mean else 0.0
    length, start = how[best]
    row_s = drafts[best] - draft_s(rows - 1, length)
    return _Outlook(length, float(values[best]), verified > 0, gained / values[best] - verified * token_s - max(row_s, 0.0), start)


def early_stop_s(passes: PassCosts, rows: int, length: int, start: float = 0.0) -> np.ndarray:
    """Seconds that Algorithm 1 reckons with, by drafted tokens in the pass, with `length` tokens drafted for each of `rows` rows.

    Convex, so that no step of the costs stops it: from `start` drafted tokens a row on as close to what passes cost as can be, and before
    that as if they had always been so dear. And with the width that the pass may come to have, so that the first token of a position does
    not pay for all. Whether so long rows pay, and from where on to look, was settled by what passes really cost, before the draft.
    """
    return passes.convex_s(rows * length, int(rows * start)) + passes.wide_s[length]


# ------------------------------------------------------------------------------------------------------------------ the budgets


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
        self._memory: _Memory | None = None
        self._idle, self._rest, self._drafted_rounds = 0, FIRST_REST, 0
        self._resting: tuple[int, ...] = ()
        self._probe_length, self._start = 1, 0.0
        self._draft_s = 0.0
        self._context_tokens = 0
        self._plain_wait = self._next_plain = _FIRST_PLAIN_ROUND

    def start(self, costs: Callable[[], Costs]) -> LoadAwareBudget:
        fresh = copy.copy(self)
        known = self.costs or costs()
        fresh.costs = FollowedCosts(known) if self.follow_costs else known
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
            self._memory = _Memory(gamma)
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
            return self._probe_batch(gamma)  # The same rows, and nothing new is known of them.
        samples = memory.samples(live.requests) if self.skipping else None
        if samples is None:
            return self._draft(Proposal(gamma))
        passes = costs.passes(rows, live.context_tokens)
        plain = rows / passes.verify_s[0]
        limits = np.minimum(live.room, gamma)
        how: dict[str, Any] = {"room": room, "early_stop": self.early_stop}
        lengths = sorted({n for n in (1, 2, 4) if n < gamma} | {gamma})
        everyone = _outlook(samples, limits, passes, costs.draft_s, lengths, **how)
        choice, best, self._start = Proposal(everyone.length), everyone.rate, everyone.start
        for part, factor in ((everyone.hopeful | ~memory.known(live.requests), 1.0), (everyone.net_s > 0, _WORTH_CHOOSING)):
            worth = np.flatnonzero(part)
            if 0 < len(worth) < rows:
                others = rows - len(worth)
                some = _outlook(samples[:, worth], limits[worth], passes, costs.draft_s, lengths, others=others, **how)
                if some.rate > factor * best:
                    choice, best, self._start = Proposal(some.length, tuple(worth.tolist())), some.rate, some.start
        if best <= plain * (_WORTH_DRAFTING if self.follow_costs else 1.0):
            self._resting, self._probe_length = live.requests, everyone.length
            return self._probe_batch(gamma)
        self._idle, self._rest = 0, FIRST_REST
        self._plain_wait -= self.follow_costs
        if self._plain_wait == 0:
            self._plain_wait = self._next_plain = min(2 * self._next_plain, _PLAIN_ROUND_EVERY)
            return Proposal(0)
        if self._drafted_rounds % _WHOLE_BLOCK_EVERY == 0:
            choice = Proposal(gamma, choice.rows)
        return self._draft(self._probe_rows(live, choice))

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
        self._drafted_rounds += 1
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
        survival = survivals(finished.confidence.numpy())
        for r, (request, drafted) in enumerate(zip(finished.requests, finished.drafted, strict=True)):
            if drafted:
                self._memory.add(request, survival[r, :drafted])

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

    def learn(self, finished: FinishedRound) -> None:
        super().learn(finished)
        if self._memory is None or finished.confidence is None:
            return
        survival = survivals(finished.confidence.numpy())
        for r, (request, drafted) in enumerate(zip(finished.requests, finished.drafted, strict=True)):
            if drafted:
                self._before.setdefault(request, deque(maxlen=2)).append(self._memory.continued(survival[r, :drafted]))


def survivals(confidence: np.ndarray) -> np.ndarray:
    """a_j = prod_{i<=j} c_i, `(R, n)`, float64; a confidence that is not a number ends the row."""
    return np.cumprod(np.nan_to_num(confidence.astype(np.float64), nan=0.0), axis=1)
