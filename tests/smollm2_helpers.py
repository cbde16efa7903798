"""Prompts for the embedded target, and which drafter is tested: the embedded one, or the one that a variable names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from hf_dspark.evaluation.prompts import Conversation, user_turn
from hf_dspark.hub.bundled import DRAFTER_NAME

# A folder or Hub id here tests another drafter, for instance one that was just trained.
DRAFTER = os.environ.get("HF_DSPARK_TEST_DRAFTER", DRAFTER_NAME)

PROMPTS: list[Conversation] = [
    user_turn(text)
    for text in (
        "A box holds 12 pencils. A teacher buys 7 boxes and gives 3 to each of her 20 students. How many are left?",
        "Say yes.",
        "Write a Python function that returns the n-th Fibonacci number.",
        "What is the capital of France?",
        "Give me three tips for learning a new language, each in one sentence, and say which one comes first.",
        "Explain in simple words why the sky is blue.",
        "Count from 1 to 12.",
        "Translate to Spanish: good morning",
    )
]
NEW_TOKENS = 32
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
}


def plain(target: Any, inputs: Mapping[str, torch.Tensor], **options: Any) -> Any:
    """transformers' own greedy generation: the oracle."""
    return target.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options})
