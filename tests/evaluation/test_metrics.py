"""Acceptance, throughput and prompt rows against figures worked out by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from hf_dspark.decoding.statistics import DecodingStats, RowStats
from hf_dspark.errors import DataError
from hf_dspark.evaluation.metrics import (
    AcceptanceCounts,
    RoundTime,
    Throughput,
    common_prefix,
    machine_record,
    speed_ratio,
)
from hf_dspark.evaluation.prompts import read_prompts
from hf_dspark.evaluation.speed import Sampling, acceptance_of, new_tokens

# Five rounds of one row, block of 3. Round by round (verified, accepted): (3, 3) (3, 1) (2, 2) (0, 0) (1, 0).
# Token 1 was judged in rounds 1, 2, 3, 5 and stood in 1, 2, 3. Token 2 was judged in 1, 2, 3 and stood in 1, 3. Token 3
# was judged in round 1 only (round 3 had cut it off) and stood.
ROUNDS = ((3, 3), (3, 1), (2, 2), (0, 0), (1, 0))
BY_HAND = AcceptanceCounts(rounds=5, drafted=15, verified=9, accepted=(3, 2, 1), reached=(4, 3, 1))


def test_tau_counts_the_bonus_token():
    """tau is accepted tokens plus one bonus token a round, over rounds."""
    assert BY_HAND.tau == (6 + 5) / 5


def test_conditional_acceptance_divides_by_the_rounds_that_judged_the_position():
    """A token that the budget cut off is in no denominator."""
    assert BY_HAND.conditional_acceptance == [3 / 4, 2 / 3, 1 / 1]


def test_loop_statistics_give_the_counts_worked_out_by_hand():
    """The loop's own record, fed round by round, leads to the same counts."""
    row = RowStats.for_block(3)
    for verified, accepted in ROUNDS:
        row.count_round(drafted=3, verified=verified, accepted=accepted, kept=accepted + 1)
    assert acceptance_of(DecodingStats([row], block_size=3)) == BY_HAND


def test_counts_of_rows_add_up():
    """Sums keep numerators and denominators, also where blocks differ in length."""
    shorter = AcceptanceCounts(rounds=2, drafted=2, verified=2, accepted=(1,), reached=(2,))
    total = AcceptanceCounts.sum([BY_HAND, shorter])
    assert total == AcceptanceCounts(rounds=7, drafted=17, verified=11, accepted=(4, 2, 1), reached=(6, 3, 1))
    assert total.tau == 14 / 7


def test_ratios_of_nothing_are_none():
    """Where nothing was seen the ratio is None, and JSON can carry it."""
    nothing = AcceptanceCounts(rounds=0, drafted=0, verified=0, accepted=(0, 0), reached=(0, 0))
    assert nothing.tau is None
    assert nothing.acceptance_rate is None
    assert nothing.conditional_acceptance == [None, None]
    assert json.loads(json.dumps(nothing.to_json()))["conditional_acceptance"] == [None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accepted": (3, 2)}, "one count for each block position"),
        ({"accepted": (3, 4, 1)}, "position 2"),
        ({"reached": (4, 4, 1)}, "position 2"),
        ({"reached": (6, 3, 1)}, "position 1"),
        ({"verified": 5}, "accepted <= verified <= drafted"),
        ({"drafted": 8}, "accepted <= verified <= drafted"),
    ],
)
def test_contradicting_counts_are_refused(change, message):
    """Counts that no series of rounds can give raise an error that names the position."""
    fields = {"rounds": 5, "drafted": 15, "verified": 9, "accepted": (3, 2, 1), "reached": (4, 3, 1)}
    with pytest.raises(ValueError, match=message):
        AcceptanceCounts(**(fields | change))


def test_speed_up_compares_tokens_a_second():
    """Twice the tokens in the same time, and the same tokens in half of it, are both a speed-up of 2."""
    plain = Throughput(tokens=100, seconds=4.0)
    assert speed_ratio(Throughput(200, 4.0), plain) == 2
    assert speed_ratio(Throughput(100, 2.0), plain) == 2
    assert speed_ratio(Throughput(), plain) is None
    assert (plain + Throughput(20, 2.0)).tokens_per_s == 20


def test_overhead_share_leaves_the_prefill_out():
    """The share is the rest over draft + verify + rest."""
    time = RoundTime(prefill_s=10.0, draft_s=1.0, verify_s=2.0, rest_s=1.0)
    assert time.overhead_share == 0.25
    assert RoundTime().overhead_share is None


def test_common_prefix_counts_shared_tokens():
    """It stops at the first difference, or where the shorter one ends."""
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0


def test_new_tokens_end_at_the_first_end_token():
    """The end token belongs to the answer; padding behind it does not, even where it has the same id."""
    sequences = torch.tensor([[9, 9, 5, 2, 2], [9, 9, 5, 6, 7], [9, 9, 2, 0, 0]])
    assert new_tokens(sequences, 2, frozenset([2])) == [[5, 2], [5, 6, 7], [2]]
    assert new_tokens(sequences[:, :2], 2, frozenset([2])) == [[], [], []]


def test_greedy_and_sampling_options():
    """Temperature 0 is greedy; sampling switches off the top-k of a model's own generation config."""
    assert Sampling().options() == {"do_sample": False}
    assert Sampling(0.5, 0.9).options() == {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}


@pytest.mark.parametrize("values", [(-1.0, 1.0), (float("inf"), 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.5), (0.0, 0.5)])
def test_impossible_sampling_is_refused(values):
    """Values out of range, and a nucleus under greedy decoding, raise."""
    with pytest.raises(ValueError, match=r"temperature|top_p"):
        Sampling(*values)


def test_machine_record_is_json():
    """The record names device, threads and versions, and can be written."""
    record = json.loads(json.dumps(machine_record("cpu")))
    assert record["device"] == "cpu"
    assert record["torch_threads"] == torch.get_num_threads()
    assert {"python", "torch", "transformers", "hf_dspark"} <= record["versions"].keys()


def test_every_row_shape_gives_a_conversation(tmp_path):
    """turns (the first), prompt and messages are read; empty lines are skipped; U+2028 inside a text does not end a
    row."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"turns": ["first\u2028turn", "second"]},
        {"prompt": "p", "extra": 1},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_prompts(path) == [
        [{"role": "user", "content": "first\u2028turn"}],
        [{"role": "user", "content": "p"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    ]
    assert len(read_prompts(path, limit=2)) == 2


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "[1, 2]",
        '{"turns": []}',
        '{"turns": [3]}',
        '{"prompt": "  "}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": ["hello"]}',
        '{"question": "?"}',
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line):
    """The error says which file and which line, whatever is wrong with the row."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        read_prompts(path)


def test_files_without_rows_are_refused(tmp_path):
    """A missing file, an empty one and one that is not UTF-8 each raise, with the file's name."""
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in ((tmp_path / "none.jsonl", "cannot read"), (empty, "holds no rows"), (binary, "not UTF-8")):
        with pytest.raises(DataError, match=message) as caught:
            read_prompts(path)
        assert str(path) in str(caught.value)


def test_rows_are_read_only_as_far_as_the_limit(tmp_path):
    """A bad row behind the limit is never looked at, and a limit below 1 is refused."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "good"}\n{bad\n', encoding="utf-8")
    assert len(read_prompts(path, limit=1)) == 1
    with pytest.raises(DataError, match="limit"):
        read_prompts(path, limit=0)


def test_statistics_with_a_missing_count_are_an_error():
    """A record that lacks a count is not taken for zero."""
    with pytest.raises(AttributeError):
        acceptance_of(SimpleNamespace(rows=[SimpleNamespace(rounds=1)]))
