"""Online cost estimation: what finished rounds took corrects a profile or prior."""

from __future__ import annotations

import numpy as np
import pytest

from hf_dspark.budgets.budget import FinishedRound
from hf_dspark.budgets.cost_model import Costs
from hf_dspark.budgets.online_costs import OnlineCosts
from tests.costs import made_costs

GAMMA = 7


def profile() -> Costs:
    return made_costs(lambda b: 0.030 + 0.0010 * b, lambda r, n: 0.004 + 0.0002 * r * n, GAMMA, (1, 4, 16))


def finished(rows: int, drafted: int, verified: tuple[int, ...], pass_s: float, draft_s: float, apart: bool = True) -> FinishedRound:
    requests = tuple(range(rows))
    return FinishedRound(
        requests, (drafted,) * rows, verified, verified, verified, seconds=pass_s + draft_s, draft_seconds=draft_s if apart else None
    )


def feed(
    costs: OnlineCosts, rounds: int, *, speed: float = 1.0, token: float = 1.0, draft: float = 1.0, noise: float = 0.0, swing: float = 0.0,
    apart: bool = True, rows: int = 4, seed: int = 0,
) -> list[tuple[float, float]]:  # fmt: skip
    """Rounds on a machine whose tokens and drafts cost so many times what the table says; every sixth is plain. Returns all factors."""
    random, table, found = np.random.default_rng(seed), costs.table.passes(rows), []
    for n in range(rounds):
        length = 0 if n % 6 == 0 else GAMMA
        verified = tuple(int(v) for v in random.integers(0, length + 1, rows))
        first = float(table.verify_s[0])
        now = speed * (1 + swing) ** np.sin(2 * np.pi * n / 150) * np.exp(noise * random.normal())
        pass_s = first + token * float(table.verify_s[sum(verified)] + table.wide_s[max(verified)] - first)
        draft_s = draft * costs.table.draft_s(rows, length) * np.exp(noise * random.normal())
        costs.learn(finished(rows, length, verified, now * pass_s, now * draft_s, apart), 0)
        found.append(costs.factors)
    return found


@pytest.mark.parametrize("rounds", [0, 100])
def test_a_profile_is_believed_until_rounds_tell_otherwise(rounds: int) -> None:
    """Without rounds, and with rounds of a machine that is slower by one factor throughout, costs are the table's."""
    costs, table = OnlineCosts(profile()), profile()
    feed(costs, rounds, speed=50.0)
    np.testing.assert_allclose(costs.passes(4).verify_s, table.passes(4).verify_s)
    assert costs.draft_s(4, 5) == pytest.approx(table.draft_s(4, 5))


@pytest.mark.parametrize("apart", [True, False], ids=["drafts timed", "rounds timed"])
@pytest.mark.parametrize(("token", "draft"), [(3.0, 1.0), (0.4, 2.0), (1.0, 0.4)])
def test_factors_are_found(token: float, draft: float, apart: bool) -> None:
    """After 60 rounds, each 5% off, on a machine three times as slow, rounds of any size are within 12% beside a plain one."""
    costs, table = OnlineCosts(profile()), profile()
    feed(costs, 60, speed=3.0, token=token, draft=draft, noise=0.05, apart=apart)
    for rows in (4, 16):
        passes = table.passes(rows)
        real = passes.scaled(token).verify_s[7::7] + draft * table.draft_s(rows, GAMMA)
        found = costs.passes(rows).verify_s[7::7] + costs.draft_s(rows, GAMMA)
        np.testing.assert_allclose(found, real, rtol=0.12)


def test_a_swinging_machine_is_not_taken_for_expensive_tokens() -> None:
    """Speed swings by 1.6 either way within 150 rounds, with noise of 8% on top: factors stay within a third of the truth."""
    found = np.array(feed(OnlineCosts(profile()), 1000, token=1.4, draft=0.7, noise=0.08, swing=0.6)[200:])
    assert found.min(0) == pytest.approx([1.4, 0.7], rel=0.33)
    assert found.max(0) == pytest.approx([1.4, 0.7], rel=0.33)


def test_a_busy_moment_changes_little() -> None:
    """One round of thirty times its length moves no factor by more than a tenth."""
    costs = OnlineCosts(profile())
    feed(costs, 120, noise=0.03)
    before = costs.factors
    costs.learn(finished(4, 7, (3,) * 4, 2.0, 0.01), 0)
    assert costs.factors == pytest.approx(before, rel=0.1)


def test_a_lasting_change_is_followed() -> None:
    """Drafts half as expensive again after 300 quiet rounds: within 400 more the factor has followed."""
    costs = OnlineCosts(profile())
    feed(costs, 300, noise=0.02)
    feed(costs, 400, draft=1.5, noise=0.02, seed=1)
    assert costs.factors[1] == pytest.approx(1.5, rel=0.1)


def test_rounds_without_times_change_nothing() -> None:
    """Of a loop that does not time them."""
    costs = OnlineCosts(profile())
    costs.learn(FinishedRound((0,), (7,), (3,), (1,), (3,)), 0)
    assert costs.factors == (1.0, 1.0)


def test_the_first_draft_after_a_back_off_tells_only_if_it_is_short() -> None:
    """It reads all that was committed meanwhile; the next one counts again."""
    usual = profile().draft_s(4, 7)

    def factor(*drafts_s: float) -> float:
        costs = OnlineCosts(profile())
        feed(costs, 30)
        for draft_s in (0.0, *drafts_s):
            costs.learn(finished(4, 7 if draft_s else 0, (0,) * 4, 0.034, draft_s), 0)
        return costs.factors[1]

    assert factor(4 * usual) == pytest.approx(1.0, rel=1e-3)
    assert factor(usual, 1.3 * usual) > 1.01
    assert factor(0.7 * usual) < 0.99
