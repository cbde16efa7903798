"""The same on CUDA: exactness in fp32 without TF32, explained differences in bf16, and a speed-up over plain
`generate`. Skipped where there is no CUDA device (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from examples.benchmarks.divergence import compare

import hf_dspark
from hf_dspark.evaluation.prompts import encode
from hf_dspark.evaluation.speed import Bench, evaluate
from hf_dspark.models.loading import load_drafter, load_target
from tests.helpers import make_world, plain_tokens, speculate, talking_target
from tests.smollm2_helpers import DRAFTER, PROCESSORS, PROMPTS, plain

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

Models = tuple[Any, Any, Any]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """fp32 means fp32: TF32 keeps ten bits of the mantissa."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def models(dtype: str) -> Models:
    target, tokenizer = load_target("smollm2", dtype=dtype, device="cuda")
    return target, tokenizer, load_drafter(DRAFTER, dtype=dtype, device="cuda")


@pytest.fixture(scope="module")
def exact() -> Models:
    """SmolLM2 and its drafter in fp32 on CUDA."""
    return models("fp32")


@pytest.fixture(scope="module")
def rounded() -> Models:
    """SmolLM2 and its drafter in bf16 on CUDA."""
    return models("bf16")


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_fp32_greedy_equals_plain_generate(exact, rows, processors):
    """Token for token at every batch size, with and without processors."""
    target, tokenizer, drafter = exact
    inputs = encode(tokenizer, PROMPTS[:rows]).to("cuda")
    options = {"max_new_tokens": 64, **PROCESSORS[processors]}
    expected = plain(target, inputs, **options)
    assert torch.equal(plain(target, inputs, assistant_model=drafter, **options), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "mixtral", "gpt2"])
def test_tiny_families_equal_their_texts_on_the_cpu(family):
    """fp32 texts do not depend on the device, nor on speculation."""
    w = make_world(talking_target(family))
    target, drafter = w.target.to("cuda"), w.drafter.to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in w.inputs(3).items()}
    assert torch.equal(speculate(target, drafter, inputs).cpu(), plain_tokens(family, 3))


def test_seeds_repeat_on_cuda(rounded):
    """The same seed gives the same sample, another seed another one."""
    target, tokenizer, drafter = rounded
    inputs = encode(tokenizer, PROMPTS[:3]).to("cuda")
    options = {"max_new_tokens": 32, "do_sample": True, "temperature": 1.0}
    first, again, other = (hf_dspark.generate(target, drafter, **inputs, **options, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bf16_divergences_are_explained(rounded):
    """A bf16 text parts from the plain one only where rounding moves the two logits by as much as lies between them."""
    target, tokenizer, drafter = rounded
    result = compare(Bench(target, drafter, tokenizer, max_new_tokens=48), PROMPTS)
    assert result.unexplained == []


def test_speculation_is_faster_than_plain_generate(rounded):
    """Tokens a second over eight prompts in bf16, both methods in turn, warmed up."""
    target, tokenizer, drafter = rounded
    result = evaluate(Bench(target, drafter, tokenizer, max_new_tokens=128), {"prompts": PROMPTS})
    assert result["speedup"] > 1
