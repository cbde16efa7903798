"""Tau of real decoding during training."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_dspark
from hf_dspark.evaluation.decoded import DecodedTau, spread_prompts
from hf_dspark.training.rows import ResponseRow
from tests.training.tiny_runs import tiny_drafter, tiny_rows, tiny_target


def test_prompts_are_spread_over_sources_and_taken_once():
    """Three sources take turns; a prompt that was answered twice is one prompt."""
    rows = [ResponseRow(s, p, (5, 6), 0.0, True) for s, p in [("a", (1,)), ("a", (1,)), ("a", (2,)), ("a", (3,)), ("b", (4,)), ("c", (9,))]]
    assert spread_prompts(rows, 4) == [("a", [1]), ("b", [4]), ("c", [9]), ("a", [2])]
    assert len(spread_prompts(rows, 99)) == 5


def test_decoded_tau_is_that_of_generate():
    """Tau by source and temperature comes from the statistics of generate over the same prompts, and the drafter is left as it was."""
    target = tiny_target()
    target.generation_config.pad_token_id = 2
    drafter = tiny_drafter(target)
    before = copy.deepcopy(drafter.state_dict())
    prompts = spread_prompts(tiny_rows(8), 4)
    found = DecodedTau(target, prompts, max_new_tokens=10, batch_size=2)(drafter)
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    stats = [hf_dspark.generate(target, drafter, input_ids=torch.tensor([ids]), **options).stats.rows[0] for _, ids in prompts]
    accepted, rounds = (sum(getattr(row, name) for row in stats) for name in ("accepted", "rounds"))
    assert found["T=0"]["tau"] == pytest.approx((accepted + rounds) / rounds)
    assert set(found["T=0"]["by_source"]) == {"chat", "code"}
    assert found["tau"] == pytest.approx((found["T=0"]["tau"] + found["T=1"]["tau"]) / 2)
    assert all(torch.equal(value, before[name]) for name, value in drafter.state_dict().items())
