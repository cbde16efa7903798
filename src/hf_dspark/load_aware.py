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

from .costs import Costs
from .scheduling import Budget, Drafts, FinishedRound, LiveRows, Proposal, check_cap, require_confidence

# Recent blocks of a row, and of all rows, whose survivals stand for those to come.
_ROW_SAMPLES = 4
_POOL_SAMPLES = 64
# What was left undrafted is tried again after this many rounds, then after twice as many, up to the limit.
FIRST_REST, LONGEST_REST = 4, 64
# A probe of a batch that drafts nothing drafts for this many rows.
_PROBE_ROWS = 8
# Where shorter blocks pay, the whole block is drafted once in this many rounds, to see what lies behind the cut.
_WHOLE_BLOCK_EVERY = 16


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


def rate(gains: np.ndarray, rows: int, round_s: np.ndarray, order: np.ndarray | None = None, pad_s: float = 0.0) -> np.ndarray:
    """Theta of admitting the first 0, 1, .. tokens: expected tokens of the round over its seconds, `(1 + len(gains),)`.

    Args:
        gains (`numpy.ndarray` of shape `(n,)`): survivals in the order of admission.
        rows (`int`): live rows.
        round_s (`numpy.ndarray` of shape `(>= 1 + n,)`): seconds with 0, 1, .. drafted tokens, were they spread evenly over the rows.
        order (`numpy.ndarray` of shape `(n,)`, *optional*): from `admission_order`; with it
        pad_s (`float`): seconds for each token by which the longest row exceeds the mean.
    """
    seconds = round_s[: len(gains) + 1]
    if order is not None and pad_s:
        seconds = seconds + _padding_s(order // rows, np.arange(len(gains) + 1), rows, pad_s)
    return (rows + _from_none(gains)) / seconds


def _from_none(values: np.ndarray) -> np.ndarray:
    """Running sums along the last dimension, beginning with the sum of nothing."""
    return np.concatenate((np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)), axis=-1)


def _padding_s(places: np.ndarray, counts: np.ndarray, rows: int, pad_s: float) -> np.ndarray:
    """Seconds of padding with the first 0, 1, .. tokens admitted.

    Args:
        places (`numpy.ndarray` of shape `(.., n)`): block position (from 0) of each token in the order of admission; -1 where it counts for
            nothing.
        counts (`numpy.ndarray` of shape `(.., 1 + n)`): drafted tokens in the pass.
        rows (`int`): live rows.
        pad_s (`float`): seconds for each token by which the longest row exceeds the mean.
    """
    longest = np.concatenate((np.zeros((*places.shape[:-1], 1)), np.maximum.accumulate(places + 1, axis=-1)), axis=-1)
    return pad_s * np.maximum(longest - counts / rows, 0.0)


def admit_early_stop(
    survival: np.ndarray, limits: Sequence[int], round_s: np.ndarray, most: int | None = None, pad_s: float = 0.0
) -> list[int]:
    """Algorithm 1: admit tokens by survival while Theta strictly grows, stop at the first that does not help.

    The stop is what keeps the output exact: whether a token is admitted depends on larger survivals only, so on earlier tokens of its row.

    Args:
        survival (`numpy.ndarray` of shape `(R, n)`): a_{r,j} = prod_{i<=j} c_{r,i}.
        limits (`Sequence[int]`): most tokens of each row.
        round_s (`numpy.ndarray` of shape `(>= 1 + sum(limits),)`): seconds of the round with 0, 1, .. drafted tokens in its pass.
        most (`int`, *optional*): tokens in all.
        pad_s (`float`): seconds for each token by which the longest row exceeds the mean.
    Returns:
        `list[int]`: l_r of each row.
    """
    order, gains = _gains(survival, limits)
    theta = rate(gains, len(limits), round_s, order, pad_s)
    worse = np.flatnonzero(theta[1:] <= theta[:-1])
    count = int(worse[0]) if len(worse) else len(gains)
    return _lengths(order[: count if most is None else min(count, most)], len(limits))


def best_count(survival: np.ndarray, limits: Sequence[int], round_s: np.ndarray, pad_s: float = 0.0) -> int:
    """How many tokens the unconstrained search admits: the arg-max of Theta over all of them, whatever lies between.

    Not to be applied to the tokens whose survivals it has read: it looks past the cut.
    """
    order, gains = _gains(survival, limits)
    return int(rate(gains, len(limits), round_s, order, pad_s).argmax())


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

    def add(self, request: int, survival: np.ndarray) -> None:
        known = len(survival)
        whole = np.empty(self.block_size)
        whole[:known] = survival
        if known < self.block_size:
            mean = self._mean
            whole[known:] = survival[-1] * mean[known:] / max(mean[known - 1], 1e-9)
        self.rows.setdefault(request, _Row()).survivals.append(whole)
        self.pool.append(whole)
        if known == self.block_size:
            self._mean = whole.copy() if len(self.pool) == 1 else 0.95 * self._mean + 0.05 * whole

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
    net_s: np.ndarray  # for each row: time that drafting for it saves, in seconds a round


def _outlook(
    samples: np.ndarray,
    limits: np.ndarray,
    verify_s: np.ndarray,
    costs: Costs,
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
        verify_s (`numpy.ndarray`): seconds of the pass of all live rows, by drafted tokens in it.
        costs (`Costs`): of drafts.
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
    pad_s = costs.pad_s(rows + others)
    best: tuple[float, int, np.ndarray, np.ndarray] | None = None
    for length in lengths:
        inside = places < length
        counts = _from_none(inside).astype(np.int64)
        tokens = rows + others + _from_none(gains * inside)
        padding_s = _padding_s(np.where(inside, places, -1), counts, rows + others, pad_s)
        seconds = verify_s[counts] + padding_s + costs.draft_s(rows, length)
        theta = tokens / seconds
        if early_stop:
            worse = (theta[:, 1:] <= theta[:, :-1]) & inside
            cut = np.where(worse.any(axis=1), worse.argmax(axis=1), worse.shape[1])
        else:
            cut = theta.argmax(axis=1)
        if room is not None:
            cut = np.minimum(cut, (counts <= room).sum(axis=1) - 1)
        chosen = np.arange(width), cut
        value = float(tokens[chosen].sum() / seconds[chosen].sum())
        if best is None or value > best[0]:
            best = value, length, cut, inside
    assert best is not None
    value, length, cut, inside = best
    admitted = (np.arange(gains.shape[1]) < cut[:, None]) & inside
    by_row = order % rows
    gained = np.bincount(by_row[admitted], weights=gains[admitted], minlength=rows) / width
    verified = np.bincount(by_row[admitted], minlength=rows) / width
    mean = verified.sum()
    token_s = (np.interp(mean, np.arange(len(verify_s)), verify_s) - verify_s[0]) / mean if mean else 0.0
    row_s = costs.draft_s(rows, length) - costs.draft_s(rows - 1, length)
    return _Outlook(length, value, gained / value - verified * token_s - max(row_s, 0.0))


# ------------------------------------------------------------------------------------------------------------------ the budgets


class LoadAwareBudget(Budget):
    """Algorithm 1 with the early stop, over the time of the whole round; rows and batches that do not pay for drafts rest.

    Before a round it asks, of the survivals that finished rounds have shown, what drafting 1, 2, 4 .. gamma tokens for all rows, for the
    rows that pay, or for none would give, and takes the best. What rests is probed again at growing intervals.

    Args:
        costs (`Costs`, *optional*): what rounds cost; given by `start` where None.
        max_verify_tokens (`int`, *optional*): most tokens of one pass, anchors included.
        skipping (`bool`): whether to leave rows or batches undrafted; False always drafts whole blocks for all.
    """

    needs_confidence = True
    early_stop = True
    name = "load-aware"

    def __init__(self, costs: Costs | None = None, *, max_verify_tokens: int | None = None, skipping: bool = True) -> None:
        check_cap(max_verify_tokens)
        self.costs = costs
        self.max_verify_tokens = max_verify_tokens
        self.skipping = skipping
        self._forget()

    def _forget(self) -> None:
        """Begin a call."""
        self._memory: _Memory | None = None
        self._idle, self._rest, self._drafted_rounds = 0, FIRST_REST, 0
        self._resting: tuple[int, ...] = ()
        self._draft_s = 0.0

    def start(self, costs: Callable[[], Costs]) -> LoadAwareBudget:
        fresh = copy.copy(self)
        fresh.costs = self.costs or costs()
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
            return self._probe_batch(live, gamma)  # The same rows, and nothing new is known of them.
        samples = memory.samples(live.requests) if self.skipping else None
        if samples is None:
            return self._draft(Proposal(gamma))
        verify_s = costs.verify_s(rows, live.context_tokens)
        plain = rows / verify_s[0]
        limits = np.minimum(live.room, gamma)
        how: dict[str, Any] = {"room": room, "early_stop": self.early_stop}
        lengths = sorted({n for n in (1, 2, 4) if n < gamma} | {gamma})
        everyone = _outlook(samples, limits, verify_s, costs, lengths, **how)
        choice, best = Proposal(everyone.length), everyone.rate
        worth = np.flatnonzero(everyone.net_s > 0)
        if 0 < len(worth) < rows:
            some = _outlook(samples[:, worth], limits[worth], verify_s, costs, lengths, others=rows - len(worth), **how)
            if some.rate > best:
                choice, best = Proposal(some.length, tuple(worth.tolist())), some.rate
        if best <= plain:
            self._resting = live.requests
            return self._probe_batch(live, gamma)
        self._idle, self._rest = 0, FIRST_REST
        if self._drafted_rounds % _WHOLE_BLOCK_EVERY == 0:
            choice = Proposal(gamma, choice.rows)
        return self._draft(self._probe_rows(live, choice))

    def _probe_batch(self, live: LiveRows, gamma: int) -> Proposal:
        """Nothing pays: rest, and look again after a while, with those rows that have rested longest."""
        assert self._memory is not None
        rows = [self._memory.rows[request] for request in live.requests]
        for row in rows:
            row.idle += 1
        self._idle += 1
        if self._idle < self._rest:
            return Proposal(0)
        self._resting = ()
        self._idle, self._rest = 0, min(2 * self._rest, LONGEST_REST)
        longest = sorted(range(len(rows)), key=lambda r: -rows[r].idle)[:_PROBE_ROWS]
        for r in longest:
            rows[r].idle = 0
        return Proposal(gamma, tuple(sorted(longest)) if len(longest) < len(rows) else None)

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
        context = 0 if drafts.live is None else drafts.live.context_tokens
        round_s = self._known_costs().verify_s(drafts.rows, context) + self._draft_s
        most = None if self.max_verify_tokens is None else max(self.max_verify_tokens - drafts.rows, 0)
        return self._admit(survival, drafts, round_s, most)

    def _admit(self, survival: np.ndarray, drafts: Drafts, round_s: np.ndarray, most: int | None) -> list[int]:
        return admit_early_stop(survival, drafts.limits, round_s, most, self._known_costs().pad_s(drafts.rows))

    def learn(self, finished: FinishedRound) -> None:
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

    def _admit(self, survival: np.ndarray, drafts: Drafts, round_s: np.ndarray, most: int | None) -> list[int]:
        length = survival.shape[1]
        requests = range(drafts.rows) if drafts.live is None else drafts.live.requests
        old = np.ones_like(survival)
        for r, request in enumerate(requests):
            history = self._before.get(request)
            if history is not None and len(history) == 2:
                before = history[0][:length]
                old[r, : len(before)] = before
                old[r, len(before) :] = before[-1] if len(before) else 1.0
        alive = set(requests)
        self._before = {request: kept for request, kept in self._before.items() if request in alive}
        count = best_count(old, drafts.limits, round_s, self._known_costs().pad_s(drafts.rows))
        return admit_top(survival, drafts.limits, count if most is None else min(count, most))

    def learn(self, finished: FinishedRound) -> None:
        super().learn(finished)
        if finished.confidence is None:
            return
        survival = survivals(finished.confidence.numpy())
        for r, (request, drafted) in enumerate(zip(finished.requests, finished.drafted, strict=True)):
            if drafted:
                self._before.setdefault(request, deque(maxlen=2)).append(survival[r, :drafted])


def survivals(confidence: np.ndarray) -> np.ndarray:
    """a_j = prod_{i<=j} c_i, `(R, n)`, float64; a confidence that is not a number ends the row."""
    return np.cumprod(np.nan_to_num(confidence.astype(np.float64), nan=0.0), axis=1)
