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
    """Copy the target's last layers into a drafter's, in place, where shapes agree; logs and returns the names of what was copied."""
    own_layers = cast(nn.ModuleList, drafter.layers)
    decoder = target.get_decoder()
    theirs = next((m for name in ("layers", "h") if isinstance(m := getattr(decoder, name, None), nn.ModuleList)), None)
    copied: list[str] = []

    def copy_into(name: str, weight: object) -> None:
        own = drafter.get_parameter(name)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape == own.shape and weight.device.type != "meta":
            own.copy_(weight)
            copied.append(name)

    for i in range(-len(own_layers), 0):
        if theirs is None or len(theirs) < -i:
            continue
        layer, prefix = theirs[i], f"layers.{i + len(own_layers)}"
        for name in (*(f"self_attn.{one}_proj" for one in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            copy_into(f"{prefix}.{name}.weight", getattr(_find(layer, name), "weight", None))
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm"):
            copy_into(f"{prefix}.{name}.weight", _rms_scale(_find(layer, name)))
        # The norm before the MLP has another name in Gemma, where our name is a norm after the attention, as in OLMo 2.
        before_mlp = _find(layer, "pre_feedforward_layernorm")
        if before_mlp is None and not hasattr(layer, "post_feedforward_layernorm"):
            before_mlp = _find(layer, "post_attention_layernorm")
        copy_into(f"{prefix}.post_attention_layernorm.weight", _rms_scale(before_mlp))
    copy_into("norm.weight", _rms_scale(_find(decoder, "norm")))
    names = ", ".join(copied) or "none has the same name and shape"
    logger.info("Copied %d of the backbone's tensors from the last layers of %s: %s.", len(copied), type(target).__name__, names)
    return copied


def _find(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


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
