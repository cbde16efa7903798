"""Random taps, and one draft block a row after them."""

from __future__ import annotations

import torch

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.models.modeling_dspark import DSparkDrafter


def random_taps(drafter: DSparkDrafter, *shape: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(*shape, drafter.fc.in_features, generator=generator)


def draft(drafter: DSparkDrafter, taps: list[torch.Tensor], anchors: list[int], gamma: int | None = None) -> torch.Tensor:
    """Hidden states `(R, gamma, d)` of one block a row, after contexts of different lengths."""
    cache, starts = RowCache(), [len(t) for t in taps]
    cache.add_rows(len(taps))
    drafter.extend_context(torch.cat(taps), RowLayout([0] * len(taps), starts), cache)
    return drafter.draft_hidden(torch.tensor(anchors), starts, cache, gamma)
