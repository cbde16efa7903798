"""Counts worked out by hand, and the stopwatch."""

from __future__ import annotations

import math
import time

import pytest
import torch

from hf_dspark.decoding.statistics import DecodingStats, RowStats, Stopwatch


def test_a_rows_counts() -> None:
    """Three rounds of a block of 4: 4 verified and 2 stand, 3 verified and all stand, 1 verified and none stands."""
    row = RowStats(4)
    for verified, accepted in ((4, 2), (3, 3), (1, 0)):
        row.count_round(4, verified, accepted, accepted + 1)
    assert (row.rounds, row.drafted, row.verified, row.accepted) == (3, 12, 8, 5)
    assert row.verified_at == [3, 2, 2, 1]
    assert row.reached_at == [3, 2, 2, 0]
    assert row.accepted_at == [2, 2, 1, 0]
    assert row.tau == pytest.approx(8 / 3)  # 5 drafted tokens and 3 of the target's own


def test_what_lies_behind_the_end_of_a_row_was_not_reached() -> None:
    """A row that ends with its second drafted token, of 4 that agree, reached and accepted two."""
    row = RowStats(4)
    row.count_round(4, 4, 4, 2)
    assert (row.verified, row.accepted) == (4, 2)
    assert (row.verified_at, row.reached_at, row.accepted_at) == ([1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0])


def test_a_round_that_verifies_nothing_counts_as_one_token() -> None:
    """With l_r = 0 the target's own token is all there is."""
    row = RowStats(3)
    row.count_round(3, 0, 0, 1)
    assert (row.rounds, row.verified, row.accepted, row.tau) == (1, 0, 0, 1.0)
    assert row.reached_at == [0, 0, 0]


def test_before_the_first_round_tau_is_nan() -> None:
    """No rounds, no average; also for a call without any."""
    assert math.isnan(RowStats(3).tau)
    assert math.isnan(DecodingStats(3, {0: RowStats(3)}).tau)


def test_tau_over_rows_weighs_rounds_not_rows() -> None:
    """A row with more rounds counts more: (3 + 4) tokens in 1 + 3 rounds."""
    short, long = RowStats(2), RowStats(2)
    short.count_round(2, 2, 2, 3)
    for accepted in (0, 1, 0):
        long.count_round(2, 2, accepted, accepted + 1)
    stats = DecodingStats(2, {0: short, 1: long})
    assert short.tau == 3.0
    assert long.tau == pytest.approx(4 / 3)
    assert stats.tau == pytest.approx(7 / 4)


def test_rest_and_overhead() -> None:
    """10 s in all, 2 in prompts, 3 drafting, 4 verifying: 1 s is left, an eighth of the rounds' 8 s."""
    stats = DecodingStats(3, t_prefill_s=2.0, t_draft_s=3.0, t_verify_s=4.0, t_total_s=10.0)
    assert stats.t_rest_s == pytest.approx(1.0)
    assert stats.overhead == pytest.approx(1 / 8)
    assert DecodingStats(3).overhead == 0.0
    assert DecodingStats(3, t_verify_s=2.0, t_total_s=1.0).t_rest_s == 0.0  # events of a device may outrun the host's clock


def test_a_round_of_all_rows_counts_in_each() -> None:
    """Rows are counted by request number, whatever their place in the batch."""
    stats = DecodingStats(2)
    stats.count_round([7, 3], [2, 2], [2, 1], [2, 0], [3, 1])
    stats.count_round([3], [2], [2], [1], [2])
    assert [(row.rounds, row.verified, row.accepted) for row in stats.rows] == [(2, 3, 1), (1, 2, 2)]
    assert (stats.rounds, stats.of(7).tau, stats.of(3).tau) == (2, 3.0, 1.5)


def test_the_stopwatch_adds_up_by_name() -> None:
    """Two stretches of one name add up, names are apart, and the total covers all."""
    watch = Stopwatch(torch.device("cpu"))
    for name, seconds in (("draft", 0.02), ("verify", 0.03), ("draft", 0.02)):
        with watch.measure(name):
            time.sleep(seconds)
    read = watch.read()
    assert set(read) == {"draft", "verify", "total"}
    assert read["draft"] >= 0.04
    assert read["verify"] >= 0.03
    assert read["total"] >= read["draft"] + read["verify"]
    assert watch.read()["draft"] == read["draft"]
