"""A GGUF file as transformers loads it, with a drafter in bf16: weights packed where it has kernels for them, else dequantized.

Which of the two happens depends on the machine and on transformers' version; the text must not. A target whose weights are int8
everywhere is in `targets/test_quantized.py`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dspark.evaluation.prompts import encode
from hf_dspark.hub.bundled import _find_gguf
from hf_dspark.models.loading import load_drafter
from tests.smollm2_helpers import DRAFTER, PROMPTS, plain


@pytest.mark.slow
def test_a_gguf_target_gives_its_own_plain_text() -> None:
    """Q4_1 weights as transformers holds them, fp32 arithmetic, two ragged rows: plain generate token for token."""
    gguf = _find_gguf()
    target = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    target.generation_config.pad_token_id = target.generation_config.eos_token_id = 2  # transformers 5.17 reads others from this file
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left")
    tokenizer.pad_token_id = 2
    inputs = encode(tokenizer, PROMPTS[:2])
    drafter = load_drafter(DRAFTER, dtype="bf16")
    output = plain(target, inputs, max_new_tokens=16, assistant_model=drafter, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain(target, inputs, max_new_tokens=16))
    assert output.stats.rows[0].rounds > 0
