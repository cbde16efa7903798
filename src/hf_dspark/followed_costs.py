"""What rounds cost, corrected by what the finished ones took. Pure numbers; knows no model and no clock.

A profile is measured once, in a moment of its own: the machine may be slower or faster later, share its caches with something else, or
charge real rounds for what the profile's do not have (a budget's own time). What counts is the ratio of drafted to plain rounds. So the
machine's speed, which may swing within seconds and makes all rounds dearer alike, is followed closely; what tokens and drafts cost in units
of it, which hardly changes, is followed slowly, and best where plain and drafted rounds take turns.

Source: the Kalman filter (Kalman 1960) of random walks in the logarithms of those factors, linearised at the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .costs import Costs, PassCosts
from .scheduling import FinishedRound

# Standard deviations, in logarithms. By which the factors walk from one round to the next: the machine's speed, and what a token or a draft
# costs beside a pass without drafted tokens.
_SPEED_WALK, _SHARE_WALK = 0.015, 0.003
# .. and by which the profile may be wrong about them.
_SPEED_AT_FIRST, _SHARE_AT_FIRST = 0.5, 0.35
# What a round took beyond its estimate counts up to so many times the usual distance: a machine that was busy for a moment is not slow.
_FAR = 3.0
_USUAL_AT_FIRST, _LEAST_USUAL = 0.3, 0.01
# Factors that a correction may reach.
_LEAST, _MOST = 0.25, 8.0
_LOWEST, _HIGHEST = np.log(_LEAST), np.log(_MOST)


@dataclass
class _Surprise:
    """How far observations usually are from what was expected, in logarithms."""

    usual: float = _USUAL_AT_FIRST

    def of(self, value: float) -> float:
        """An observation's distance, brought to within some usual ones; all are judged by it from then on, by one far off in part."""
        usual = self.usual
        self.usual = max(usual + 0.05 * (min(abs(value), 2 * _FAR * usual) - usual), _LEAST_USUAL)
        return float(np.clip(value, -_FAR * usual, _FAR * usual))


class _PassFactors:
    """Of rounds with about the same number of rows, which take speed (1 + share u), where u is what their tokens add by the profile, in
    units of the profile's pass without drafted tokens.

    Args:
        speed, share (`float`): logarithms to begin with.
    """

    def __init__(self, speed: float = 0.0, share: float = 0.0) -> None:
        self.logs = np.array([speed, share])
        self.spread = np.diag([_SPEED_AT_FIRST**2, _SHARE_AT_FIRST**2])
        self.surprise = _Surprise()

    @property
    def base(self) -> float:
        """Times that a pass without drafted tokens takes what the profile says."""
        return float(np.exp(self.logs[0]))

    @property
    def token(self) -> float:
        """.. that a drafted token adds."""
        return float(np.exp(np.clip(self.logs.sum(), _LOWEST, _HIGHEST)))

    def learn(self, took: float, added: float) -> None:
        """A round of `took` base passes, of which its tokens add `added` by the profile."""
        self.spread += np.diag([_SPEED_WALK**2, _SHARE_WALK**2])
        tokens = float(np.exp(self.logs[1])) * max(added, 0.0)
        slope = np.array([1.0, tokens / (1 + tokens)])
        usual = self.surprise.usual
        beyond = self.surprise.of(float(np.log(took) - self.logs[0] - np.log1p(tokens)))
        seen = self.spread @ slope
        gain = seen / (slope @ seen + usual**2)
        self.logs = np.clip(self.logs + gain * beyond, _LOWEST, _HIGHEST)
        self.spread -= np.outer(gain, seen)


class _DraftFactor:
    """Of drafts, whatever their rows and length: what they take over what the profile says, in units of the machine's speed."""

    def __init__(self) -> None:
        self.log = 0.0
        self.spread = _SHARE_AT_FIRST**2
        self.surprise = _Surprise()

    def learn(self, took: float, speed: float) -> None:
        """A draft that took so many times what the profile says, on a machine whose passes took `speed` times that."""
        self.spread += _SHARE_WALK**2
        usual = self.surprise.usual
        beyond = self.surprise.of(float(np.log(took / speed)) - self.log)
        gain = self.spread / (self.spread + usual**2)
        self.log = float(np.clip(self.log + gain * beyond, _LOWEST, _HIGHEST))
        self.spread -= gain * self.spread

    def at(self, speed: float) -> float:
        """Times that a draft takes what the profile says."""
        return float(np.clip(np.exp(self.log) * speed, _LEAST, _MOST))


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
        self._rows = 0  # live ones, when last heard of: what the machine's speed is known from
        self._behind: set[int] = set()  # requests that the drafter has to catch up with before it drafts for them

    def factors(self, rows: int) -> tuple[float, float, float]:
        """By which a pass without drafted tokens, what tokens add to it, and drafting are dearer than the table says.

        Args:
            rows (`int`): live rows.
        """
        found = self._factors(rows)
        return found.base, found.token, self._of_drafts.at(found.base)

    def passes(self, rows: int, context_tokens: int = 0) -> PassCosts:
        factors = self._factors(rows)
        return _Scaled(self.table.passes(rows, context_tokens), factors.base, factors.token)

    def draft_s(self, rows: int, length: int) -> float:
        return self.table.draft_s(rows, length) * self._of_drafts.at(self._factors(self._rows or rows).base)

    def learn(self, finished: FinishedRound, context_tokens: int) -> None:
        """Hear of a round that is over; one without times tells nothing.

        Args:
            finished (`FinishedRound`): what it verified, and how long it took.
            context_tokens (`int`): tokens that the longest row held before it.
        """
        if finished.seconds is None:
            return
        rows = self._rows = len(finished.requests)
        factors = self._of_passes.setdefault(rows.bit_length(), self._factors(rows))
        drafted = {request for request, length in zip(finished.requests, finished.drafted, strict=True) if length}
        table = self.table.passes(rows, context_tokens)
        draft_s = self.table.draft_s(len(drafted), max(finished.drafted))
        if finished.draft_seconds is None:  # not known apart
            pass_s = finished.seconds - draft_s * self._of_drafts.at(factors.base)
        else:
            pass_s = finished.seconds - finished.draft_seconds
            # The table's drafts read what one round committed; one that reads more is dearer for no fault of the machine.
            if draft_s > 0 and finished.draft_seconds > 0 and not drafted & self._behind:
                self._of_drafts.learn(finished.draft_seconds / draft_s, factors.base)
        self._behind = set(finished.requests) - drafted
        base = float(table.verify_s[0])
        priced = float(table.verify_s[sum(finished.verified)] + table.wide_s[max(finished.verified)])
        if pass_s > 0:
            factors.learn(pass_s / base, priced / base - 1)

    def _factors(self, rows: int) -> _PassFactors:
        """Those of this number of rows; what was never heard of begins where its nearest neighbour stands."""
        size = rows.bit_length()
        if size not in self._of_passes:
            near = min(self._of_passes, key=lambda other: abs(other - size), default=None)
            known = _PassFactors() if near is None else self._of_passes[near]
            return _PassFactors(*known.logs)
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
