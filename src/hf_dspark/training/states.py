"""Hidden states of the frozen target for training, computed on the fly. Knows the target's decoder; knows no drafter, no loss, no disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_dspark.targets.target import Taps

_GIB = 2**30


class TargetStates:
    """Taps and last hidden states of a frozen target, by one pass of its decoder and never of its lm_head.

    The rows are padded on the right and the decoder is causal, so no padding mask is passed: padding cannot reach a
    real token, and attention takes its fast causal path.

    With memory of the host to spare, the states of rows that have been seen are kept there for the next pass over the data. Then
    every row goes through the target alone, so that what is kept does not depend on the batch in which a row came up
    first, and a resumed run sees the states of the uninterrupted one. What does not fit is computed again; what is kept
    stays, since a pass over the data visits every row once and would push out just what it needs next.

    Args:
        target (`transformers.PreTrainedModel`): a causal LM; its weights are read only.
        layer_ids: tap ids, i = output of decoder layer i, -1 = the embeddings.
        memory_gib (`float`): memory for kept states; a token of m taps and width d takes (m + 1) d numbers.
    """

    def __init__(self, target: Any, layer_ids: Sequence[int], *, memory_gib: float = 0.0) -> None:
        self.target = target
        self.decoder = target.get_decoder()
        self._taps = Taps(target, layer_ids)
        self.device = next(self.decoder.parameters()).device
        self._room_bytes = int(memory_gib * _GIB)
        self._keeps = memory_gib > 0
        self._kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @property
    def kept_rows(self) -> int:
        """Rows whose states are kept in memory."""
        return len(self._kept)

    def __call__(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, sequence)`): padded on the right.
        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: taps `(batch, sequence, taps * hidden)`, and last hidden states after
                the final norm `(batch, sequence, hidden)`. Ordinary tensors without gradient history.
        """
        was_training = self.target.training
        self.target.eval()
        try:
            with torch.inference_mode(), self._taps.open():
                last = self.decoder(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state
        finally:
            self.target.train(was_training)
        # Outside inference mode: the concatenation and the copy are ordinary tensors that backward may keep.
        return self._taps.take(), last.clone()

    def of_batch(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States of a padded batch, from memory where they are kept there.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, sequence)`): padded on the right.
            lengths (`torch.Tensor` of shape `(batch,)`): tokens of each row without padding.
        Returns:
            As `__call__`; zeros at padding where memory is in use.
        """
        if not self._keeps:
            return self(input_ids)
        rows = [self._row(ids[:length]) for ids, length in zip(input_ids, lengths.tolist(), strict=True)]
        shape = input_ids.shape
        taps, last = (rows[0][i].new_zeros(*shape, rows[0][i].shape[-1]) for i in range(2))
        for r, (row_taps, row_last) in enumerate(rows):
            taps[r, : len(row_taps)] = row_taps
            last[r, : len(row_last)] = row_last
        return taps, last

    def _row(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        key = tuple(ids.tolist())
        found = self._kept.get(key)
        if found is not None:
            return found[0].to(self.device, non_blocking=True), found[1].to(self.device, non_blocking=True)
        taps, last = (t[0] for t in self(ids[None]))
        size = sum(t.numel() * t.element_size() for t in (taps, last))
        if size <= self._room_bytes:
            self._room_bytes -= size
            self._kept[key] = (taps.cpu(), last.cpu())
        return taps, last
