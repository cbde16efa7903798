"""What would go wrong silently is refused or raised: windows that only a mask knows, unsound distributions, misplaced drafters."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import hf_dspark
from hf_dspark.targets.self_test import check_target
from tests.tiny import PAD, VOCAB, tiny_drafter, tiny_target

PROMPT = torch.arange(5, 29)[None]


@pytest.fixture(scope="module")
def masked_window() -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE whose sliding window stands in its mask alone; its attention function is not told."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2MoeConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=0,
            pad_token_id=PAD,
            initializer_range=0.2,
        )
        return Qwen2MoeForCausalLM(config).eval()


def test_a_window_that_only_the_mask_knows_is_refused_in_a_batch(masked_window) -> None:
    """Ragged passes do not see masks, so such a target is refused by name, before anything is generated."""
    drafter = tiny_drafter(masked_window)
    with pytest.raises(hf_dspark.UnsupportedTargetError, match="by its mask"):
        masked_window.generate(PROMPT.repeat(2, 1), assistant_model=drafter, max_new_tokens=4)


def test_a_window_that_only_the_mask_knows_is_exact_alone(masked_window) -> None:
    """One row goes through transformers' own loop, with the text of plain generate past the window's length."""
    options = {"max_new_tokens": 16, "do_sample": False}
    output = masked_window.generate(PROMPT, assistant_model=tiny_drafter(masked_window), **options)
    assert torch.equal(output, masked_window.generate(PROMPT, **options))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_distribution_that_holds_nan_is_an_error_as_in_plain_generate(rows: int) -> None:
    """One NaN in the target's head makes sampling raise, instead of drawing some token."""
    target = tiny_target("llama")
    drafter = tiny_drafter(target)
    check_target(target)  # its self-test would refuse the poisoned model before anything is drawn
    with torch.no_grad():
        target.lm_head.weight[7, 0] = float("nan")
    prompts = PROMPT.repeat(rows, 1)
    with pytest.raises(RuntimeError):
        target.generate(prompts, do_sample=True, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        target.generate(prompts, do_sample=True, max_new_tokens=4, assistant_model=drafter)


def test_a_target_in_training_mode_is_refused_until_eval() -> None:
    """Dropout makes passes differ; the refusal says so, and is forgotten after eval()."""
    target = tiny_target("gpt2")
    target.config.attn_pdrop = target.config.resid_pdrop = 0.5
    for module in target.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    target.train()
    with pytest.raises(hf_dspark.UnsupportedTargetError, match=r"training mode.*target\.eval\(\)"):
        check_target(target)
    check_target(target.eval())


def test_a_drafter_on_another_device_is_refused() -> None:
    """A drafter that does not lie where the target takes its tokens is named with the fix."""
    target = tiny_target("llama")
    drafter = tiny_drafter(target).to("meta")
    with pytest.raises(hf_dspark.UnsupportedOptionError, match=r"on meta.*drafter\.to\('cpu'\)"):
        target.generate(PROMPT, assistant_model=drafter, max_new_tokens=4)


def test_a_float16_drafter_of_a_wider_target_is_refused() -> None:
    """float16 would overflow on the target's activations without a word."""
    target = tiny_target("llama")
    with pytest.raises(hf_dspark.UnsupportedOptionError, match="float16 drafter"):
        target.generate(PROMPT, assistant_model=tiny_drafter(target).to(torch.float16), max_new_tokens=4)


def test_a_padded_row_returns_no_cache_that_lacks_its_padding() -> None:
    """The cache of a left-padded single row would not match its ids, so none is returned; a filled one is refused."""
    target = tiny_target("llama")
    drafter = tiny_drafter(target)
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    output = target.generate(PROMPT, attention_mask=mask, assistant_model=drafter, max_new_tokens=4, return_dict_in_generate=True)
    assert output.past_key_values is None
    plain = target.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    ids = plain.sequences
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(hf_dspark.UnsupportedOptionError, match="padded prompt"):
        target.generate(ids, attention_mask=mask, past_key_values=plain.past_key_values, assistant_model=drafter, max_new_tokens=4)


def test_the_explicit_door_leaves_an_uninstalled_patch_uninstalled() -> None:
    """hf_dspark.generate works without the patch and does not bring it back for good."""
    target = tiny_target("llama")
    drafter = tiny_drafter(target)
    hf_dspark.uninstall()
    try:
        output = hf_dspark.generate(target, drafter, input_ids=PROMPT, max_new_tokens=4, do_sample=False)
        assert getattr(type(target)._assisted_decoding, "_hf_dspark_original", None) is None
    finally:
        hf_dspark.install()
    assert torch.equal(output, target.generate(PROMPT, max_new_tokens=4, do_sample=False))
