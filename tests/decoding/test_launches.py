"""How many kernels a round launches eagerly: aten calls that are no views, the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import pytest
import torch
from examples.benchmarks.rounds import counted_rounds
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding.draft import draft_block
from hf_dspark.decoding.ngram_copy import Copies
from hf_dspark.decoding.verify import DraftBlock, accept_sampled
from tests.helpers import make_world, speculate, talking_target
from tests.tiny import VOCAB, tiny_drafter, tiny_llama

T = TypeVar("T")
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


def launches(call: Callable[[], T]) -> tuple[int, T]:
    with torch.no_grad(), _Launches() as counted:
        out = call()
    return counted.count, out


def drafted(rows: int, sample: bool) -> tuple[int, DraftBlock]:
    """A block of 7 behind texts that repeat themselves, by two layers with a reduced vocabulary, n-gram copies and no confidences; how many
    kernels the second one launched, for which buffers and maps are there.
    """
    drafter = tiny_drafter(tiny_llama(), block_size=7, draft_token_ids=torch.arange(0, VOCAB, 2), copy_weights=[0.3, 0.5, 0.7])
    texts = torch.randint(4, 9, (rows, 20), generator=torch.Generator().manual_seed(0))
    cache, ends = RowCache(), torch.full((rows,), 20)
    cache.add_rows(rows)

    def draft() -> DraftBlock:
        copies = Copies(texts, ends[:, None], ends, drafter.config.copy_weights, 7)
        return draft_block(drafter, texts[:, -1], [0] * rows, cache, length=7, sample=sample, copies=copies)

    draft()
    return launches(draft)


def verdict(rows: int) -> int:
    """Block verification of such blocks."""
    _, block = drafted(rows, sample=True)
    p_t, layout = torch.rand(8 * rows, VOCAB).softmax(-1), RowLayout([20] * rows, [8] * rows)
    return launches(lambda: accept_sampled(p_t, block, layout, torch.rand(rows, 8, dtype=torch.float64), blockwise=True))[0]


def test_the_count_is_of_kernels() -> None:
    """Views and calls that hand back their argument are none; each computation is one, in place or not."""
    x = torch.zeros(4, 6)
    assert launches(lambda: x.t().reshape(6, 4)[:, :2].to(torch.float32))[0] == 0
    assert launches(lambda: (x + 1).mul_(2).sum())[0] == 3


@pytest.mark.parametrize(("sample", "most"), [(False, 215), (True, 300)])
def test_a_draft_launches_a_bounded_number_of_kernels_and_no_more_for_many_rows(sample: bool, most: int) -> None:
    """Nothing is launched a row; a handful of launches are there for several rows at all."""
    one, many = drafted(1, sample)[0], drafted(8, sample)[0]
    assert one <= most
    assert many <= one + 8


def test_a_verdict_launches_a_bounded_number_of_kernels_and_no_more_for_many_rows() -> None:
    """Over drawn blocks, with copies and a reduced vocabulary."""
    one, many = verdict(1), verdict(8)
    assert one <= 60
    assert many <= one + 8


def test_processors_that_read_ids_launch_no_more_for_many_rows() -> None:
    """Ids are read for all rows and positions at once, in drafts and in verdicts."""
    w, usual = make_world(talking_target()), {}
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[4], [5, 6]], "min_new_tokens": 20}
    for rows in (2, 8):
        with counted_rounds() as rounds:
            speculate(w.target, w.drafter, w.inputs(rows), eos_token_id=[9], **options)
        assert len(rounds) > 3
        usual[rows] = median(one.launches for one in rounds)
    assert usual[8] <= usual[2] + 8
