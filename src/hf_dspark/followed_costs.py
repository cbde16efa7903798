"""What rounds cost, corrected by what the finished ones took. Pure numbers; knows no model and no clock.

A profile is measured once, in a moment of its own: the machine may be slower or faster later, share its caches with something else, or
charge real rounds for what the profile's do not have (a budget's own time). What counts is the ratio of drafted to plain rounds: so the
base of a pass, what its tokens add, and drafting are followed each for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .costs import Costs, PassCosts
from .scheduling import FinishedRound

# A round counts half as much after about seventy more.
_FORGET = 0.99
# The profile counts as so many rounds, with a quarter of the base for their tokens; that tokens scale as the base does counts, for ever, as
# so many.
_PROFILE_ROUNDS, _SHAPE_ROUNDS = 0.5, 2.0
_TYPICAL = np.array([1.25, 0.25])
# What a round took beyond its estimate counts up to so many times the usual distance: a machine that was busy for a moment is not slow.
_FAR = 3.0
_USUAL_AT_FIRST = 0.4
# Factors that a correction may reach.
_LEAST, _MOST = 0.25, 8.0


def _near(value: float, usual: float) -> float:
    """A ratio to what was expected, brought to within some usual distances of 1."""
    return 1 + float(np.clip(value - 1, -_FAR * usual, _FAR * usual))


def _usual(usual: float, value: float) -> float:
    """The usual distance of such ratios from 1, with one more; of one that is far off not all counts."""
    return usual + 0.05 * (min(abs(value - 1), 2 * _FAR * usual) - usual)


@dataclass
class _PassFactors:
    """Of rounds with about the same number of rows: least squares with forgetting for y = base (1 + u) + more u, where y is what a round
    took and u what its tokens add by the profile, both in units of the profile's pass without drafted tokens.
    """

    base: float = 1.0
    token: float = 1.0
    usual: float = _USUAL_AT_FIRST

    def __post_init__(self) -> None:
        self.moments = _PROFILE_ROUNDS * np.outer(_TYPICAL, _TYPICAL)
        self.sums = _PROFILE_ROUNDS * _TYPICAL * (_TYPICAL @ [self.base, self.token - self.base])

    def learn(self, took: float, added: float) -> None:
        """A round of `took` base passes, of which its tokens add `added` by the profile."""
        x = np.array([1 + added, added])
        expected = self.base + self.token * added
        ratio = took / expected
        self.moments = _FORGET * self.moments + np.outer(x, x)
        self.sums = _FORGET * self.sums + x * expected * _near(ratio, self.usual)
        self.usual = _usual(self.usual, ratio)
        base, more = np.linalg.solve(self.moments + np.diag([0.0, _SHAPE_ROUNDS * _TYPICAL[1] ** 2]), self.sums)
        self.base = float(np.clip(base, _LEAST, _MOST))
        self.token = float(np.clip(base + more, _LEAST, _MOST))


@dataclass
class _DraftFactor:
    """Of drafts, whatever their rows and length: what they took over what the profile says, with forgetting."""

    factor: float = 1.0
    weight: float = _PROFILE_ROUNDS
    usual: float = _USUAL_AT_FIRST

    def learn(self, took: float) -> None:
        """A draft that took so many times what the profile says."""
        ratio = took / self.factor
        self.weight = min(self.weight + 1, 1 / (1 - _FORGET))
        self.factor = float(np.clip(self.factor * (1 + (_near(ratio, self.usual) - 1) / self.weight), _LEAST, _MOST))
        self.usual = _usual(self.usual, ratio)


class FollowedCosts(Costs):
    """Costs that follow the machine: those of a table, each part times a factor that finished rounds tell; of passes apart for 1, 2 to 3,
    4 to 7 .. rows.

    Args:
        costs (`Costs`): the table's.
    """

    def __init__(self, costs: Costs) -> None:
        super().__init__(costs.rows, costs.block_size)
        self.table = costs
        self._of_passes: dict[int, _PassFactors] = {}
        self._of_drafts = _DraftFactor()
        self._behind: set[int] = set()  # requests that the drafter has to catch up with before it drafts for them

    def factors(self, rows: int) -> tuple[float, float, float]:
        """By which a pass without drafted tokens, what tokens add to it, and drafting are dearer than the table says.

        Args:
            rows (`int`): live rows.
        """
        found = self._factors(rows)
        return found.base, found.token, self._of_drafts.factor

    def passes(self, rows: int, context_tokens: int = 0) -> PassCosts:
        factors = self._factors(rows)
        return _Scaled(self.table.passes(rows, context_tokens), factors.base, factors.token)

    def draft_s(self, rows: int, length: int) -> float:
        return self.table.draft_s(rows, length) * self._of_drafts.factor

    def learn(self, finished: FinishedRound, context_tokens: int) -> None:
        """Hear of a round that is over; one without times tells nothing.

        Args:
            finished (`FinishedRound`): what it verified, and how long it took.
            context_tokens (`int`): tokens that the longest row held before it.
        """
        if finished.seconds is None:
            return
        rows = len(finished.requests)
        drafted = {request for request, length in zip(finished.requests, finished.drafted, strict=True) if length}
        table = self.table.passes(rows, context_tokens)
        draft_s = self.table.draft_s(len(drafted), max(finished.drafted))
        if finished.draft_seconds is None:  # not known apart
            pass_s = finished.seconds - draft_s * self._of_drafts.factor
        else:
            pass_s = finished.seconds - finished.draft_seconds
            # The table's drafts read what one round committed; one that reads more is dearer for no fault of the machine.
            if draft_s > 0 and finished.draft_seconds > 0 and not drafted & self._behind:
                self._of_drafts.learn(finished.draft_seconds / draft_s)
        self._behind = set(finished.requests) - drafted
        base = float(table.verify_s[0])
        priced = float(table.verify_s[sum(finished.verified)] + table.wide_s[max(finished.verified)])
        if pass_s > 0:
            self._of_passes.setdefault(rows.bit_length(), self._factors(rows)).learn(pass_s / base, priced / base - 1)

    def _factors(self, rows: int) -> _PassFactors:
        """Those of this number of rows; what was never heard of begins where its nearest neighbour stands."""
        size = rows.bit_length()
        if size not in self._of_passes:
            near = min(self._of_passes, key=lambda other: abs(other - size), default=None)
            known = _PassFactors() if near is None else self._of_passes[near]
            return _PassFactors(known.base, known.token)
        return self._of_passes[size]


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
