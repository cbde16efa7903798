"""The lookup of measured times: exact where something was measured, monotone and in between elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from hf_dspark.costs import Costs, RowCosts


def table(rows: int, slope: float = 1.0) -> RowCosts:
    return RowCosts({128: {1: 10.0 * rows, 3: (10.0 + 2 * slope) * rows, 8: (10.0 + 7 * slope) * rows}}, {1: 1.0 * rows, 7: 4.0 * rows})


def test_measured_times_come_back() -> None:
    """At rows and token counts that were measured the lookup gives what was measured."""
    costs = Costs({1: table(1), 4: table(4)}, 7)
    assert costs.verify_s(1)[[0, 2, 7]].tolist() == [10.0, 12.0, 17.0]
    assert costs.verify_s(4)[[0, 8, 28]].tolist() == [40.0, 48.0, 68.0]
    assert costs.draft_s(4, 1) == 4.0
    assert costs.draft_s(1, 7) == 4.0


def test_straight_lines_in_between() -> None:
    """Between measured points times lie on the line, in tokens, in rows and in draft length."""
    costs = Costs({1: table(1), 3: table(3)}, 7)
    assert costs.verify_s(1)[1] == pytest.approx(11.0)
    assert costs.verify_s(2)[0] == pytest.approx(20.0)
    assert costs.verify_s(2)[14] == pytest.approx(34.0)
    assert costs.draft_s(1, 4) == pytest.approx(2.5)
    assert costs.draft_s(2, 1) == pytest.approx(2.0)


def test_contexts_lie_on_the_line_too() -> None:
    """Rows that hold more tokens cost what two measured contexts say, read in steps of 64 tokens."""
    costs = Costs({1: RowCosts({96: {1: 1.0, 2: 2.0}, 224: {1: 3.0, 2: 4.0}}, {1: 1.0})}, 1)
    assert costs.verify_s(1, 96)[0] == pytest.approx(1.0)
    assert costs.verify_s(1, 160)[0] == pytest.approx(2.0)
    assert costs.verify_s(1, 224).tolist() == pytest.approx([3.0, 4.0])


@pytest.mark.parametrize("seed", range(20))
def test_more_tokens_never_cost_less(seed: int) -> None:
    """Whatever noise was measured, the lookup does not fall as a pass grows, and has an entry for every size."""
    random = np.random.default_rng(seed)
    rows = {
        r: RowCosts({c: {n: random.uniform(1, 2) * r for n in (1, 2, 5, 8)} for c in (128, 512)}, {1: 0.1, 7: 0.2}) for r in (1, 2, 8, 32)
    }
    costs = Costs(rows, 7)
    for r in (1, 2, 3, 7, 20, 32, 50):
        times = costs.verify_s(r, int(random.integers(0, 600)))
        assert times.shape == (1 + 7 * r,)
        assert (np.diff(times) >= 0).all()


def test_beyond_what_was_measured_the_line_goes_on() -> None:
    """Twice the rows of the largest table cost about twice as much, not the same."""
    costs = Costs({4: table(4), 8: table(8)}, 7)
    assert costs.verify_s(16)[0] == pytest.approx(160.0)
    assert costs.draft_s(16, 7) == pytest.approx(64.0)


def test_padding_lies_on_the_line() -> None:
    """Its price is read between measured numbers of rows, and is never negative."""
    costs = Costs({1: RowCosts({1: {1: 1.0}}, {1: 1.0}), 3: RowCosts({1: {1: 1.0}}, {1: 1.0}, 0.4)}, 1)
    assert costs.pad_s(1) == 0.0
    assert costs.pad_s(2) == pytest.approx(0.2)
    assert costs.pad_s(5) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="positive and finite"):
        RowCosts({1: {1: 1.0}}, {1: 1.0}, -0.1)


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
