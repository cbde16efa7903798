"""What rounds cost, corrected by what the finished ones took. Pure numbers; knows no model and no clock.

A profile is measured once, in a moment of its own: the machine may be slower or faster later, share its caches with something else, or
charge real rounds for what the profile's do not have (a budget's own time). What counts is the ratio of drafted to plain rounds: so the
base of a pass, what its tokens add, and drafting are followed each for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class _Factors:
    """Of rounds with about the same number of rows: least squares with forgetting for y = base (1 + u) + more u, where y is what a round
    took and u what its tokens add by the profile, both in units of the profile's pass without drafted tokens.
    """

    moments: np.ndarray = field(default_factory=lambda: _PROFILE_ROUNDS * np.outer(_TYPICAL, _TYPICAL))
    sums: np.ndarray = field(default_factory=lambda: _PROFILE_ROUNDS * _TYPICAL * _TYPICAL[0])
    base: float = 1.0
    token: float = 1.0
    usual: float = _USUAL_AT_FIRST
    draft: float = 1.0
    drafts: float = _PROFILE_ROUNDS

    def learn(self, took: float, added: float) -> None:
        """A round of `took` base passes, of which its tokens add `added` by the profile."""
        x = np.array([1 + added, added])
        expected = self.base + self.token * added
        distance = abs(took - expected) / expected
        took = expected * (1 + float(np.clip(took / expected - 1, -_FAR * self.usual, _FAR * self.usual)))
        self.usual += 0.05 * (min(distance, 2 * _FAR * self.usual) - self.usual)
        self.moments = _FORGET * self.moments + np.outer(x, x)
        self.sums = _FORGET * self.sums + x * took
        base, more = np.linalg.solve(self.moments + np.diag([0.0, _SHAPE_ROUNDS * _TYPICAL[1] ** 2]), self.sums)
        self.base = float(np.clip(base, _LEAST, _MOST))
        self.token = float(np.clip(base + more, _LEAST, _MOST))

    def learn_draft(self, ratio: float) -> None:
        """A draft that took `ratio` times what the profile says."""
        self.drafts = min(self.drafts + 1, 1 / (1 - _FORGET))
        ratio = float(np.clip(ratio, self.draft * (1 - _FAR * self.usual), self.draft * (1 + _FAR * self.usual)))
        self.draft = float(np.clip(self.draft + (ratio - self.draft) / self.drafts, _LEAST, _MOST))


class FollowedCosts(Costs):
    """Costs that follow the machine: those of a table, each part times a factor that finished rounds tell, apart for 1, 2 to 3, 4 to 7 ..
    rows.

    Args:
        costs (`Costs`): the table's.
    """

    def __init__(self, costs: Costs) -> None:
        super().__init__(costs.rows, costs.block_size)
        self.table = costs
        self._factors: dict[int, _Factors] = {}

    def factors(self, rows: int) -> tuple[float, float, float]:
        """By which a pass without drafted tokens, what tokens add to it, and drafting are dearer than the table says.

        Args:
            rows (`int`): live rows.
        """
        found = self._of(rows)
        return found.base, found.token, found.draft

    def passes(self, rows: int, context_tokens: int = 0) -> PassCosts:
        table, factors = self.table.passes(rows, context_tokens), self._of(rows)
        return _Scaled(table, factors.base, factors.token)

    def draft_s(self, rows: int, length: int) -> float:
        return self.table.draft_s(rows, length) * self._of(rows).draft

    def learn(self, finished: FinishedRound, context_tokens: int) -> None:
        """Hear of a round that is over; one without times tells nothing.

        Args:
            finished (`FinishedRound`): what it verified, and how long it took.
            context_tokens (`int`): tokens that the longest row held before it.
        """
        if finished.seconds is None:
            return
        rows, drafted = len(finished.requests), sum(n > 0 for n in finished.drafted)
        factors, table = self._of(rows), self.table.passes(rows, context_tokens)
        draft_s = self.table.draft_s(drafted, max(finished.drafted))
        if finished.draft_seconds is None:  # not known apart
            pass_s = finished.seconds - draft_s * factors.draft
        else:
            pass_s = finished.seconds - finished.draft_seconds
            if draft_s > 0 and finished.draft_seconds > 0:
                self._of(drafted).learn_draft(finished.draft_seconds / draft_s)
        base = float(table.verify_s[0])
        priced = float(table.verify_s[sum(finished.verified)] + table.wide_s[max(finished.verified)])
        if pass_s > 0:
            factors.learn(pass_s / base, priced / base - 1)

    def _of(self, rows: int) -> _Factors:
        return self._factors.setdefault(rows.bit_length(), _Factors())


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
