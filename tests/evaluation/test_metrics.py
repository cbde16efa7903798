"""Acceptance, throughput and prompt rows against figures worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch

from hf_dspark.decoding.statistics import DecodingStats, RowStats
from hf_dspark.errors import DataError
from hf_dspark.evaluation.metrics import AcceptanceCounts, Throughput, common_prefix, machine_record, round_times
from hf_dspark.evaluation.prompts import read_prompts
from hf_dspark.evaluation.speed import Sampling, new_tokens

# Five rounds of one row, block of 3. Round by round (verified, accepted): (3, 3) (3, 1) (2, 2) (0, 0) (1, 0).
# Token 1 was judged in rounds 1, 2, 3, 5 and accepted in 1, 2, 3. Token 2 was judged in 1, 2, 3 and accepted in 1, 3. Token 3 was judged in
# round 1 only (round 3 had cut it off) and accepted.
ROUNDS = ((3, 3), (3, 1), (2, 2), (0, 0), (1, 0))
BY_HAND = AcceptanceCounts(rounds=5, drafted=15, verified=9, accepted=(3, 2, 1), reached=(4, 3, 1))


def test_ratios_divide_by_the_rounds_that_judged():
    """tau counts a bonus token a round; a token that the budget cut off is in no denominator. Where nothing was seen a ratio is None."""
    nothing = AcceptanceCounts(rounds=0, drafted=0, verified=0, accepted=(0, 0), reached=(0, 0))
    assert (nothing.tau, nothing.acceptance_rate, nothing.conditional_acceptance) == (None, None, [None, None])
    assert (round_times([])["overhead_share"], Throughput().tokens_per_s, Throughput().over(Throughput(1, 1.0))) == (None, None, None)
    assert BY_HAND.tau == (6 + 5) / 5
    assert BY_HAND.conditional_acceptance == [3 / 4, 2 / 3, 1 / 1]
    assert BY_HAND.acceptance_rate == 6 / 9


def test_loop_statistics_give_the_counts_worked_out_by_hand():
    """The loop's record, fed round by round, leads to the same counts; sums keep numerators and denominators, of unequal blocks too."""
    row, shorter = RowStats(block_size=3), RowStats(block_size=1)
    for verified, accepted in ROUNDS:
        row.count_round(drafted=3, verified=verified, accepted=accepted, kept=accepted + 1)
    for accepted in (1, 0):
        shorter.count_round(drafted=1, verified=1, accepted=accepted, kept=accepted + 1)
    assert AcceptanceCounts.of([row]) == BY_HAND
    assert AcceptanceCounts.of([row, shorter]) == AcceptanceCounts(7, 17, 11, accepted=(4, 2, 1), reached=(6, 3, 1))


def test_throughput_and_time_add_up():
    """Speed-ups compare tokens a second; the overhead's share leaves the prefill out."""
    plain = Throughput(tokens=100, seconds=4.0)
    assert Throughput(200, 4.0).over(plain) == Throughput(100, 2.0).over(plain) == 2
    assert (plain + Throughput(20, 2.0)).tokens_per_s == 20
    half = DecodingStats(block_size=3, t_prefill_s=5.0, t_draft_s=0.5, t_verify_s=1.0, t_total_s=7.0)
    assert round_times([half, half]) == {"prefill_s": 10.0, "draft_s": 1.0, "verify_s": 2.0, "rest_s": 1.0, "overhead_share": 0.25}


def test_common_prefix_counts_shared_tokens():
    """It stops at the first difference, or where the shorter one ends."""
    assert common_prefix([1, 2, 3], [1, 2, 4]) == common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0


def test_new_tokens_end_at_the_first_end_token():
    """The end token belongs to the answer; padding behind it does not, even where it has the same id."""
    sequences = torch.tensor([[9, 9, 5, 2, 2], [9, 9, 5, 6, 7], [9, 9, 2, 0, 0]])
    assert new_tokens(sequences, 2, [2]) == [[5, 2], [5, 6, 7], [2]]
    assert new_tokens(sequences[:, :2], 2, [2]) == [[], [], []]


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
    assert (record["device"], record["torch_threads"]) == ("cpu", torch.get_num_threads())
    assert {"python", "torch", "transformers", "hf_dspark"} <= record["versions"].keys()


def test_every_row_shape_gives_a_conversation(tmp_path):
    """turns (the first), prompt and messages are read; empty lines are skipped; U+2028 inside a text does not end a row."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"turns": ["first\u2028turn", "second"]},
        {"prompt": "p", "extra": 1},
        {"messages": [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]},
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_prompts(path) == [
        [{"role": "user", "content": "first\u2028turn"}],
        [{"role": "user", "content": "p"}],
        [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")],
    ]
    assert len(read_prompts(path, limit=2)) == 2


def test_rows_that_cannot_be_answered_are_refused(tmp_path):
    """Raw text by file and line, though not behind the limit; and a file that is not UTF-8. The reader of training data tests the rest."""
    path, binary = tmp_path / "rows.jsonl", tmp_path / "binary.jsonl"
    path.write_text('{"prompt": "good"}\n{"text": "raw"}\n', encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    assert len(read_prompts(path, limit=1)) == 1
    for file, message in ((path, r"rows\.jsonl, line 2: raw text"), (binary, r"binary\.jsonl.*(?i:utf-8)")):
        with pytest.raises(DataError, match=message):
            read_prompts(file)
