"""Online cost estimation: costs corrected by what finished rounds took.

A profile holds for the moment in which it was measured, a prior for no machine in particular. Decisions need ratios only: what drafted
tokens and what drafts cost beside a plain pass. Three logarithms are estimated: the machine's speed, which swings and slows all alike, and
the factors on tokens and on drafts, which hardly change.

Source: Kalman filter (Kalman 1960) of random walks, linearised at the estimate.
"""

from __future__ import annotations

import math

import numpy as np

from hf_dspark.budgets.budget import FinishedRound
from hf_dspark.budgets.cost_model import Costs, PassCosts

# All in logarithms. A round's time is off by about 10% on a shared machine, and the machine's speed wanders by as much from round to round.
ROUND_NOISE = 0.1
# A standard deviation of the factors at first: a profile or prior is wrong by a factor of 2 (log 2 = 0.7) now and then, of 4 hardly ever.
FACTOR_SPREAD = 0.7
# .. and of their walk: 10% within 400 rounds, as caches and batches change. With 0.003 or 0.01 the simulated throughput is the same.
FACTOR_WALK = 0.005

_SPEED, _TOKEN, _DRAFT = range(3)
_WALK = np.diag([ROUND_NOISE**2, FACTOR_WALK**2, FACTOR_WALK**2])


class OnlineCosts(Costs):
    """Those of a table, with a factor on what drafted tokens add to a pass and one on drafts.

    Args:
        table (`Costs`): what rounds are believed to cost at first, up to a common factor.
    """

    def __init__(self, table: Costs) -> None:
        super().__init__(table.rows, table.block_size)
        self.table = table
        self._logs = np.zeros(3)
        self._covariance = np.diag([1e4, FACTOR_SPREAD**2, FACTOR_SPREAD**2])  # of the speed nothing is known
        self._behind: set[int] = set()  # requests with hidden states that the drafter has not read

    @property
    def factors(self) -> tuple[float, float]:
        """By which tokens and drafts cost more beside a plain pass than in the table."""
        return math.exp(self._logs[_TOKEN]), math.exp(self._logs[_DRAFT])

    def passes(self, rows: int, context_tokens: int = 0) -> PassCosts:
        return self.table.passes(rows, context_tokens).scaled(self.factors[0])

    def draft_s(self, rows: int, length: int) -> float:
        return self.table.draft_s(rows, length) * self.factors[1]

    def learn(self, finished: FinishedRound, context_tokens: int) -> None:
        """Correct the factors by a finished round; one without times changes nothing.

        Args:
            finished (`FinishedRound`): what it verified, and how long it took.
            context_tokens (`int`): tokens that the longest row held before it.
        """
        if finished.seconds is None:
            return
        self._covariance += _WALK
        drafted = {request for request, length in zip(finished.requests, finished.drafted, strict=True) if length}
        # The first draft after a back-off reads all that was committed meanwhile: it may be longer for that, but not shorter.
        catches_up = bool(drafted & self._behind)
        self._behind = set(finished.requests) - drafted
        passes = self.passes(len(finished.requests), context_tokens)
        plain_s = float(passes.verify_s[0])
        pass_s = float(passes.verify_s[sum(finished.verified)] + passes.wide_s[max(finished.verified)])
        draft_s = self.draft_s(len(drafted), max(finished.drafted))
        if finished.draft_seconds is None:
            both = pass_s + draft_s
            self._observe(finished.seconds, both, (pass_s - plain_s) / both, draft_s / both, at_most=catches_up)
            return
        self._observe(finished.seconds - finished.draft_seconds, pass_s, (pass_s - plain_s) / pass_s, 0.0)
        if draft_s:
            self._observe(finished.draft_seconds, draft_s, 0.0, 1.0, at_most=catches_up)

    def _observe(self, took_s: float, expected_s: float, token: float, draft: float, *, at_most: bool = False) -> None:
        """Learn from a time of which these shares are drafted tokens and drafts; where it is `at_most` so long, only if it is short."""
        shares = np.array([1.0, token, draft])
        beyond = math.log(max(took_s, 1e-9) / expected_s) - float(self._logs[_SPEED])
        if at_most and beyond > 0:
            return
        seen = self._covariance @ shares
        variance = float(shares @ seen) + ROUND_NOISE**2
        far = 3 * math.sqrt(variance)  # a machine that was busy for a moment is not slow
        self._logs += seen * (min(max(beyond, -far), far) / variance)
        self._covariance -= np.outer(seen, seen) / variance
