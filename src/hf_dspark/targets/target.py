"""The target as decoding sees it: token ids in, logits and the hidden states of the tapped layers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.targets.model_inputs import accepts, input_device
from hf_dspark.targets.ragged_attention import ragged_attention, ragged_forward
from hf_dspark.targets.self_test import check_target
from hf_dspark.targets.taps import Taps
from hf_dspark.targets.uncompiled import uncompiled


class Target:
    """One target, open for ragged passes.

    Args:
        model (`PreTrainedModel`): a decoder-only causal language model.
        tap_ids (`list[int]`): layers whose output the drafter reads.
    Raises:
        UnsupportedTargetError: if ragged passes cannot be exact on this model.
    """

    def __init__(self, model: Any, tap_ids: Sequence[int]) -> None:
        self.model = model
        self.taps = Taps(model, tap_ids)
        check_target(model)
        self._trims_logits = accepts(model, "logits_to_keep")

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.config.get_text_config(decoder=True).vocab_size

    @contextmanager
    def open(self) -> Iterator[Target]:
        """Attention follows rows and taps are caught until this is left."""
        with uncompiled(self.model), ragged_attention(self.model), self.taps.open():
            yield self

    def forward(self, ids: torch.Tensor, layout: RowLayout, store: RowCache, only_last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """One flattened pass.

        Args:
            ids (`torch.LongTensor` of shape `(T,)`): tokens of row 0, row 1, ..
            layout (`RowLayout`): where they belong.
            store (`RowCache`): keys and values of the rows; the pass writes the new tokens', committing none.
            only_last (`bool`): logits of each row's last token only.
        Returns:
            logits `(T, V)` or `(R, V)`, and taps `(T, taps * hidden)`.
        """
        logits = ragged_forward(self.model, ids, layout, store, only_last, self._trims_logits)
        return logits, self.taps.take()[0]
