"""The cost tables' interpolation: exact where something was measured, monotone and in between elsewhere; and the prior."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hf_dspark.budgets.cost_model import Costs, PassCosts, RowCosts, prior_costs


def table(rows: int, slope: float = 1.0) -> RowCosts:
    return RowCosts({128: {1: 10.0 * rows, 3: (10.0 + 2 * slope) * rows, 8: (10.0 + 7 * slope) * rows}}, {1: 1.0 * rows, 7: 4.0 * rows})


def test_measured_times_come_back_and_lines_lie_between() -> None:
    """In tokens, in rows and in draft length; beyond the largest batch the last line goes on."""
    costs = Costs({1: table(1), 4: table(4)}, 7)
    assert costs.passes(1).verify_s[[0, 1, 2, 7]].tolist() == pytest.approx([10.0, 11.0, 12.0, 17.0])
    assert costs.passes(4).verify_s[[0, 8, 28]].tolist() == pytest.approx([40.0, 48.0, 68.0])
    assert costs.passes(2).verify_s[[0, 14]].tolist() == pytest.approx([20.0, 34.0])
    assert costs.passes(16).verify_s[0] == pytest.approx(160.0)
    measured = {(4, 1): 4.0, (1, 7): 4.0, (1, 4): 2.5, (2, 1): 2.0, (16, 7): 64.0, (0, 7): 0.0, (1, 0): 0.0}
    assert {key: costs.draft_s(*key) for key in measured} == pytest.approx(measured)


def test_contexts_lie_on_the_line_too() -> None:
    """Rows that hold more tokens cost what two measured contexts say, in steps of 64 tokens."""
    costs = Costs({1: RowCosts({96: {1: 1.0, 2: 2.0}, 224: {1: 3.0}}, {1: 1.0})}, 1)
    assert [costs.passes(1, context).verify_s.tolist() for context in (96, 160, 224)] == [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]


def test_more_tokens_never_cost_less() -> None:
    """Whatever noise was measured, costs do not fall as a pass grows, and there is one for every size."""
    random = np.random.default_rng(0)
    for _ in range(10):
        rows = {
            r: RowCosts({c: {n: random.uniform(1, 2) * r for n in (1, 2, 5, 8)} for c in (128, 512)}, {1: 0.1, 7: 0.2}) for r in (1, 2, 8)
        }
        costs = Costs(rows, 7)
        for r in (1, 2, 3, 7, 20):
            times = costs.passes(r, int(random.integers(0, 600))).verify_s
            assert times.shape == (1 + 7 * r,)
            assert (np.diff(times) >= 0).all()


def test_noise_only_adds_time() -> None:
    """A pass costs no more than a longer one."""
    costs = Costs({1: RowCosts({1: {1: 1.0, 2: 3.0, 3: 2.0, 4: 4.0}}, {1: 1.0})}, 3)
    assert costs.passes(1).verify_s.tolist() == pytest.approx([1.0, 2.0, 2.0, 4.0])


def test_tokens_and_width_are_told_apart() -> None:
    """Passes of equal rows, of one long row and of some longer rows give back the costs of tokens and of the longest row behind them."""
    rows, gamma, width = 8, 7, 0.5

    def tokens_s(drafted: int) -> float:
        return 10.0 + 0.1 * drafted + 0.05 * max(drafted - 16, 0)  # steeper from 16 tokens on

    measured = RowCosts(
        {128: {1 + n: tokens_s(rows * n) + width * n for n in (0, 1, 2, 4, 7)}},
        {1: 1.0},
        {128: {n: tokens_s(n) + width * n for n in (4, 7)}},
        {n: tokens_s(n) + width for n in (2, 4, 6)},
    )
    passes = Costs({rows: measured}, gamma).passes(rows)
    assert passes.wide_s.tolist() == pytest.approx([width * n for n in range(gamma + 1)])
    for drafted in (0, 2, 3, 4, 6, 8, 16, 32, 56):
        assert passes.verify_s[drafted] == pytest.approx(tokens_s(drafted))


def test_width_lies_on_the_line() -> None:
    """It is interpolated between measured numbers of rows and contexts, and is never negative."""
    flat = {1: 1.0, 2: 1.0}
    wide = RowCosts({64: flat, 192: {1: 1.0}}, {1: 1.0}, {64: {1: 1.4}, 192: {1: 1.8}})
    none = RowCosts({64: flat, 192: {1: 1.0}}, {1: 1.0}, {64: {1: 0.9}})
    costs = Costs({2: none, 4: wide}, 1)
    assert costs.passes(2, 64).wide_s.tolist() == [0.0, 0.0]
    assert costs.passes(4, 64).wide_s[1] == pytest.approx(costs.passes(3, 64).wide_s[1] * 2)
    assert 0.4 < costs.passes(4, 64).wide_s[1] < costs.passes(4, 192).wide_s[1]


def test_the_convex_curve_is_the_greatest() -> None:
    """From one drafted token on it is convex, nowhere above the costs, and some chord forbids a greater one; at none the line goes on."""
    random = np.random.default_rng(1)
    for _ in range(50):
        curve = np.cumsum(random.random(12) * (random.random(12) < 0.5))
        convex = PassCosts(curve, np.zeros(4)).convex_s
        assert (np.diff(convex, 2) >= -1e-12).all()
        for j in range(1, 12):
            chords = [
                curve[a] + (curve[b] - curve[a]) * ((j - a) / (b - a) if b > a else 0.0) for a in range(1, j + 1) for b in range(j, 12)
            ]
            assert convex[j] == pytest.approx(min(chords))
        assert np.diff(convex)[0] == pytest.approx(np.diff(convex)[1])


def test_scaled_passes() -> None:
    """A factor on tokens leaves the plain pass as it is."""
    passes = PassCosts(np.array([2.0, 3.0, 3.0, 5.0]), np.array([0.0, 0.5]))
    twice = passes.scaled(2.0)
    assert twice.verify_s.tolist() == [2.0, 4.0, 4.0, 8.0]
    assert twice.wide_s.tolist() == [0.0, 1.0]
    assert twice.convex_s.tolist() == pytest.approx(PassCosts(twice.verify_s, twice.wide_s).convex_s.tolist())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_prior_grows_with_tokens_and_the_drafters_share(device: str) -> None:
    """In units of a pass of one token; flat for a few tokens on an accelerator, where a CPU pays for each; any block size and batch."""
    costs = prior_costs(4, 0.2, device)
    assert costs.passes(1).verify_s[0] == pytest.approx(1.0, abs=1e-4)
    assert costs.passes(1).verify_s[4] == pytest.approx(1.1 if device == "cpu" else 1.0, abs=1e-3)
    assert costs.passes(100).verify_s[400] > 2.0
    assert costs.draft_s(1, 4) == pytest.approx(0.2 * costs.passes(1).verify_s[3])
    assert (np.diff(costs.passes(3).verify_s) > 0).all()


def test_a_table_survives_json() -> None:
    """What was written is read back equal."""
    assert RowCosts.from_json(json.loads(json.dumps(table(2).to_json()))) == table(2)


@pytest.mark.parametrize(
    "bad",
    [{}, [], {"verify_s": {}, "draft_s": {"1": 1.0}, "long_s": {}, "few_s": {}},
     {"verify_s": {"1": {"1": -1.0}}, "draft_s": {"1": 1.0}, "long_s": {}, "few_s": {}}],
)  # fmt: skip
def test_a_broken_table_is_refused(bad: object) -> None:
    """Missing parts and impossible times are a ValueError."""
    with pytest.raises(ValueError, match=r"cost table"):
        RowCosts.from_json(bad)
