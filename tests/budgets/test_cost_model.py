"""The lookup of measured times: exact where something was measured, monotone and in between elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from hf_dspark.budgets.cost_model import Costs, PassCosts, RowCosts


def table(rows: int, slope: float = 1.0) -> RowCosts:
    return RowCosts({128: {1: 10.0 * rows, 3: (10.0 + 2 * slope) * rows, 8: (10.0 + 7 * slope) * rows}}, {1: 1.0 * rows, 7: 4.0 * rows})


def test_measured_times_come_back() -> None:
    """At rows and token counts that were measured the lookup gives what was measured."""
    costs = Costs({1: table(1), 4: table(4)}, 7)
    assert costs.passes(1).verify_s[[0, 2, 7]].tolist() == [10.0, 12.0, 17.0]
    assert costs.passes(4).verify_s[[0, 8, 28]].tolist() == [40.0, 48.0, 68.0]
    assert costs.draft_s(4, 1) == 4.0
    assert costs.draft_s(1, 7) == 4.0


def test_straight_lines_in_between() -> None:
    """Between measured points times lie on the line, in tokens, in rows and in draft length."""
    costs = Costs({1: table(1), 3: table(3)}, 7)
    assert costs.passes(1).verify_s[1] == pytest.approx(11.0)
    assert costs.passes(2).verify_s[0] == pytest.approx(20.0)
    assert costs.passes(2).verify_s[14] == pytest.approx(34.0)
    assert costs.draft_s(1, 4) == pytest.approx(2.5)
    assert costs.draft_s(2, 1) == pytest.approx(2.0)


def test_contexts_lie_on_the_line_too() -> None:
    """Rows that hold more tokens cost what two measured contexts say, read in steps of 64 tokens."""
    costs = Costs({1: RowCosts({96: {1: 1.0, 2: 2.0}, 224: {1: 3.0, 2: 4.0}}, {1: 1.0})}, 1)
    assert costs.passes(1, 96).verify_s[0] == pytest.approx(1.0)
    assert costs.passes(1, 160).verify_s[0] == pytest.approx(2.0)
    assert costs.passes(1, 224).verify_s.tolist() == pytest.approx([3.0, 4.0])


@pytest.mark.parametrize("seed", range(20))
def test_more_tokens_never_cost_less(seed: int) -> None:
    """Whatever noise was measured, the lookup does not fall as a pass grows, and has an entry for every size."""
    random = np.random.default_rng(seed)
    rows = {
        r: RowCosts({c: {n: random.uniform(1, 2) * r for n in (1, 2, 5, 8)} for c in (128, 512)}, {1: 0.1, 7: 0.2}) for r in (1, 2, 8, 32)
    }
    costs = Costs(rows, 7)
    for r in (1, 2, 3, 7, 20, 32, 50):
        times = costs.passes(r, int(random.integers(0, 600))).verify_s
        assert times.shape == (1 + 7 * r,)
        assert (np.diff(times) >= 0).all()


def test_beyond_what_was_measured_the_line_goes_on() -> None:
    """Twice the rows of the largest table cost about twice as much, not the same."""
    costs = Costs({4: table(4), 8: table(8)}, 7)
    assert costs.passes(16).verify_s[0] == pytest.approx(160.0)
    assert costs.draft_s(16, 7) == pytest.approx(64.0)


def test_tokens_and_width_are_told_apart() -> None:
    """From passes of equal rows, of one long row and of some longer rows comes back the price by tokens and by the longest row of which
    they were made up, steps and all.
    """
    rows, gamma, width = 8, 7, 0.5

    def tokens_s(drafted: int) -> float:
        return 10.0 + 3.0 * (drafted > 0) + 0.1 * drafted  # a step, then a line

    measured = RowCosts(
        {128: {1 + n: tokens_s(rows * n) + width * n for n in (0, 1, 2, 4, 7)}},
        {1: 1.0},
        {128: {n: tokens_s(n) + width * n for n in (4, 7)}},
        {n: tokens_s(n) + width for n in (2, 4, 6)},
    )
    passes = Costs({rows: measured}, gamma).passes(rows)
    assert passes.wide_s.tolist() == pytest.approx([width * n for n in range(gamma + 1)], rel=1e-3)
    for drafted in (0, 2, 3, 4, 6, 8, 16, 32, 56):
        assert passes.verify_s[drafted] == pytest.approx(tokens_s(drafted), rel=1e-3)


def test_width_lies_on_the_line() -> None:
    """Its price is read between measured numbers of rows and contexts, and is never negative."""
    flat = {1: 1.0, 2: 1.0}
    wide = RowCosts({64: flat, 192: {1: 1.0}}, {1: 1.0}, {64: {1: 1.4}, 192: {1: 1.8}})
    none = RowCosts({64: flat, 192: {1: 1.0}}, {1: 1.0}, {64: {1: 0.9}})
    costs = Costs({2: none, 4: wide}, 1)
    assert costs.passes(2, 64).wide_s.tolist() == [0.0, 0.0]
    assert costs.passes(4, 64).wide_s[1] == pytest.approx(costs.passes(3, 64).wide_s[1] * 2)
    near, far = (costs.passes(4, context).wide_s[1] for context in (64, 192))
    assert 0.4 < near < far
    with pytest.raises(ValueError, match="positive and finite"):
        RowCosts({1: {1: 1.0}}, {1: 1.0}, {1: {1: -0.1}})


@pytest.mark.parametrize("seed", range(20))
def test_the_convex_curve_is_the_greatest(seed: int) -> None:
    """It is convex, nowhere above the costs from its start on, and at each place some chord of the costs forbids a greater one."""
    random = np.random.default_rng(seed)
    curve = np.cumsum(random.random(12) * (random.random(12) < 0.5))
    passes, start, tokens = PassCosts(curve, np.zeros(4)), int(random.integers(0, 6)), 11
    convex = passes.convex_s(tokens, start)
    assert (np.diff(convex, 2) >= -1e-12).all()
    assert (convex[start:] <= curve[start:] + 1e-12).all()
    for j in range(start, tokens + 1):
        chords = [
            curve[a] + (curve[b] - curve[a]) * ((j - a) / (b - a) if b > a else 0.0)
            for a in range(start, j + 1)
            for b in range(j, tokens + 1)
        ]
        assert convex[j] == pytest.approx(min(chords))
    assert np.diff(convex)[: start + 1] == pytest.approx(np.diff(convex)[start])


def test_what_falls_shares_its_mean() -> None:
    """A time that noise made too long does not lift all that follow it."""
    costs = Costs({1: RowCosts({1: {1: 1.0, 2: 3.0, 3: 2.0, 4: 4.0}}, {1: 1.0})}, 3)
    assert costs.passes(1).verify_s.tolist() == pytest.approx([1.0, 2.5, 2.5, 4.0])


def test_nothing_costs_nothing() -> None:
    """No rows or no tokens, no time of a draft."""
    costs = Costs({1: table(1)}, 7)
    assert costs.draft_s(0, 7) == costs.draft_s(1, 0) == 0.0


def test_a_table_survives_json() -> None:
    """What was written is read back equal."""
    import json

    assert RowCosts.from_json(json.loads(json.dumps(table(2).to_json()))) == table(2)


@pytest.mark.parametrize("bad", [{}, {"verify_s": {}, "draft_s": {"1": 1.0}}, {"verify_s": {"1": {"1": -1.0}}, "draft_s": {"1": 1.0}}, []])
def test_a_broken_table_is_refused(bad: object) -> None:
    """Missing parts and impossible times are a ValueError, never a table."""
    with pytest.raises(ValueError, match=r"cost table"):
        RowCosts.from_json(bad)
