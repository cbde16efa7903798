"""What rounds cost, corrected by what the finished ones took. Pure numbers; knows no model and no clock.

A profile is measured once, in a moment of its own: the machine may be slower or faster later, share its caches with something else, or
charge real rounds for what the profile's do not have (a budget's own time). What counts is the ratio of drafted to plain rounds. So the
machine's speed, which may swing within seconds and makes all rounds dearer alike, is followed closely; what tokens and drafts cost in units
of it, which hardly changes, is followed slowly, and best where plain and drafted rounds take turns.

Source: the Kalman filter (Kalman 1960) of random walks in the logarithms of those factors, linearised at the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hf_dspark.budgets.budget import FinishedRound
from hf_dspark.budgets.cost_model import Costs, PassCosts

# Standard deviations, in logarithms. By which the factors walk from one round to the next: the machine's speed, and what belongs to passes
# of some size, to tokens or to drafts.
_SPEED_WALK, _SHARE_WALK = 0.015, 0.003
# By how much the speed may have changed after a pause that is long beside so many seconds.
_PAUSE_WALK, _PAUSE_SECONDS = 0.15, 3.0
# .. and by which the profile may be wrong about them.
_SPEED_AT_FIRST, _SHARE_AT_FIRST = 0.5, 0.35
# What a round took beyond its estimate counts up to so many times the usual distance: a machine that was busy for a moment is not slow.
_FAR = 3.0
_USUAL_AT_FIRST, _LEAST_USUAL = 0.3, 0.01
# Factors that a correction may reach; and the least part of the profile's pass that a round can have taken beside its draft.
_LEAST, _MOST = 0.25, 8.0
_LEAST_PASS = 0.1

_SPEED, _DRAFT = 0, 1


class _Factors:
    """Logarithms of factors, and how far they may be off: the machine's speed, what drafts cost beside it, and for each size of batches
    what a pass without drafted tokens and what a token in it cost beside it.
    """

    def __init__(self) -> None:
        self.logs = np.zeros(2)
        self.spread = np.diag([_SPEED_AT_FIRST**2, _SHARE_AT_FIRST**2])
        self.sizes: dict[int, int] = {}  # place of a size's two logarithms
        self.usual: dict[str, float] = {}

    def place(self, size: int) -> int:
        """Where the logarithms of a size are; a new one begins where its nearest neighbour stands."""
        if size not in self.sizes:
            near = self.nearest(size)
            first = np.zeros(2) if near is None else self.logs[near : near + 2]
            self.sizes[size], count = len(self.logs), len(self.logs)
            self.logs = np.concatenate([self.logs, first])
            spread = np.zeros((count + 2, count + 2))
            spread[:count, :count] = self.spread
            spread[count:, count:] = np.eye(2) * _SHARE_AT_FIRST**2
            self.spread = spread
        return self.sizes[size]

    def nearest(self, size: int) -> int | None:
        """The place of the known size that is nearest."""
        return None if not self.sizes else self.sizes[min(self.sizes, key=lambda other: abs(other - size))]

    def walk(self, waited: float) -> None:
        """A round has passed, and so many seconds before it."""
        self.spread.flat[:: len(self.logs) + 1] += _SHARE_WALK**2
        self.spread[_SPEED, _SPEED] += _SPEED_WALK**2 - _SHARE_WALK**2 - _PAUSE_WALK**2 * math.expm1(-waited / _PAUSE_SECONDS)

    def hear(self, kind: str, beyond: float, slopes: Mapping[int, float], *, at_most: bool = False) -> None:
        """An observation.

        Args:
            kind (`str`): observations of one kind share their usual distance from what is expected.
            beyond (`float`): its logarithm less the expected one.
            slopes (`dict[int, float]`): what it changes by with each logarithm, by place; not at all with the others.
            at_most (`bool`): it may be too long, so it only tells what is not more.
        """
        usual = self.usual.get(kind, _USUAL_AT_FIRST)
        if at_most and beyond >= 0:
            return
        self.usual[kind] = max(usual + 0.05 * (min(abs(beyond), 2 * _FAR * usual) - usual), _LEAST_USUAL)
        told = min(max(beyond, -_FAR * usual), _FAR * usual)
        places, slope = list(slopes), np.array(list(slopes.values()))
        seen = self.spread[:, places] @ slope
        # One that is far off is as uncertain as it is far.
        gain = seen / (float(slope @ seen[places]) + usual**2 * (beyond / told if told else 1.0))
        self.logs += gain * told
        self.spread -= gain[:, None] * seen


class FollowedCosts(Costs):
    """Costs that follow the machine: those of a table, each part times a factor that finished rounds tell; of passes apart for 1, 2 to 3,
    4 to 7 .. rows.

    Args:
        costs (`Costs`): the table's.
    """

    def __init__(self, costs: Costs) -> None:
        super().__init__(costs.rows, costs.block_size)
        self.table = costs
        self._known = _Factors()
        self._behind: set[int] = set()  # requests that the drafter has to catch up with before it drafts for them
        self._found: dict[int, tuple[float, float, float]] = {}  # factors since the last round, by rows

    def factors(self, rows: int) -> tuple[float, float, float]:
        """By which a pass without drafted tokens, what tokens add to it, and drafting are dearer than the table says.

        Args:
            rows (`int`): live rows.
        """
        if rows not in self._found:
            logs, place = self._known.logs.tolist(), self._known.nearest(rows.bit_length())
            base, share = (0.0, 0.0) if place is None else logs[place : place + 2]
            speed = logs[_SPEED]
            base, token, draft = (
                min(max(math.exp(log), _LEAST), _MOST) for log in (speed + base, speed + base + share, speed + logs[_DRAFT])
            )
            self._found[rows] = base, token, draft
        return self._found[rows]

    def passes(self, rows: int, context_tokens: int = 0) -> PassCosts:
        base, token, _ = self.factors(rows)
        return _Scaled(self.table.passes(rows, context_tokens), base, token)

    def draft_s(self, rows: int, length: int) -> float:
        return self.table.draft_s(rows, length) * self.factors(rows)[2]

    def learn(self, finished: FinishedRound, context_tokens: int) -> None:
        """Hear of a round that is over; one without times tells nothing.

        Args:
            finished (`FinishedRound`): what it verified, and how long it took.
            context_tokens (`int`): tokens that the longest row held before it.
        """
        if finished.seconds is None:
            return
        rows, known = len(finished.requests), self._known
        self._found.clear()
        drafted = {request for request, length in zip(finished.requests, finished.drafted, strict=True) if length}
        # The table's drafts read what one round committed; one that reads more is dearer for no fault of the machine.
        catches_up = bool(drafted & self._behind)
        self._behind = set(finished.requests) - drafted
        table, place = self.table.passes(rows, context_tokens), known.place(rows.bit_length())
        known.walk(finished.waited_seconds)
        first = float(table.verify_s[0])
        added = max(float(table.verify_s[sum(finished.verified)] + table.wide_s[max(finished.verified)]) - first, 0.0)
        draft = self.table.draft_s(len(drafted), max(finished.drafted))
        logs = known.logs.tolist()
        plain_s, draft_s = first * math.exp(logs[_SPEED] + logs[place]), draft * math.exp(logs[_SPEED] + logs[_DRAFT])
        tokens_s = added * math.exp(logs[_SPEED] + logs[place] + logs[place + 1])
        pass_s = plain_s + tokens_s
        if finished.draft_seconds is None:  # not known apart
            took, expected = finished.seconds, pass_s + draft_s
            slopes = {_SPEED: 1.0, _DRAFT: draft_s / expected, place: pass_s / expected, place + 1: tokens_s / expected}
            known.hear("round", math.log(max(took, _LEAST_PASS * first) / expected), slopes, at_most=catches_up)
            return
        took = max(finished.seconds - finished.draft_seconds, _LEAST_PASS * first)
        known.hear("pass", math.log(took / pass_s), {_SPEED: 1.0, place: 1.0, place + 1: tokens_s / pass_s})
        if draft > 0 and finished.draft_seconds > 0:
            expected = draft * math.exp(known.logs[_SPEED] + known.logs[_DRAFT])
            beyond = math.log(finished.draft_seconds / expected)
            known.hear("draft", beyond, {_SPEED: 1.0, _DRAFT: 1.0}, at_most=catches_up)


class _Scaled(PassCosts):
    """Costs of passes with factors on their base and on what tokens add."""

    def __init__(self, table: PassCosts, base: float, token: float) -> None:
        self._table, self._base, self._token = table, base, token
        super().__init__(self._scale(table.verify_s), table.wide_s * token)

    def _scale(self, seconds: np.ndarray) -> np.ndarray:
        first = self._table.verify_s[0]
        return self._base * first + self._token * (seconds - first)

    def convex_s(self, tokens: int, start: int = 0) -> np.ndarray:
        return self._scale(self._table.convex_s(tokens, start))
