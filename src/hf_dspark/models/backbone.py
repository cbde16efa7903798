"""The drafter's backbone: layers, rotary embedding, and the attention of a block when drafting and when training.

Symbols: B sequences, A anchors a sequence, S context tokens, R rows, gamma block size, d width, H query heads, Hkv key and value heads, D
head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from hf_dspark.configuration_dspark import DSparkConfig

Rope = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DSparkRMSNorm(Qwen3RMSNorm):
    """Qwen3's, in one kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class DSparkAttention(Qwen3Attention):
    """Qwen3's projections and norms; the caller computes the attention itself.

    Source: paper Eq. 3: the block and the injected context share key and value weights.
    """

    def __init__(self, config: DSparkConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_norm, self.k_norm = (DSparkRMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))

    def queries(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Queries of shape `(..., heads, head_dim)`, normalised and rotated, from `x` of shape `(..., d)`."""
        return rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), rope)

    def keys_values(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (normalised and rotated) and values, each `(..., kv_heads, head_dim)`, from `x` of shape `(..., d)`."""
        keys = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))), rope)
        return keys, self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        """Attention output of shape `(..., d)`; `attend(layer, q, k, v)` returns `(..., heads * head_dim)`."""
        return self.o_proj(attend(self.layer_idx, self.queries(x, rope), *self.keys_values(x, rope)))


class DSparkRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's, with frequencies that stay float32 when the drafter is cast: bfloat16 angles are off by whole turns at long contexts."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DSparkRotaryEmbedding:
        super()._apply(fn, recurse)
        for name in ("inv_freq", "original_inv_freq"):
            cast = getattr(self, name)
            if cast.dtype != torch.float32 and cast.device.type != "meta":
                exact = type(self)(self.config).inv_freq
                setattr(self, name, exact.to(device=cast.device, dtype=torch.float32))
        return self


class DSparkLayer(GradientCheckpointingLayer):
    """One pre-norm layer of the backbone."""

    def __init__(self, config: DSparkConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DSparkAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = DSparkRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DSparkRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


def cached_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of one block a row over that row's cached keys and values, the block's own among them.

    Args:
        q (`torch.Tensor` of shape `(R, gamma, H, D)`): queries.
        keys, values (`torch.Tensor` of shape `(R, Hkv, S, D)`): a view of the cache.
        mask (`torch.BoolTensor` of shape `(R, 1, 1, S)` or `(R, 1, gamma, S)`, *optional*): true for keys that a row, or each of its
            queries, sees; `None` for all.
    Returns:
        `torch.Tensor` of shape `(R, gamma, H * D)`.
    """
    gamma, heads = q.shape[1], keys.shape[1]
    groups = q.shape[2] // heads
    # Query heads that share a key head lie along the query length, so that keys and values are not expanded.
    q = q.unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if mask is not None and mask.shape[2] != 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return out.unflatten(2, (groups, gamma)).permute(0, 3, 1, 2, 4).flatten(2)


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context_k: torch.Tensor,
    context_v: torch.Tensor,
    hidden_keys: torch.Tensor,
    gamma: int,
    dropout: float = 0.0,
    causal: bool = False,
) -> torch.Tensor:
    """One softmax over the context and the query's own block; scores against other blocks never exist.

    Args:
        q (`torch.Tensor` of shape `(B, A * gamma, H, D)`): queries of the blocks, one block after the other.
        k, v (`torch.Tensor` of shape `(B, A * gamma, Hkv, D)`): keys and values of the blocks.
        context_k, context_v (`torch.Tensor` of shape `(B, S, Hkv, D)`): keys and values of the context.
        hidden_keys (`torch.BoolTensor` of shape `(B, 1, 1, A * gamma, S)`): true for context keys that a query does not see.
        gamma (`int`): block length.
        dropout (`float`): probability of dropping an attention weight.
        causal (`bool`): within its block a query does not see later keys.
    Returns:
        `torch.Tensor` of shape `(B, A * gamma, H * D)`.
    """
    _, length, kv_heads, size = context_k.shape
    rows = q.shape[1]
    groups, anchors = q.shape[2] // kv_heads, rows // gamma

    def by_block(t: torch.Tensor) -> torch.Tensor:  # (B, Hkv, g, A * gamma, n) -> (B, Hkv, A, g * gamma, n)
        return t.unflatten(3, (anchors, gamma)).transpose(2, 3).flatten(3, 4)

    def by_row(t: torch.Tensor) -> torch.Tensor:  # and back
        return t.unflatten(3, (groups, gamma)).transpose(2, 3).flatten(3, 4)

    q = (q * size**-0.5).unflatten(2, (kv_heads, groups)).permute(0, 2, 3, 1, 4)  # (B, Hkv, g, A * gamma, D)
    k, v = (t.unflatten(1, (anchors, gamma)).permute(0, 3, 1, 2, 4) for t in (k, v))  # (B, Hkv, A, gamma, D)
    outside = (q.flatten(2, 3) @ context_k.permute(0, 2, 3, 1)).unflatten(2, (groups, rows))
    inside = by_row(by_block(q) @ k.transpose(-1, -2))  # (B, Hkv, g, A * gamma, gamma)
    if causal:
        later = torch.ones(gamma, gamma, dtype=torch.bool, device=q.device).triu(1)
        inside = inside.masked_fill(later.repeat(anchors, 1), float("-inf"))
    weights = torch.cat((outside.masked_fill(hidden_keys, float("-inf")), inside), dim=-1).softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    from_context, from_block = weights.split((length, gamma), dim=-1)
    out = (from_context.flatten(2, 3) @ context_v.transpose(1, 2)).unflatten(2, (groups, rows))
    out = out + by_row(by_block(from_block) @ v)
    return out.permute(0, 3, 1, 2, 4).flatten(2)


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Apply RoPE to `x` of shape `(..., heads, head_dim)`; the first half of `sin` is negative, so that halves change places by a roll."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
