"""Targets whose cache, attention or arithmetic is not what most have: the text is plain's, or the refusal says why."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    AutoModelForImageTextToText,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma3Config,
    Gemma4Config,
    MambaConfig,
    MambaForCausalLM,
    Mistral3Config,
    MoshiConfig,
    MoshiForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    ProphetNetConfig,
    ProphetNetForCausalLM,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    RwkvConfig,
    RwkvForCausalLM,
)

from hf_dspark import DSparkDrafter, UnsupportedTargetError
from hf_dspark.utils.logging import warn_once
from tests.helpers import left_padded, plain, random_prompts, speculate
from tests.tiny import _COMMON, _MOE, EOS, HIDDEN, MASK, PAD, VOCAB, tiny_drafter, tiny_llama

WINDOW = 16


def test_a_target_with_other_kernels_attends_by_sdpa_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """The text is plain's, it is said once, and the target keeps its kernels."""
    target = tiny_llama()
    drafter, inputs = tiny_drafter(target), left_padded(random_prompts((9, 4, 6)))
    expected = plain(target, inputs)
    target.set_attn_implementation("flex_attention")
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_dspark"):
        for _ in range(2):
            assert torch.equal(speculate(target, drafter, inputs), expected)
    assert caplog.text.count("attn_implementation='flex_attention'") == 1
    assert target.config._attn_implementation == "flex_attention"


def made(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model


def moshi() -> PreTrainedModel:
    return made(MoshiForCausalLM, MoshiConfig(**_COMMON, sliding_window=WINDOW, ffn_dim=48))


def inputs(batch: int, length: int = 9) -> dict[str, torch.Tensor]:
    return left_padded(random_prompts((length, 4, 6)[:batch]))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_window_that_only_the_cache_has_is_decoded_up_to_its_length_and_refused_beyond(batch: int) -> None:
    """Moshi's attention is told nothing of the window; up to it the text is plain's, beyond it a pass over several tokens sees too much."""
    target = moshi()
    drafter = tiny_drafter(target)
    prompts = inputs(batch)
    room = WINDOW - prompts["input_ids"].shape[1]
    assert torch.equal(speculate(target, drafter, prompts, max_new_tokens=room), plain(target, prompts, max_new_tokens=room))
    with pytest.raises(UnsupportedTargetError, match=rf"last {WINDOW} tokens by its cache alone.*max_length is {WINDOW + 1}"):
        speculate(target, drafter, prompts, max_new_tokens=room + 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_that_goes_on_with_a_view_gets_contiguous_memory(batch: int) -> None:
    """AFMoE calls `.view` on what attention returns."""
    target = made(
        AfmoeForCausalLM,
        AfmoeConfig(
            **_COMMON,
            **_MOE,
            moe_intermediate_size=24,
            num_experts=4,
            head_dim=8,
            num_dense_layers=1,
            sliding_window=8,
            global_attn_every_n_layers=2,
        ),
    )
    prompts = inputs(batch, 12)
    assert torch.equal(speculate(target, tiny_drafter(target), prompts), plain(target, prompts))


def openai_gpt() -> PreTrainedModel:
    return made(OpenAIGPTLMHeadModel, OpenAIGPTConfig(vocab_size=VOCAB, n_positions=512, n_embd=HIDDEN, n_layer=4, n_head=4))


def prophetnet() -> PreTrainedModel:
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("ffn_dim", 48),)}
    return made(
        ProphetNetForCausalLM,
        ProphetNetConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_encoder_layers=4, num_decoder_layers=4, num_encoder_attention_heads=4,
            num_decoder_attention_heads=4, is_decoder=True, is_encoder_decoder=False, add_cross_attention=False, **sizes,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("make", "why"), [(openai_gpt, "it keeps no cache"), (prophetnet, "several tokens behind a cache")])
def test_what_transformers_own_loop_cannot_run_either_is_refused_at_every_batch_size(make: Any, why: str, batch: int) -> None:
    """A model without a cache, and one that takes a token at a time behind it, are refused by name before anything runs."""
    target = make()
    with pytest.raises(UnsupportedTargetError, match=rf"{type(target).__name__}.*{why}.*[Gg]enerate without"):
        speculate(target, tiny_drafter(target), inputs(batch))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning", "ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_dynamically_quantized_target_is_refused_at_every_batch_size(batch: int) -> None:
    """Its activations are rounded by the whole pass, so a block's logits are not those of its tokens one by one."""
    target = tiny_llama()
    drafter = tiny_drafter(target)
    quantized = torch.ao.quantization.quantize_dynamic(target, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedTargetError, match="dynamic quantization"):
        speculate(quantized, drafter, inputs(batch))


SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (MambaForCausalLM, MambaConfig(**SIZES, state_size=4)),
        (FalconMambaForCausalLM, FalconMambaConfig(**SIZES, state_size=4)),
        (RwkvForCausalLM, RwkvConfig(**SIZES, attention_hidden_size=HIDDEN, intermediate_size=48)),
    ],
)
def test_from_target_says_that_a_recurrent_model_cannot_roll_back(model_class: type[PreTrainedModel], config: Any) -> None:
    """Not that another part of it should be passed."""
    with pytest.raises(ValueError, match=rf"{config.model_type}.*recurrent state cannot take rejected tokens back"):
        DSparkDrafter.from_target(made(model_class, config), mask_token_id=MASK)


# ----------------------------------------------------------------------------------- classes that also take images, with text alone

VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 2, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": HIDDEN}
QWEN_IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def m_rope(section: list[int]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}}


MULTIMODAL: dict[str, Any] = {
    "gemma3": lambda: Gemma3Config(
        text_config=_COMMON | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16},
        vision_config=VISION,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    ),
    "gemma4": lambda: Gemma4Config(
        text_config=_COMMON | SLIDING | {"head_dim": 16, "global_head_dim": 16}, vision_config=None, audio_config=None
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=_COMMON | {"model_type": "mistral", "sliding_window": 8},
        vision_config=VISION | {"model_type": "pixtral"},
        image_token_index=90,
    ),
    "qwen2.5-vl": lambda: Qwen2_5_VLConfig(text_config=_COMMON | m_rope([1, 1, 2]), vision_config=QWEN_VISION, **QWEN_IDS),
    "qwen3-vl": lambda: Qwen3VLConfig(
        text_config=_COMMON | {"head_dim": 8} | m_rope([2, 1, 1]), vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]}, **QWEN_IDS
    ),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_class_that_also_takes_images_is_drafted_for_where_there_is_only_text(family: str, batch: int) -> None:
    """`generate` adds an empty dictionary of encoder outputs, and m-rope classes positions with several equal axes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        target = AutoModelForImageTextToText.from_config(MULTIMODAL[family]()).eval()
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = EOS, PAD
    prompts = inputs(batch, 12)
    assert torch.equal(speculate(target, tiny_drafter(target), prompts), plain(target, prompts))
