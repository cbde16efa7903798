"""The draft vocabulary: which target ids a drafter can propose.

V is the target's vocabulary, V_draft the drafter's; a draft id is a column of the drafter's logits.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_dspark.configuration_dspark import DSparkConfig


class DraftVocabularyMixin:
    """Maps between draft ids and target ids for a drafter with `config` and, if its vocabulary is reduced, a buffer `d2t`.

    Source: target id = draft id + d2t[draft id], as in EAGLE-3 and DeepSpec's checkpoints.
    """

    config: DSparkConfig
    d2t: torch.Tensor
    # What d2t was, its target ids `(V_draft,)`, and of each target id `(V, 2)` its draft id, 0 for none, and whether there is one, 1 or 0.
    _draft_vocabulary: tuple[tuple[Any, ...], torch.Tensor, torch.Tensor] | None = None

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """`torch.LongTensor` of shape `(V_draft,)`: target id of each draft id; `None` for the whole vocabulary."""
        return None if self.config.draft_vocab_size is None else self._draft_maps()[0]

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target ids of draft ids.

        Args:
            draft_ids (`torch.LongTensor` of any shape): indices into the last dimension of `base_logits`.
        Returns:
            `torch.LongTensor` of the same shape.
        """
        return draft_ids if self.config.draft_vocab_size is None else self._draft_maps()[0][draft_ids]

    def values_at(self, values: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """Look up values over the draft vocabulary at target ids.

        Args:
            values (`torch.Tensor` of shape `(..., V_draft)`): finite, such as p_d.
            target_ids (`torch.LongTensor` of shape `(...,)`): one a distribution; a negative one, no token, gets any value.
        Returns:
            `torch.Tensor` of shape `(...,)`: 0 for tokens that the drafter cannot propose.
        """
        if self.config.draft_vocab_size is None:
            return values.gather(-1, target_ids.clamp(min=0)[..., None])[..., 0]
        places, inside = self._draft_maps()[1][target_ids].split(1, dim=-1)
        return (values.gather(-1, places) * inside)[..., 0]

    def widen(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Spread values over the draft vocabulary onto the target's.

        Args:
            values (`torch.Tensor` of shape `(..., V_draft)`): p_d, or logits with `fill=-inf`.
            fill (`float`): value of tokens that the drafter cannot propose.
        Returns:
            `torch.Tensor` of shape `(..., V)`; `values` itself for the whole vocabulary.
        """
        ids = self.draft_token_ids
        if ids is None:
            return values
        wide = values.new_full((*values.shape[:-1], self.config.vocab_size), fill)
        return wide.index_copy_(-1, ids.to(wide.device), values)

    def _draft_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Target id of each draft id, and of each target id its draft id and whether it has one; computed once a content of `d2t`."""
        version = -1 if self.d2t.is_inference() else self.d2t._version
        key = (self.d2t.data_ptr(), version, self.d2t.device)
        if self._draft_vocabulary is None or self._draft_vocabulary[0] != key:
            with torch.inference_mode(False):  # kept over calls, of which others may need gradients
                draft_ids = torch.arange(len(self.d2t), device=self.d2t.device)
                target_ids = self.d2t + draft_ids
                places = torch.zeros(self.config.vocab_size, 2, dtype=torch.long, device=self.d2t.device)
                places[target_ids] = torch.stack([draft_ids, torch.ones_like(draft_ids)], dim=1)
            self._draft_vocabulary = (key, target_ids, places)
        return self._draft_vocabulary[1:]


def check_draft_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Validate the target ids of a draft vocabulary.

    Args:
        ids (`torch.LongTensor` of shape `(V_draft,)`): target ids, in any order.
        vocab_size (`int`): V, the target's vocabulary.
    Returns:
        `torch.LongTensor` of shape `(V_draft,)`: on the CPU, ascending.
    Raises:
        ValueError: if they are not a list of distinct ids of the target.
    """
    ids = torch.as_tensor(ids)
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.numel() == 0:
        raise ValueError(f"draft_token_ids must be a non-empty 1-D tensor of token ids; got shape {tuple(ids.shape)}, {ids.dtype}.")
    ids = ids.to(device="cpu", dtype=torch.int64).sort().values
    if ids[0] < 0 or ids[-1] >= vocab_size:
        raise ValueError(f"draft_token_ids must lie in 0..{vocab_size - 1}; got {int(ids[0])}..{int(ids[-1])}.")
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"draft_token_ids must not repeat; {int((ids[1:] == ids[:-1]).sum())} of {len(ids)} do.")
    return ids
