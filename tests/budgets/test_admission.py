"""Algorithm 1 and the searches beside it against brute force, and the property that keeps decoding exact: no look past the cut."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from hf_dspark.budgets.admission import admit_early_stop, admit_top, best_count, survivals

Case = tuple[np.ndarray, list[int], np.ndarray]


def theta(survival: np.ndarray, lengths: tuple[int, ...], round_s: np.ndarray, wide_s: float = 0.0) -> float:
    """Expected tokens of a round over its seconds, straight from the definition; the longest row costs by its length."""
    seconds = round_s[sum(lengths)] + wide_s * max(lengths)
    return (len(lengths) + sum(survival[r, :n].sum() for r, n in enumerate(lengths))) / seconds


def cases(seed: int, count: int = 500, convex: bool = False) -> Iterator[tuple[np.random.Generator, Case]]:
    """Survivals with ties and saturation, limits, and a cost curve."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        rows, gamma = int(random.integers(1, 4)), int(random.integers(1, 5))
        confidence = random.choice([0.0, 0.25, 0.5, 0.9, 1.0], (rows, gamma)) if random.random() < 0.5 else random.random((rows, gamma))
        steps = random.random(rows * gamma) * random.choice([0.05, 0.5, 2.0])
        steps = np.sort(steps) if convex else steps * (random.random(rows * gamma) < 0.4)
        round_s = random.uniform(0.5, 3.0) + np.concatenate(([0.0], np.cumsum(steps)))
        yield random, (survivals(confidence), random.integers(0, gamma + 1, rows).tolist(), round_s)


def best_theta(survival: np.ndarray, limits: list[int], round_s: np.ndarray, wide_s: float = 0.0) -> float:
    return max(theta(survival, plan, round_s, wide_s) for plan in product(*(range(n + 1) for n in limits)))


def test_the_unconstrained_search_equals_brute_force() -> None:
    """No plan gives more tokens a second than the top of the count that it finds."""
    for _, (survival, limits, round_s) in cases(0):
        lengths = admit_top(survival, limits, best_count(survival, limits, round_s))
        assert theta(survival, tuple(lengths), round_s) == pytest.approx(best_theta(survival, limits, round_s), rel=1e-12)


def test_the_unconstrained_search_counts_width() -> None:
    """No other number of top tokens gives more tokens a second where the longest row costs too."""
    for _, (survival, limits, round_s) in cases(7):
        count = best_count(survival, limits, round_s, 0.2 * np.arange(survival.shape[1] + 1))
        values = [theta(survival, tuple(admit_top(survival, limits, n)), round_s, 0.2) for n in range(sum(limits) + 1)]
        assert values[count] == pytest.approx(max(values), rel=1e-12)


def test_the_early_stop_equals_brute_force_on_convex_costs() -> None:
    """Where each further token costs at least as much as the one before, stopping early loses nothing."""
    for _, (survival, limits, round_s) in cases(1, convex=True):
        lengths = admit_early_stop(survival, limits, round_s)
        assert theta(survival, tuple(lengths), round_s) == pytest.approx(best_theta(survival, limits, round_s), rel=1e-12)


def test_the_early_stop_equals_a_straight_loop() -> None:
    """Algorithm 1 written out as the paper has it gives the same lengths, on any cost curve, ties and all."""
    for _, (survival, limits, round_s) in cases(2):
        lengths = [0] * len(limits)
        queue = [(r, j) for r in range(len(limits)) for j in range(limits[r])]
        for r, j in sorted(queue, key=lambda p: (-survival[p], p[1], p[0])):
            longer = [n + (i == r) for i, n in enumerate(lengths)]
            if not theta(survival, tuple(longer), round_s) > theta(survival, tuple(lengths), round_s) * (1 + 1e-15):
                break
            assert lengths[r] == j
            lengths = longer
        got = admit_early_stop(survival, limits, round_s)
        # Sums in another order may differ in the last bit, which decides where Theta is constant.
        if got != lengths:
            assert theta(survival, tuple(got), round_s) == pytest.approx(theta(survival, tuple(lengths), round_s), rel=1e-12)


def test_plans_are_feasible() -> None:
    """Lengths stay within limits and cap; of the tokens that would have been admitted without the cap the best remain."""
    for random, (survival, limits, round_s) in cases(3):
        most = int(random.integers(0, 6))
        free, capped = admit_early_stop(survival, limits, round_s), admit_early_stop(survival, limits, round_s, most)
        assert all(0 <= a <= b <= c for a, b, c in zip(capped, free, limits, strict=True))
        assert sum(capped) == min(most, sum(free))


def test_the_early_stop_never_looks_past_its_cut() -> None:
    """Whether token k of a row is verified does not change with the row's confidences from k + 1 on: they depend on x_k."""
    for random, (survival, limits, round_s) in cases(4, 2000):
        row, k = int(random.integers(len(limits))), int(random.integers(survival.shape[1]))
        lengths = admit_early_stop(survival, limits, round_s)
        other = survival.copy()
        other[row, k + 1 :] = other[row, k] * survivals(random.random((1, survival.shape[1])))[0, : survival.shape[1] - k - 1]
        assert (lengths[row] > k) == (admit_early_stop(other, limits, round_s)[row] > k)


def test_the_unconstrained_search_does_look_past_its_cut() -> None:
    """The control of the test above: with the paper's costs a change of c_2 decides whether the unconstrained search verifies x_1."""
    round_s = 1 / np.array([1.0, 0.5, 0.45])
    plans = [admit_top(s, [2], best_count(s, [2], round_s)) for s in (survivals(np.array([[0.8, c]])) for c in (0.9, 0.0))]
    assert plans == [[2], [0]]


def test_ties_go_to_earlier_positions() -> None:
    """With every survival equal to one, positions fill up evenly over the rows."""
    ones = np.ones((3, 2))
    assert admit_top(ones, [2, 2, 2], 4) == [2, 1, 1]
    assert admit_top(ones, [2, 0, 2], 3) == [2, 0, 1]


def test_nan_ends_its_row() -> None:
    """A confidence that is not a number admits nothing at and behind its place."""
    survival = survivals(np.array([[0.9, np.nan, 0.9]]))
    assert survival.tolist() == [[0.9, 0.0, 0.0]]
    assert admit_early_stop(survival, [3], np.array([1.0, 1.01, 1.02, 1.03])) == [1]
