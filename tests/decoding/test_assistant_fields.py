"""transformers' own fields of assisted generation mean with a drafter what they mean with a small model, or are named in a warning."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hf_dspark
from tests.helpers import NEVER, World, plain_tokens, speculate, world


@pytest.fixture
def w() -> World:
    return world()


def stats(w: World, batch: int = 3, **options: Any) -> Any:
    """The text must be plain's whatever is drafted; what was drafted is returned."""
    output = speculate(w.target, w.drafter, w.inputs(batch), return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, plain_tokens("llama", batch))
    return output.stats


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_num_assistant_tokens_is_a_static_length(w: World, batch: int, length: int) -> None:
    """So many tokens are drafted and verified a round, not the drafter's block; at the end of a text fewer."""
    for row in stats(w, batch, num_assistant_tokens=length).rows:
        assert (row.rounds - 1) * length < row.drafted <= row.rounds * length
        assert row.verified <= row.drafted


def test_the_assistants_own_generation_config_counts_too(w: World) -> None:
    """Where users of assistant models set it."""
    w.drafter.generation_config = GenerationConfig(num_assistant_tokens=1)
    try:
        rows = stats(w).rows
    finally:
        del w.drafter.generation_config
    assert all(row.drafted <= row.rounds for row in rows)


def test_a_confidence_threshold_is_the_threshold_budget(w: World) -> None:
    """It verifies as many tokens as the budget of that name, and fewer than without."""
    asked = stats(w, assistant_confidence_threshold=0.9)
    named = hf_dspark.generate(
        w.target, w.drafter, **w.inputs(3), budget="threshold:0.9", max_new_tokens=24, do_sample=False, eos_token_id=NEVER,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [row.verified for row in asked.rows] == [row.verified for row in named.stats.rows]
    assert sum(row.verified for row in asked.rows) < sum(row.verified for row in stats(w).rows)


def test_a_schedule_is_not_followed_and_said_so(w: World, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody has to find out from the counts."""
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        stats(w, num_assistant_tokens_schedule="heuristic_transient")
    assert "num_assistant_tokens_schedule='heuristic_transient' is not followed" in caplog.text


def test_a_budget_of_the_call_wins_and_says_so(w: World, caplog: pytest.LogCaptureFixture) -> None:
    """Two lengths cannot both be right."""
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        output = hf_dspark.generate(
            w.target, w.drafter, **w.inputs(1), budget="static:2", num_assistant_tokens=1, max_new_tokens=24, do_sample=False,
            eos_token_id=NEVER, return_dict_in_generate=True,
        )  # fmt: skip
    assert "num_assistant_tokens of the generation config or assistant is not followed" in caplog.text
    assert output.stats.rows[0].drafted > output.stats.rows[0].rounds


def test_a_length_below_one_is_refused(w: World) -> None:
    """Nothing to draft means no assistant."""
    with pytest.raises(ValueError, match="num_assistant_tokens must be at least 1; got 0"):
        speculate(w.target, w.drafter, w.inputs(1), num_assistant_tokens=0)
