"""Fits of n-gram copying: weights and tables that made-up data were drawn from, and a likelihood tried on a grid."""

from __future__ import annotations

import numpy as np
import pytest

from hf_dspark.calibration.ngram_copy_fit import FEWEST_COPIES, fit_copy_confidence, fit_copy_weights

RANDOM = np.random.default_rng


def test_weights_are_the_most_likely_ones() -> None:
    """Each equals, within the grid's step, the weight whose likelihood a grid of 999 says is greatest."""
    random = RANDOM(0)
    lengths = random.integers(0, 7, 4000)
    hits = random.random(4000) < np.array([0.0, 0.1, 0.3, 0.5, 0.6, 0.8, 0.9])[lengths]
    p_d = random.beta(0.4, 0.6, 4000)
    weights = fit_copy_weights(lengths, hits, p_d, 4)
    grid = np.linspace(0.001, 0.999, 999)
    for m in range(1, 5):
        of_m = np.minimum(lengths, 4) == m
        likelihood = np.log(grid[:, None] * hits[of_m] + (1 - grid[:, None]) * p_d[of_m]).sum(axis=1)
        assert weights[m - 1] == pytest.approx(min(grid[likelihood.argmax()], 0.98), abs=0.002)


def test_lengths_hardly_seen_share_a_weight() -> None:
    """Neighbouring lengths are pooled until enough copies were seen, the longest with those before them; and nothing is copied where hardly
    any match was ever seen.
    """
    lengths = np.repeat([1, 2, 3, 4, 5], [FEWEST_COPIES, FEWEST_COPIES // 2, FEWEST_COPIES // 2, FEWEST_COPIES, 10])
    hits = np.arange(len(lengths)) % 5 < lengths
    weights = fit_copy_weights(lengths, hits, np.full(len(lengths), 0.1), 6)
    assert weights[0] < weights[1] == weights[2] < weights[3] == weights[4] == weights[5]
    assert fit_copy_weights(np.zeros(0), np.zeros(0), np.zeros(0), 2) == [0.0, 0.0]
    assert fit_copy_weights(np.ones(50), np.ones(50), np.ones(50), 2) == [0.0, 0.0]


def test_a_copy_that_is_always_right_does_not_exclude_p_d() -> None:
    """Weights stay below 1, where a token that p_d proposes could never be drawn."""
    weights = fit_copy_weights(np.ones(500), np.ones(500), np.full(500, 0.01), 1)
    assert weights == [0.98]


def test_the_table_that_made_the_data_is_found() -> None:
    """On 60,000 tokens within 0.15; for a relation that was never seen it is the confidence head's own logit."""
    random = RANDOM(1)
    count = 60_000
    relation = random.integers(0, 3, count)
    features = np.stack([relation, np.ones(count), *random.normal(0, 1, (7, count))], axis=1)
    table = np.array(
        [
            [0.2, 0.7, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0],
            [1.0, 0.4, 0.8, -0.5, 0.6, 0.3, -0.2, 0.1],
            [-1.0, 0.2, 1.0, 0.0, -0.4, 0.5, 0.9, 0.2],
        ]
    )
    p = 1 / (1 + np.exp(-(table[relation] * features[:, 1:]).sum(axis=1)))
    found = fit_copy_confidence(features, random.random(count) < p)
    np.testing.assert_allclose(found[:3], table, atol=0.15)
    assert found[3] == [0.0, 1.0, *[0.0] * 6]


def test_separable_data_give_finite_weights() -> None:
    """Where survival follows from one feature the ridge keeps the numbers finite, and they still tell the two apart."""
    features = np.zeros((400, 5))
    features[:, :2] = 1.0
    features[:, 2] = np.repeat([-1.0, 1.0], 200)
    row = fit_copy_confidence(features, features[:, 2] > 0)[1]
    assert np.isfinite(row).all()
    assert row[1] > 2.0
