"""How many kernels a round launches eagerly: aten calls that are no views, the same on every device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding.draft import draft_block
from hf_dspark.decoding.ngram_copy import Copies
from hf_dspark.decoding.verify import DraftBlock, accept_sampled
from tests.tiny import VOCAB, tiny_drafter, tiny_llama

# Calls that hand back what they were given.
_NO_LAUNCH = {"to", "detach_", "lift_fresh", "unfold"}


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        same = isinstance(out, torch.Tensor) and any(isinstance(a, torch.Tensor) and a.data_ptr() == out.data_ptr() for a in args)
        self.count += not (func.is_view or name in _NO_LAUNCH or (same and not name.endswith("_")))
        return out


@contextmanager
def launches(most: int) -> Iterator[None]:
    with torch.no_grad(), _Launches() as counted:
        yield
    assert most // 2 < counted.count <= most


def drafted(rows: int, sample: bool) -> DraftBlock:
    """A block of 7 behind texts that repeat themselves, by two layers with a reduced vocabulary, n-gram copies and no confidences."""
    drafter = tiny_drafter(tiny_llama(), block_size=7, draft_token_ids=torch.arange(0, VOCAB, 2), copy_weights=[0.3, 0.5, 0.7])
    texts = torch.randint(4, 9, (rows, 20), generator=torch.Generator().manual_seed(0))
    cache, ends = RowCache(), torch.full((rows,), 20)
    cache.add_rows(rows)
    for _ in range(2):  # the first one makes buffers and maps
        copies = Copies(texts, ends[:, None], ends, drafter.config.copy_weights, 7)
        with launches(LIMITS[sample]):
            block = draft_block(drafter, texts[:, -1], [0] * rows, cache, length=7, sample=sample, copies=copies)
    return block


LIMITS = {False: 250, True: 300}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("sample", [False, True])
def test_a_draft_launches_as_many_kernels_for_many_rows_as_for_one(sample: bool, rows: int) -> None:
    """At most the limit, whatever the number of rows."""
    drafted(rows, sample)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_verdict_over_drawn_blocks_launches_as_many_kernels_for_many_rows_as_for_one(rows: int) -> None:
    """Block verification with copies and a reduced vocabulary."""
    block, layout = drafted(rows, sample=True), RowLayout([20] * rows, [8] * rows)
    p_t = torch.rand(8 * rows, VOCAB).softmax(-1)
    with launches(120):
        accept_sampled(p_t, block, layout, None, blockwise=True)
