"""The user's logits processors and stopping criteria, applied row by row and token by token, exactly as a plain call
would.

transformers writes both for a batch whose rows grow in step. Here rows grow by different amounts, so every rule is
asked about one row at one length. Knows transformers' processors and criteria; knows no model, no drafter and no cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

from hf_dspark.errors import UnsupportedOptionError

# Look at one distribution alone, whatever its vocabulary: also fit for a reduced draft vocabulary.
_ANY_VOCABULARY = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.LogitNormalization,
    lp.InfNanRemoveLogitsProcessor,
)
# Look at one distribution alone, by token id.
_NO_IDS = (*_ANY_VOCABULARY, lp.SuppressTokensLogitsProcessor)
# Look at the row's ids, and treat every row alike wherever it stands in the batch.
_ANY_ROW = (
    lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor,
    lp.NoRepeatNGramLogitsProcessor,
    lp.SequenceBiasLogitsProcessor,
    lp.NoBadWordsLogitsProcessor,
    lp.ForcedBOSTokenLogitsProcessor,
    lp.ForcedEOSTokenLogitsProcessor,
    lp.SuppressTokensAtBeginLogitsProcessor,
    lp.ExponentialDecayLengthPenalty,
    lp.WatermarkLogitsProcessor,
)
_REFUSED = {
    lp.UnbatchedClassifierFreeGuidanceLogitsProcessor: "it runs the target itself and keeps a cache",
    lp.SynthIDTextWatermarkLogitsProcessor: "it keeps a state, and drafted tokens may be taken back",
    lp.ClassifierFreeGuidanceLogitsProcessor: "it mixes rows, which do not advance in step here",
}


class Sequences:
    """Token ids of all rows as the caller sees them: left padding, prompt, generated tokens, room for more.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, n)`): prompts, left-padded.
        max_length (`int`): longest sequence, prompt included.
        scratch (`int`): room behind it for drafted tokens.
    """

    def __init__(self, input_ids: torch.Tensor, max_length: int, scratch: int) -> None:
        batch, prompt = input_ids.shape
        self.prompt_length = prompt
        self.ids = input_ids.new_zeros(batch, min(max_length, prompt + 512) + scratch)
        self.ids[:, :prompt] = input_ids
        self.lengths = [prompt] * batch

    def append(self, row: int, tokens: torch.Tensor) -> None:
        """Commit `tokens` (`(k,)`) to `row`."""
        end = self.lengths[row] + len(tokens)
        self._grow(end)
        self.ids[row, self.lengths[row] : end] = tokens
        self.lengths[row] = end

    def pencil_in(self, row: int, tokens: torch.Tensor, offset: int = 0) -> None:
        """Write `tokens` (`(k,)`) behind the committed ones, `offset` further on, without committing them."""
        begin = self.lengths[row] + offset
        self._grow(begin + len(tokens))
        self.ids[row, begin : begin + len(tokens)] = tokens

    def _grow(self, length: int) -> None:
        if length > self.ids.shape[1]:
            wider = self.ids.new_zeros(self.ids.shape[0], 2 * length)
            wider[:, : self.ids.shape[1]] = self.ids
            self.ids = wider

    def prefix(self, row: int, extra: int = 0) -> torch.Tensor:
        """Ids of `row` up to `extra` tokens past the committed ones, shape `(1, length)`; a view."""
        return self.ids[row : row + 1, : self.lengths[row] + extra]


class RowProcessors:
    """A `LogitsProcessorList` that can be asked about one row at one length.

    Args:
        processors (`LogitsProcessorList`): the prepared list that `generate` hands over, temperature and top-p among
            them.
        batch_size (`int`): rows of the caller's batch, for processors that are bound to a row.
    Raises:
        UnsupportedOptionError: for processors that cannot be honoured exactly.
    """

    def __init__(self, processors: Sequence[lp.LogitsProcessor], batch_size: int) -> None:
        for processor in processors:
            for kind, why in _REFUSED.items():
                if isinstance(processor, kind):
                    raise UnsupportedOptionError(
                        f"{type(processor).__name__} cannot be used with speculative decoding: {why}. Call generate "
                        "without `assistant_model`, or without the option that adds this processor."
                    )
        self._processors = list(processors)
        self._batch_size = batch_size
        self._penalties: dict[tuple[int, int], lp.LogitsProcessor] = {}
        self.needs_ids = any(type(p) not in _NO_IDS for p in processors)
        self.any_vocabulary = all(type(p) in _ANY_VOCABULARY for p in processors)

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(self, scores: torch.Tensor, sequences: Sequences, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Process N distributions.

        Args:
            scores (`torch.Tensor` of shape `(N, V)`): float32; may be overwritten.
            sequences (`Sequences`): ids of all rows, drafted tokens pencilled in.
            places (`list[tuple[int, int]]`): for each distribution its row in the caller's batch and how many tokens
                past the committed ones it stands; only read where a processor looks at ids.
        Returns:
            `torch.Tensor` of shape `(N, V)`.
        """
        for processor in self._processors:
            scores = self._apply(processor, scores, sequences, places)
        return scores

    def allowed(self, tokens: torch.Tensor, vocab_size: int, sequences: Sequences, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Which of N tokens the processors that go by token id do not rule out; what top-k and the like would leave is not asked.

        Args:
            tokens (`torch.LongTensor` of shape `(N,)`): one for each place.
            vocab_size (`int`): V of the target.
            sequences (`Sequences`), places (`list[tuple[int, int]]`): as in a call.
        Returns:
            `torch.BoolTensor` of shape `(N,)`.
        """
        scores = torch.zeros(len(places), vocab_size, dtype=torch.float32, device=tokens.device)
        for processor in self._processors:
            if type(processor) not in _ANY_VOCABULARY:
                scores = self._apply(processor, scores, sequences, places)
        return scores.gather(1, tokens[:, None])[:, 0] > float("-inf")

    def _apply(
        self, processor: lp.LogitsProcessor, scores: torch.Tensor, sequences: Sequences, places: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        if type(processor) in _NO_IDS:
            return processor(None, scores)
        return torch.cat([self._one(processor, scores[i : i + 1], sequences, *place) for i, place in enumerate(places)])

    def _one(self, processor: lp.LogitsProcessor, scores: torch.Tensor, sequences: Sequences, row: int, extra: int) -> torch.Tensor:
        ids = sequences.prefix(row, extra)
        if self._batch_size == 1 or type(processor) in _ANY_ROW:
            return processor(ids, scores)
        if type(processor) is lp.RepetitionPenaltyLogitsProcessor:
            return self._penalty_of_row(processor, row)(ids, scores)
        # Bound to its place in the batch, or unknown: show it the whole batch with this row's ids everywhere, read this
        # row's answer.
        return processor(ids.expand(self._batch_size, -1), scores.repeat(self._batch_size, 1))[row : row + 1]

    def _penalty_of_row(self, processor: lp.RepetitionPenaltyLogitsProcessor, row: int) -> lp.LogitsProcessor:
        """The repetition penalty as one row has it: on a padded batch it holds every row's padding, which it ignores."""
        padding = getattr(processor, "prompt_ignore_length", None)
        if not isinstance(padding, torch.Tensor):
            return processor
        key = (id(processor), row)
        if key not in self._penalties:
            self._penalties[key] = lp.RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=padding[row : row + 1])
        return self._penalties[key]


class RowStopping:
    """Stopping criteria that can be asked about one row after each of its tokens.

    Args:
        criteria (`StoppingCriteriaList`): the prepared list that `generate` hands over.
        batch_size (`int`): rows of the caller's batch.
        limits (`list[int]`, *optional*): longest sequence of each row, where rows differ; on top of the criteria.
    """

    def __init__(self, criteria: Sequence[sc.StoppingCriteria], batch_size: int, limits: Sequence[int] | None = None) -> None:
        self._batch_size = batch_size
        self._limits = limits
        self.eos_ids: set[int] = set()
        self.max_length: int | None = None
        self._others: list[sc.StoppingCriteria] = []
        for criterion in criteria:
            if type(criterion) is sc.EosTokenCriteria:
                self.eos_ids.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is sc.MaxLengthCriteria:
                self.max_length = min(criterion.max_length, self.max_length or criterion.max_length)
            else:
                self._others.append(criterion)

    def limit(self, row: int) -> int | None:
        """Longest sequence of `row`, prompt and padding included; None where there is no end to it."""
        own = None if self._limits is None else self._limits[row]
        return self.max_length if own is None else own if self.max_length is None else min(own, self.max_length)

    @property
    def asks_others(self) -> bool:
        """Whether there are criteria beyond lengths and end-of-text ids, which read the row's ids and scores."""
        return bool(self._others)

    def kept(self, tokens: list[int], sequences: Sequences, row: int, scores: Sequence[torch.Tensor] | None) -> tuple[int, bool]:
        """How many of the new `tokens` of `row` remain, and whether the row ends with them.

        Where `asks_others`, the tokens must be pencilled in. A criterion sees the ids with left padding and one more token each time, as in
        a plain call.

        Args:
            tokens (`list[int]`): new tokens of the row.
            sequences (`Sequences`): ids of all rows.
            row (`int`): number in the caller's batch.
            scores (`list[torch.Tensor]` of shape `(V,)`, *optional*): the distribution behind each generated token of
                the row, the new ones' last; given where the caller asked for scores.
        """
        limit = self.limit(row)
        for index, token in enumerate(tokens):
            length = sequences.lengths[row] + index + 1
            ended = token in self.eos_ids or (limit is not None and length >= limit)
            # Every criterion is asked at every token: some keep count.
            if self._others:
                ids = sequences.prefix(row, index + 1)
                seen = None if scores is None else tuple(s[None] for s in scores[: len(scores) - len(tokens) + index + 1])
                for criterion in self._others:
                    ended |= self._asks(criterion, ids, row, seen)
            if ended:
                return index + 1, True
        return len(tokens), False

    def _asks(self, criterion: sc.StoppingCriteria, ids: torch.Tensor, row: int, scores: tuple[torch.Tensor, ...] | None) -> bool:
        if self._batch_size == 1 or type(criterion) in (sc.StopStringCriteria, sc.MaxTimeCriteria):
            answer = criterion(ids, scores)
            return bool(answer.reshape(-1)[0]) if isinstance(answer, torch.Tensor) else bool(answer)
        answer = criterion(
            ids.expand(self._batch_size, -1),
            None if scores is None else tuple(s.expand(self._batch_size, -1) for s in scores),
        )
        return bool(answer[row]) if isinstance(answer, torch.Tensor) and answer.dim() else bool(answer)
