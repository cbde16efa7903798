"""Drawing tokens: exact sampling by the inverse of the distribution function, one uniform number a draw."""

from __future__ import annotations

from typing import Any

import torch

# Probabilities that are looked at together: 16 MiB of them, 32 of their sums.
ELEMENTS_AT_ONCE = 1 << 22


def uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """Independent uniform numbers in [0, 1), float64.

    Args:
        shape (`tuple[int, ...]`): shape of the result.
        device (`torch.device`): of the result.
        generator (`torch.Generator`, *optional*): source of randomness; torch's default generator where None.
    """
    # Away from 1 by more than rounding, so that u times a sum is below that sum.
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device).mul_(1 - 2**-50)


def draw(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Draw one index a row with probability proportional to its weight: the first whose cumulated weight exceeds `u` times their sum.

    Cumulated in float64, so that no token of a large vocabulary is lost to rounding. Needs no normalised weights, no noise of their size
    and no host sync.

    Args:
        weights (`torch.Tensor` of shape `(N, V)`): non-negative, float32, at least one positive a row.
        u (`torch.Tensor` of shape `(N,)`): of `uniform`.
    Returns:
        `torch.LongTensor` of shape `(N,)`.
    """
    rows: Any = weights.shape[0]
    if not isinstance(rows, torch.SymInt) and (some := max(ELEMENTS_AT_ONCE // weights.shape[1], 1)) < rows:
        return torch.cat([draw(part, own) for part, own in zip(weights.split(some), u.split(some), strict=True)])
    total = weights.cumsum(-1, dtype=torch.float64)
    # A parallel sum need not grow at each step: an index without weight does not count, whatever is cumulated there.
    return torch.logical_and(total > u[..., None] * total[..., -1:], weights).view(torch.uint8).argmax(-1)
