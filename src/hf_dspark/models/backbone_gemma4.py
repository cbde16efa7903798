"""The layers of a Gemma 4 backbone: four norms a layer, values that may be the keys, one scalar a layer."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.models.backbone import Attend, Rope, rotate


class Gemma4Norm(nn.Module):
    """RMS norm in float32, scaled by the weight itself before the cast back.

    Args:
        size (`int`): of the last dimension.
        eps (`float`): added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (_unit(x, self.eps) * self.weight.float()).to(x.dtype)


def _unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).pow(-0.5)


class Gemma4Attention(nn.Module):
    """Projections and norms; the caller computes the attention itself, as in `DSparkAttention`.

    Scores are not divided by the root of the head size. Values are normed too; with `attention_k_eq_v` they are the keys before norm and
    rotation.

    Source: layout and arithmetic of deepseek-ai/DeepSpec's Gemma 4 drafter, transformers' Gemma 4.
    """

    def __init__(self, config: DSparkConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim, self.attention_dropout = layer_idx, config.head_dim, config.attention_dropout
        d, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = None if config.attention_k_eq_v else nn.Linear(d, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, d, bias=config.attention_bias)
        self.q_norm = Gemma4Norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = Gemma4Norm(self.head_dim, config.rms_norm_eps)
        self.eps = config.rms_norm_eps

    def queries(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Queries of shape `(..., heads, head_dim)`, normalised and rotated, from `x` of shape `(..., d)`."""
        # The caller's attention divides by the root of the head size.
        return rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), rope) * self.head_dim**0.5

    def keys_values(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (normalised and rotated) and values (normalised), each `(..., kv_heads, head_dim)`, from `x` of shape `(..., d)`."""
        keys = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        values = keys if self.v_proj is None else self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(keys), rope), _unit(values, self.eps).to(values.dtype)

    def forward(self, x: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        """Attention output of shape `(..., d)`; `attend(layer, q, k, v)` returns `(..., heads * head_dim)`."""
        return self.o_proj(attend(self.layer_idx, self.queries(x, rope), *self.keys_values(x, rope)))


class Gemma4MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        d, width = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(d, width, bias=False), nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Gemma4Layer(GradientCheckpointingLayer):
    """One layer with a norm before and after attention and MLP, and a scalar on its output."""

    layer_scalar: torch.Tensor

    def __init__(self, config: DSparkConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Gemma4Attention(config, layer_idx)
        self.mlp = Gemma4MLP(config)
        for name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
            setattr(self, name, Gemma4Norm(config.hidden_size, config.rms_norm_eps))
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, attend))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar
