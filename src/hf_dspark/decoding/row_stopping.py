"""The user's stopping criteria, over the new tokens of all rows at once where they go by token id and length, token by token where they
do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation import stopping_criteria as sc

from hf_dspark.decoding.state import State


class RowStopping:
    """Stopping criteria that apply to any row after each of its tokens.

    Args:
        criteria (`StoppingCriteriaList`): the prepared list that `generate` hands over.
        batch_size (`int`): rows of the caller's batch.
        limits (`Sequence[int]`, *optional*): longest sequence of each request, where they differ; on top of the criteria.
    """

    def __init__(self, criteria: Sequence[sc.StoppingCriteria], batch_size: int, limits: Sequence[int] | None = None) -> None:
        self._batch_size = batch_size
        self._limits = limits
        self.max_length: int | None = None
        self._others: list[sc.StoppingCriteria] = []
        eos: set[int] = set()
        for criterion in criteria:
            if type(criterion) is sc.EosTokenCriteria:
                eos.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is sc.MaxLengthCriteria:
                self.max_length = min(criterion.max_length, self.max_length or criterion.max_length)
            else:
                self._others.append(criterion)
        self._eos = torch.tensor(sorted(eos), dtype=torch.long)

    def limit(self, request: int) -> int | None:
        """Longest sequence of a request, prompt and padding included; None where there is no end to it."""
        own = None if self._limits is None else self._limits[request]
        return self.max_length if own is None else own if self.max_length is None else min(own, self.max_length)

    @property
    def reads_text(self) -> bool:
        """Whether there are criteria beyond lengths and end-of-text ids, which read a row's ids and scores."""
        return bool(self._others)

    def room(self, state: State, first: int, width: int) -> list[int]:
        """How many tokens each live row from place `first` on may still get, at most `width`."""
        limits = [self.limit(request) for request in state.requests[first:]]
        return [width if limit is None else min(limit - length, width) for limit, length in zip(limits, state.lengths[first:], strict=True)]

    def eos_on(self, device: torch.device) -> torch.Tensor:
        """End-of-text ids, `(E,)`."""
        self._eos = self._eos.to(device)  # once
        return self._eos

    def kept_of_text(self, place: int, count: int, state: State, scores: Sequence[torch.Tensor] | None) -> tuple[int, bool]:
        """How many of a row's new tokens remain by the other criteria, and whether it ends with them; they are written behind its committed
        ones.

        A criterion sees the ids with left padding and one more token each time, as in a plain call, and is called for every token: some
        keep count.

        Args:
            place (`int`): the row.
            count (`int`): new tokens to look at.
            state (`State`): ids of the live rows.
            scores (`list[torch.Tensor]` of shape `(V,)`, *optional*): the distribution behind each generated token of the row, of all
                new ones too; where the caller wants scores.
        """
        for index in range(count):
            ids = state.prefix(place, index + 1)
            seen = None if scores is None else tuple(s[None] for s in scores[: len(scores) - count + index + 1])
            answers = [self._stops(criterion, ids, state.requests[place], seen) for criterion in self._others]
            if any(answers):
                return index + 1, True
        return count, False

    def _stops(self, criterion: sc.StoppingCriteria, ids: torch.Tensor, row: int, scores: tuple[torch.Tensor, ...] | None) -> bool:
        if self._batch_size == 1 or type(criterion) in (sc.StopStringCriteria, sc.MaxTimeCriteria):
            answer = criterion(ids, scores)
            return bool(answer.reshape(-1)[0]) if isinstance(answer, torch.Tensor) else bool(answer)
        wide = None if scores is None else tuple(s.expand(self._batch_size, -1) for s in scores)
        answer = criterion(ids.expand(self._batch_size, -1), wide)
        return bool(answer[row]) if isinstance(answer, torch.Tensor) and answer.dim() else bool(answer)


def ends(tokens: torch.Tensor, room: torch.Tensor, eos: torch.Tensor) -> torch.Tensor:
    """The place of the token that each row would end with, by lengths and end-of-text ids.

    Args:
        tokens (`torch.LongTensor` of shape `(R, n)`): new tokens, and whatever lies behind them.
        room (`torch.LongTensor` of shape `(R,)`): how many a row may still get.
        eos (`torch.LongTensor` of shape `(E,)`): end-of-text ids.
    Returns:
        `torch.LongTensor` of shape `(R,)`: at least n where no token ends it.
    """
    places, goes_on = torch.arange(tokens.shape[1], device=tokens.device), (tokens[..., None] != eos).all(-1)
    return torch.minimum(places.expand_as(tokens).masked_fill(goes_on, tokens.shape[1]).amin(1), room - 1)
