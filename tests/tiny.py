"""Tiny named targets with random weights, and drafters for them: fp32, seeded, in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_dspark.models.modeling_dspark import DSparkDrafter

VOCAB = 97
HIDDEN = 32
EOS, BOS, PAD, MASK = 2, 1, 0, 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**_COMMON)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**_COMMON)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**_COMMON, head_dim=8)),
    "mistral": (MistralForCausalLM, lambda: MistralConfig(**_COMMON, sliding_window=8)),
    "gemma3": (
        Gemma3ForCausalLM,
        lambda: Gemma3TextConfig(
            **_COMMON,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "mixtral": (MixtralForCausalLM, lambda: MixtralConfig(**_COMMON, **_MOE, num_local_experts=4)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        lambda: Qwen3MoeConfig(**_COMMON, **_MOE, head_dim=8, num_experts=4, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(
            vocab_size=VOCAB,
            n_positions=512,
            n_embd=HIDDEN,
            n_layer=4,
            n_head=4,
            initializer_range=0.2,
            eos_token_id=EOS,
            bos_token_id=BOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        ),
    ),
}


def tiny_target(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random target of a family of `FAMILIES`: 97 tokens, 4 layers, width 32."""
    model_class, make_config = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(make_config()).to(torch.float32).eval()
    # Without the special ids that families add, which would end texts early.
    model.generation_config.eos_token_id = EOS
    model.generation_config.bos_token_id = BOS
    model.generation_config.pad_token_id = PAD
    return model


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    """`tiny_target("llama")`."""
    return tiny_target("llama", seed)


def tiny_drafter(target: PreTrainedModel, head: str = "vanilla", seed: int = 1, **fields: Any) -> DSparkDrafter:
    """A random drafter bound to a target: 2 layers, block 5, rank 6, with weights so large that every part matters.

    Args:
        target (`PreTrainedModel`): from `tiny_target`.
        head (`str`): `"vanilla"`, `"gated"`, `"rnn"` or `"none"`.
        seed (`int`): of the weights.
        fields: arguments of `DSparkDrafter.from_target`.
    """
    arguments: dict[str, Any] = {
        "block_size": 5,
        "num_taps": 2,
        "mask_token_id": MASK,
        "markov_rank": 0 if head == "none" else 6,
        "markov_head_type": "vanilla" if head == "none" else head,
        **fields,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = DSparkDrafter.from_target(target, **arguments)
        with torch.no_grad():
            for name, parameter in drafter.named_parameters():
                if "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
    return drafter
