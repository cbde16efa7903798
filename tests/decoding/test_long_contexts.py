"""Contexts of 32,768 tokens: exact, and in memory that is bounded by what the caches hold."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_dspark
from tests.helpers import left_padded, make_world, plain, random_prompts, speculate, talking_target
from tests.live_memory import LiveMemory
from tests.tiny import tiny_drafter

LENGTH = 32_768


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_long_contexts_are_exact_and_take_bounded_memory(rows: int) -> None:
    """The text is plain's. Beside the caches, what is live at once is less than two masks of 512 tokens over the context in float32."""
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
    sizes = [(c.num_hidden_layers, c.num_key_value_heads * c.head_dim) for c in (config, drafter.config)]
    caches = 2 * sum(layers * width for layers, width in sizes) * 4 * rows * LENGTH
    assert caches < live.peak < caches + 2 * 512 * LENGTH * 4
    assert torch.equal(out, target.generate(**inputs, **how))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_layers_with_a_window_read_no_more_of_the_context_than_it_holds(family: str, rows: int) -> None:
    """Behind rows of 100 tokens and more, attention of those layers gets as many keys as the window holds, and what rows differ by."""
    w, seen = make_world(talking_target(family)), list[int]()
    inputs = left_padded(random_prompts((110, 104, 100)[:rows]))
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape[-2] > 1 and key.shape[-2] != query.shape[-2]:  # no prompt
            seen.append(key.shape[-2])
        return original(query, key, *args, **kwargs)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watched):
        out = speculate(w.target, w.drafter, inputs)
    assert min(seen) < 100 / 2
    assert torch.equal(out, plain(w.target, inputs))
