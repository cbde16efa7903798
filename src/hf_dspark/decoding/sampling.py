"""Drawing tokens: exact sampling by an exponential race."""

from __future__ import annotations

import torch


def exponential_noise(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Independent Exp(1) variates, float32, never zero.

    Args:
        shape (`tuple[int, ...]`): shape of the result.
        like (`torch.Tensor`): gives the device.
        generator (`torch.Generator`, *optional*): source of randomness; torch's default generator where None.
    """
    noise = torch.empty(shape, dtype=torch.float32, device=like.device)
    return noise.exponential_(generator=generator).clamp_min_(torch.finfo(torch.float32).tiny)


def draw(weights: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw one index a row with probability proportional to its weight.

    The arg-max of weight / Exp(1) has exactly that distribution, needs no normalised weights and no host sync.

    Args:
        weights (`torch.Tensor` of shape `(..., V)`): non-negative, float32, at least one positive a row.
        generator (`torch.Generator`, *optional*): source of randomness.
    Returns:
        `torch.LongTensor` of shape `(...)`.
    """
    return (weights / exponential_noise(tuple(weights.shape), weights, generator)).argmax(-1)


def draw_from_logits(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw from softmax(logits) without forming it: arg-max of logits - log(Exp(1)), the Gumbel trick.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): float32; -inf where the probability is zero.
        noise (`torch.Tensor` of shape `(..., V)`): Exp(1) variates.
    Returns:
        `torch.LongTensor` of shape `(...)`.
    """
    return (logits - noise.log()).argmax(-1)
