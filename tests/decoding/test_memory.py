"""How much memory a round of many rows over a large vocabulary takes beside the target's logits, and that bounding it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_dspark
from hf_dspark.decoding import loop, sampling, verify
from hf_dspark.decoding.loop import DecodingLoop
from tests.helpers import make_world, talking_target
from tests.live_memory import LiveMemory
from tests.tiny import tiny_drafter

ROWS, GAMMA, VOCAB = 64, 7, 151_936


@pytest.mark.parametrize("budget", ["full", "threshold:0.5", "load-aware-lag2"])
@pytest.mark.parametrize("sample", [False, True])
def test_verifying_few_rows_at_a_time_changes_nothing(sample: bool, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows with processors that read them, copies and a reduced vocabulary: the same draws, row for row."""
    w = make_world(talking_target("qwen3"), wrong_every=3, copy_weights=[0.4, 0.7], draft_token_ids=torch.arange(0, 97, 2))
    how = {"do_sample": sample, "max_new_tokens": 24, "repetition_penalty": 1.2, "top_k": 40, "eos_token_id": [5, 9], "pad_token_id": 1}
    whole = hf_dspark.generate(w.target, w.drafter, **w.inputs(7), budget=budget, seed=3, **how)
    monkeypatch.setattr(loop, "ELEMENTS_AT_ONCE", 97 * 8)
    monkeypatch.setattr(sampling, "ELEMENTS_AT_ONCE", 97 * 2)
    monkeypatch.setattr(verify, "ELEMENTS_AT_ONCE", 97 * 2)
    assert torch.equal(hf_dspark.generate(w.target, w.drafter, **w.inputs(7), budget=budget, seed=3, **how), whole)


class _Enough(Exception):
    """The first round is over."""


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {"temperature": 0.7, "repetition_penalty": 1.1}), (torch.bfloat16, {"top_p": 0.9})],
    ids=["float32", "bfloat16"],
)
def test_a_sampled_round_takes_little_more_than_the_logits(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft, and verification beyond the target's logits, take at most 1.5 times one tensor (T, V) in float32."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    target = LlamaForCausalLM(config).to(dtype).eval()
    drafter = tiny_drafter(target, block_size=GAMMA, copy_weights=[0.3, 0.5]).to(dtype)
    peaks = dict[str, float]()

    def counted(name: str, beside: int) -> None:
        method = getattr(DecodingLoop, name)

        def call(self: DecodingLoop, *args: Any) -> Any:
            with LiveMemory() as live:
                out = method(self, *args)
            peaks[name] = (live.peak - beside) / (ROWS * (GAMMA + 1) * VOCAB * 4)
            if name == "round":
                raise _Enough
            return out

        monkeypatch.setattr(DecodingLoop, name, call)

    counted("draft", 0)
    counted("round", ROWS * (GAMMA + 1) * VOCAB * dtype.itemsize)
    ids = torch.randint(4, VOCAB, (ROWS, 5), generator=torch.Generator().manual_seed(0))
    how = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": True, "budget": "full", "seed": 0, **options}
    with pytest.raises(_Enough):
        hf_dspark.generate(target, drafter, input_ids=ids, max_new_tokens=GAMMA + 2, min_new_tokens=GAMMA + 2, **how)
    assert 0.4 < peaks["draft"] <= 1.5, peaks
    assert 0.4 < peaks["round"] <= 1.5, peaks
