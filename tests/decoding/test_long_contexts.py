"""Contexts of 32,768 tokens: exact, and in memory that is bounded by what the caches hold."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_dspark
from tests.live_memory import LiveMemory
from tests.tiny import tiny_drafter

LENGTH = 32_768


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_long_contexts_are_exact_and_take_bounded_memory(rows: int) -> None:
    """The text is plain's; all that is live at once, caches too, is ."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH + 64
    )
    torch.manual_seed(0)
    target = LlamaForCausalLM(config).eval()
    drafter = tiny_drafter(target)
    ids = torch.randint(4, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 63}
    with LiveMemory() as live:
        out = hf_dspark.generate(target, drafter, **inputs, **how, budget="full")
    print(rows, live.peak / 2**20)
    assert torch.equal(out, target.generate(**inputs, **how))
