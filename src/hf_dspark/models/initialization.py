"""Initial weights of a new backbone, copied from the target's last layers."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@torch.no_grad()
def copy_last_layers(target: PreTrainedModel, drafter: nn.Module) -> list[str]:
    """Copy the target's last layers into a drafter's, in place, where shapes agree; logs what was copied.

    Args:
        target (`PreTrainedModel` or a PEFT wrapper): whose decoder is copied.
        drafter (`nn.Module`): has `layers` and `norm`, named as in Qwen3.
    Returns:
        `list[str]`: names of the drafter's parameters that were written.
    """
    own_layers = cast(nn.ModuleList, drafter.layers)
    decoder = target.get_decoder()
    theirs = next((m for name in ("layers", "h") if isinstance(m := getattr(decoder, name, None), nn.ModuleList)), None)
    copied: list[str] = []

    def copy_into(name: str, weight: torch.Tensor | None) -> None:
        own = drafter.get_parameter(name)
        if weight is not None and weight.is_floating_point() and weight.shape == own.shape and weight.device.type != "meta":
            own.copy_(weight)
            copied.append(name)

    for i in range(-len(own_layers), 0):
        if theirs is None or len(theirs) < -i:
            continue
        layer, prefix = theirs[i], f"layers.{i + len(own_layers)}"
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            copy_into(f"{prefix}.self_attn.{name}.weight", getattr(getattr(attention, name, None), "weight", None))
        for name in ("q_norm", "k_norm"):
            copy_into(f"{prefix}.self_attn.{name}.weight", _rms_scale(getattr(attention, name, None)))
        for name in ("gate_proj", "up_proj", "down_proj"):
            copy_into(f"{prefix}.mlp.{name}.weight", getattr(getattr(mlp, name, None), "weight", None))
        copy_into(f"{prefix}.input_layernorm.weight", _rms_scale(getattr(layer, "input_layernorm", None)))
        # The norm before the MLP has another name in Gemma, where our name is a norm after the attention, as in OLMo 2.
        before_mlp = getattr(layer, "pre_feedforward_layernorm", None)
        if before_mlp is None and not hasattr(layer, "post_feedforward_layernorm"):
            before_mlp = getattr(layer, "post_attention_layernorm", None)
        copy_into(f"{prefix}.post_attention_layernorm.weight", _rms_scale(before_mlp))
    copy_into("norm.weight", _rms_scale(getattr(decoder, "norm", None)))
    logger.info(
        "Copied %d of the backbone's tensors from the last layers of %s: %s.",
        len(copied),
        type(target).__name__,
        ", ".join(copied) or "none has the same name and shape",
    )
    return copied


@torch.no_grad()
def _rms_scale(norm: nn.Module | None) -> torch.Tensor | None:
    """What an RMSNorm multiplies by (its weight, or one plus it as in Gemma); `None` for another kind of norm."""
    weight = getattr(norm, "weight", None)
    if norm is None or weight is None or "RMSNorm" not in type(norm).__name__ or weight.device.type == "meta":
        return None
    scale = norm(torch.ones_like(weight)[None])[0]  # ones have RMS one
    for candidate in (weight, 1.0 + weight):
        if torch.allclose(scale.float(), candidate.float(), rtol=1e-2, atol=1e-3):
            return candidate.detach()
    return None
