"""Costs that follow the machine: what finished rounds took corrects the profile."""

from __future__ import annotations

import numpy as np
import pytest

from hf_dspark.budgets.budget import FinishedRound
from hf_dspark.budgets.cost_model import Costs
from hf_dspark.budgets.online_costs import FollowedCosts
from tests.costs import made_costs

GAMMA = 7


def profile() -> Costs:
    return made_costs(lambda b: 0.030 + 0.0010 * b, lambda r, n: 0.004 + 0.0002 * r * n, GAMMA, (1, 4, 16))


def feed(
    costs: FollowedCosts, rows: int, rounds: int, *, base: float, token: float, draft: float, noise: float = 0.0, apart: bool = True,
    seed: int = 0,
) -> None:  # fmt: skip
    """Rounds on a machine whose plain passes, tokens and drafts cost so many times what the profile says; every sixth is plain."""
    random, table = np.random.default_rng(seed), costs.table.passes(rows)
    for n in range(rounds):
        length = 0 if n % 6 == 0 else GAMMA
        verified = tuple(int(v) for v in random.integers(0, length + 1, rows))
        first = table.verify_s[0]
        pass_s = base * first + token * (table.verify_s[sum(verified)] + table.wide_s[max(verified)] - first)
        draft_s = draft * costs.table.draft_s(rows, length)
        seconds = (pass_s + draft_s) * (1 + noise * random.normal())
        drafted = (length,) * rows
        requests = tuple(range(rows))
        costs.learn(FinishedRound(requests, drafted, verified, verified, verified, None, None, seconds, draft_s if apart else None), 0)


def test_a_profile_is_believed_until_rounds_tell_otherwise() -> None:
    """Without rounds, and with rounds that took what it says, costs are the profile's."""
    costs, table = FollowedCosts(profile()), profile()
    for rounds in (0, 100):
        feed(costs, 4, rounds, base=1.0, token=1.0, draft=1.0)
        np.testing.assert_allclose(costs.passes(4).verify_s, table.passes(4).verify_s)
        np.testing.assert_allclose(costs.passes(4).convex_s(20, 2), table.passes(4).convex_s(20, 2))
        np.testing.assert_allclose(costs.passes(4).wide_s, table.passes(4).wide_s)
        assert costs.draft_s(4, 5) == pytest.approx(table.draft_s(4, 5))


@pytest.mark.parametrize(("base", "token", "draft"), [(1.0, 3.0, 1.0), (1.5, 1.5, 1.5), (1.2, 0.4, 2.0), (0.6, 1.0, 0.5)])
def test_each_part_is_followed_for_itself(base: float, token: float, draft: float) -> None:
    """After 120 rounds each 5% off, passes of any size, and drafts, are within 6% of what they cost; batches not seen begin there."""
    costs, table = FollowedCosts(profile()), profile()
    feed(costs, 4, 120, base=base, token=token, draft=draft, noise=0.05)
    found, known = costs.passes(5), table.passes(5)
    real = base * known.verify_s[0] + token * (known.verify_s - known.verify_s[0])
    np.testing.assert_allclose(found.verify_s, real, rtol=0.06)
    np.testing.assert_allclose(found.wide_s, token * known.wide_s, rtol=0.2)
    assert costs.draft_s(4, 5) == pytest.approx(draft * table.draft_s(4, 5), rel=0.06)
    assert costs.factors(16) == costs.factors(4)


def test_where_the_device_does_not_tell_the_drafts_time_the_rest_is_followed() -> None:
    """With the times of whole rounds alone, tokens of triple cost are still found."""
    costs = FollowedCosts(profile())
    feed(costs, 4, 120, base=1.0, token=3.0, draft=1.0, noise=0.05, apart=False)
    assert costs.factors(4) == pytest.approx((1.0, 3.0, 1.0), rel=0.15)


def test_a_moment_in_which_the_machine_is_busy_changes_little() -> None:
    """One round of thirty times its length moves no factor by more than 5%, and ten slow rounds are forgotten after 300 usual ones."""
    costs = FollowedCosts(profile())
    feed(costs, 4, 120, base=1.0, token=1.0, draft=1.0, noise=0.03)
    before = costs.factors(4)
    costs.learn(FinishedRound((0, 1, 2, 3), (7,) * 4, (3,) * 4, (1,) * 4, (3,) * 4, None, None, 2.0, 0.01), 0)
    assert costs.factors(4) == pytest.approx(before, rel=0.05)
    feed(costs, 4, 10, base=5.0, token=5.0, draft=5.0)
    feed(costs, 4, 300, base=1.0, token=1.0, draft=1.0, noise=0.03, seed=1)
    assert costs.factors(4) == pytest.approx((1.0, 1.0, 1.0), rel=0.1)


def test_rounds_without_times_tell_nothing() -> None:
    """Of a loop that keeps no clock."""
    costs = FollowedCosts(profile())
    costs.learn(FinishedRound((0,), (7,), (3,), (1,), (3,)), 0)
    assert costs.factors(1) == (1.0, 1.0, 1.0)


def test_a_draft_that_reads_more_than_a_round_is_not_taken_for_a_dear_one() -> None:
    """The first draft after a rest catches up with all that was committed meanwhile; the next one counts again."""
    costs = FollowedCosts(profile())
    usual = costs.table.draft_s(4, 7)

    def round_(length: int, draft_s: float) -> None:
        costs.learn(FinishedRound((0, 1, 2, 3), (length,) * 4, (0,) * 4, (0,) * 4, (0,) * 4, None, None, 0.034 + draft_s, draft_s), 0)

    for _ in range(30):
        round_(7, usual)
    round_(0, 0.0)
    round_(7, 4 * usual)
    assert costs.factors(4)[2] == pytest.approx(1.0)
    round_(7, 1.1 * usual)
    assert costs.factors(4)[2] > 1.0


def test_drafts_that_become_dearer_for_good_are_followed() -> None:
    """Half as dear again after 300 quiet rounds: within 400 more the factor tells."""
    costs = FollowedCosts(profile())
    feed(costs, 4, 300, base=1.0, token=1.0, draft=1.0, noise=0.02)
    feed(costs, 4, 400, base=1.0, token=1.0, draft=1.5, noise=0.02, seed=1)
    assert costs.factors(4)[2] == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("swing", [0.3, 0.6])
def test_a_machine_whose_speed_swings_is_not_taken_for_one_with_dear_tokens(swing: float) -> None:
    """Speed swings by a factor of 1.3 or 1.6 within 150 rounds, noise of 8% comes on top, and stretches of 20 plain rounds follow on
    stretches of 40 drafted ones: what tokens and drafts cost beside a plain pass stays within a fifth of the truth, whenever it is asked.
    """
    costs, random = FollowedCosts(profile()), np.random.default_rng(3)
    table = costs.table.passes(4)
    first, shares = float(table.verify_s[0]), []
    for n in range(1500):
        length = 0 if n % 60 >= 40 else GAMMA
        verified = tuple(int(v) for v in random.integers(0, length + 1, 4))
        speed = (1 + swing) ** (0.5 * np.sin(2 * np.pi * n / 150))
        more = 1.4 * float(table.verify_s[sum(verified)] + table.wide_s[max(verified)] - first)
        draft_s = speed * 0.7 * costs.table.draft_s(4, length) * (1 + 0.08 * random.normal())
        seconds = speed * (first + more) * (1 + 0.08 * random.normal()) + draft_s
        costs.learn(FinishedRound((0, 1, 2, 3), (length,) * 4, verified, verified, verified, None, None, seconds, draft_s), 0)
        base, token, draft = costs.factors(4)
        shares.append((token / base, draft / base))
    found = np.array(shares[300:])
    assert found.min(0) == pytest.approx([1.4, 0.7], rel=0.2)
    assert found.max(0) == pytest.approx([1.4, 0.7], rel=0.2)


def test_after_a_pause_the_machine_may_be_slower_and_tokens_are_not_dearer_for_that() -> None:
    """Rounds come in fours, each plain or drafted by chance, and between fours the machine's speed jumps by 18%: told of the pauses, what
    tokens cost beside a plain pass is found less than two thirds as far from the truth as without being told.
    """

    def error(waited: float) -> float:
        costs, random, found = FollowedCosts(profile()), np.random.default_rng(5), []
        table = costs.table.passes(4)
        for stretch in range(400):
            speed = float(np.exp(0.18 * random.normal()))
            for n in range(4):
                length = GAMMA if random.random() < 0.5 else 0
                verified = (length // 2,) * 4
                seconds = speed * float(table.verify_s[sum(verified)] + table.wide_s[max(verified)]) * (1 + 0.02 * random.normal())
                draft_s = speed * costs.table.draft_s(4, length)
                costs.learn(
                    FinishedRound(
                        (0, 1, 2, 3), (length,) * 4, verified, verified, verified, None, None, seconds + draft_s, draft_s,
                        waited_seconds=0.0 if n else waited,
                    ),
                    0,
                )  # fmt: skip
            if stretch >= 50:
                base, token, _ = costs.factors(4)
                found.append(abs(np.log(token / base)))
        return float(np.mean(found))

    assert error(2.5) < 0.67 * error(0.0)


def test_a_faster_machine_is_followed_where_drafts_are_not_told_apart() -> None:
    """From four times as slow back to the profile's own speed, in equal rounds whose drafts are half a pass long: what these cost is known,
    though not which part of it costs what.
    """
    table = made_costs(lambda b: 0.030 + 0.0010 * b, lambda r, n: 0.015 + 0.0002 * r * n, GAMMA, (1, 4, 16))
    costs = FollowedCosts(table)
    passes = table.passes(4)
    for speed in (4.0, 1.0):
        for _ in range(300):
            seconds = speed * float(passes.verify_s[8] + passes.wide_s[2] + table.draft_s(4, GAMMA))
            costs.learn(FinishedRound((0, 1, 2, 3), (GAMMA,) * 4, (2,) * 4, (1,) * 4, (2,) * 4, None, None, seconds, None), 0)
        found = costs.passes(4)
        assert float(found.verify_s[8] + found.wide_s[2] + costs.draft_s(4, GAMMA)) == pytest.approx(seconds, rel=0.03)
        assert costs.factors(4) == pytest.approx((speed,) * 3, rel=0.25)


def test_the_machines_speed_is_one_for_batches_of_all_sizes() -> None:
    """It halves while eight rows are live: passes and drafts of four are known to be slower before one is seen."""
    costs = FollowedCosts(profile())
    feed(costs, 4, 200, base=1.0, token=1.0, draft=1.0, noise=0.03)
    feed(costs, 8, 400, base=2.0, token=2.0, draft=2.0, noise=0.03, seed=1)
    assert costs.factors(4) == pytest.approx((2.0, 2.0, 2.0), rel=0.15)


def test_dear_drafts_are_unlearned_from_drafts_after_a_rest() -> None:
    """A budget that rests hears only of drafts that catch up with what was committed meanwhile: such a one may be long for that, but one
    that is shorter than expected tells all the same.
    """
    costs = FollowedCosts(profile())
    feed(costs, 4, 200, base=1.0, token=1.0, draft=3.0, noise=0.03)
    assert costs.factors(4)[2] == pytest.approx(3.0, rel=0.1)
    usual = costs.table.draft_s(4, GAMMA)
    first = float(costs.table.passes(4).verify_s[0])
    for n in range(800):
        length, draft_s = (GAMMA, 1.2 * usual) if n % 8 == 7 else (0, 0.0)
        costs.learn(FinishedRound((0, 1, 2, 3), (length,) * 4, (0,) * 4, (0,) * 4, (0,) * 4, None, None, first + draft_s, draft_s), 0)
    assert costs.factors(4)[2] < 1.5
