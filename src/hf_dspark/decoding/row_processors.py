"""The user's logits processors and stopping criteria, applied row by row and token by token, exactly as a plain call would.

transformers writes both for a batch whose rows grow in step. Here rows grow by different amounts, so every rule is applied to one row
at one length.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation import logits_process as lp

from hf_dspark.decoding.state import State
from hf_dspark.errors import UnsupportedOptionError
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

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


class RowProcessors:
    """A `LogitsProcessorList` that applies to any row at any length.

    Args:
        processors (`LogitsProcessorList`): the prepared list that `generate` hands over, temperature and top-p among them.
        batch_size (`int`): rows of the caller's batch, for processors that are bound to a row.
    Raises:
        UnsupportedOptionError: for processors that cannot be honoured exactly.

    Attributes:
        in_order (`bool`): some may keep state, so they are to be called for committed tokens only, one at a time.
        for_drafts (`RowProcessors`): those that drafts may be shaped by.
    """

    def __init__(self, processors: Sequence[lp.LogitsProcessor], batch_size: int) -> None:
        for processor in processors:
            for kind, why in _REFUSED.items():
                if isinstance(processor, kind):
                    raise UnsupportedOptionError(
                        f"{type(processor).__name__} cannot be used with speculative decoding: {why}. Call generate "
                        "without `assistant_model`, or without the option that adds this processor."
                    )
        unknown = [p for p in processors if not _is_stateless(p)]
        for processor in unknown:
            name = type(processor).__name__
            warn_once(
                logger,
                f"{name} is not known to keep no state. In a batch of one it is called for committed tokens only, one at a time, as in a "
                f"plain call, and drafts are made without it; in larger batches it is refused if a call changes it. If it keeps no state, "
                f"say so and it is fast: {name}.stateless = True.",
            )
        self._processors = list(processors)
        self._batch_size = batch_size
        # Those of one row that may keep state see committed tokens only; those of several are watched.
        self.in_order = bool(unknown) and batch_size == 1
        self._watched = [] if self.in_order else unknown
        self.for_drafts = RowProcessors([p for p in processors if p not in unknown], 1) if self.in_order else self
        self._penalties: dict[tuple[int, int], lp.LogitsProcessor] = {}
        self.needs_ids = any(type(p) not in _NO_IDS for p in processors)
        self.any_vocabulary = all(type(p) in _ANY_VOCABULARY for p in processors)

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(self, scores: torch.Tensor, state: State, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Process N distributions.

        Args:
            scores (`torch.Tensor` of shape `(N, V)`): float32; may be overwritten.
            state (`State`): ids of the live rows, drafted tokens written.
            places (`list[tuple[int, int]]`): for each distribution its row's place and how many tokens past the committed ones it
                stands; only read where a processor looks at ids.
        Returns:
            `torch.Tensor` of shape `(N, V)`.
        """
        for processor in self._processors:
            scores = self._apply(processor, scores, state, places)
        return scores

    def allowed(self, tokens: torch.Tensor, vocab_size: int, state: State, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Which of N tokens the processors that go by token id do not rule out; top-k and the like are left out.

        Args:
            tokens (`torch.LongTensor` of shape `(N,)`): one for each place.
            vocab_size (`int`): V of the target.
            state (`State`), places (`list[tuple[int, int]]`): as in a call.
        Returns:
            `torch.BoolTensor` of shape `(N,)`.
        """
        scores = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.float32, device=tokens.device)
        for processor in self._processors:
            if type(processor) not in _ANY_VOCABULARY:
                scores = self._apply(processor, scores, state, places)
        return scores.gather(1, tokens[:, None])[:, 0] > float("-inf")

    def contents(self) -> tuple[Hashable, ...] | None:
        """All that decides what these processors do, to be compared; None where they look at ids or may keep a state."""
        if self.in_order or any(type(p) not in _NO_IDS for p in self._processors):
            return None
        return tuple((type(p), *(_hashable(value) for item in sorted(vars(p).items()) for value in item)) for p in self._processors)

    def _apply(self, processor: lp.LogitsProcessor, scores: torch.Tensor, state: State, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        if type(processor) in _NO_IDS:
            return processor(None, scores)
        return torch.cat([self._one(processor, scores[i : i + 1], state, *place) for i, place in enumerate(places)])

    def _one(self, processor: lp.LogitsProcessor, scores: torch.Tensor, state: State, place: int, extra: int) -> torch.Tensor:
        ids, row = state.prefix(place, extra), state.requests[place]
        if self._batch_size == 1 or type(processor) in _ANY_ROW:
            return processor(ids, scores)
        if type(processor) is lp.RepetitionPenaltyLogitsProcessor:
            return self._penalty_of_row(processor, row)(ids, scores)
        # Bound to its place in the batch, or unknown: show it the whole batch with this row's ids everywhere, read this
        # row's answer.
        before = _contents(processor) if processor in self._watched else None
        answer = processor(ids.expand(self._batch_size, -1), scores.repeat(self._batch_size, 1))[row : row + 1]
        if before is not None and _contents(processor) != before:
            name = type(processor).__name__
            raise UnsupportedOptionError(
                f"{name} changed as it was called, so it keeps a state, and cannot follow the rows of a batch of {self._batch_size}: they "
                f"do not advance in step here. Use batch size 1, or declare {name}.stateless = True if what changes is no more than a "
                "memory of answers."
            )
        return answer

    def _penalty_of_row(self, processor: lp.RepetitionPenaltyLogitsProcessor, row: int) -> lp.LogitsProcessor:
        """The repetition penalty as one row has it: on a padded batch it holds every row's padding, which it ignores."""
        padding = getattr(processor, "prompt_ignore_length", None)
        if not isinstance(padding, torch.Tensor):
            return processor
        key = (id(processor), row)
        if key not in self._penalties:
            self._penalties[key] = lp.RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=padding[row : row + 1])
        return self._penalties[key]


def _hashable(value: Any) -> Hashable:
    return (
        (str(value.device), *value.flatten().tolist())
        if isinstance(value, torch.Tensor)
        else value
        if isinstance(value, Hashable)
        else repr(value)
    )


def _is_stateless(processor: lp.LogitsProcessor) -> bool:
    """Whether a call depends on its arguments alone: transformers' own classes (what does not is refused), and what is declared so."""
    return type(processor).__module__.startswith("transformers.") or bool(getattr(processor, "stateless", False))


def _contents(value: Any, depth: int = 4) -> Any:
    """What a call may change, in a form to compare: values, contents of containers and of objects, identities and versions of tensors.

    What neither Python nor torch can look into (objects of extensions, closures) passes for unchanged; the warning says so of every class.
    """
    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if depth == 0 or isinstance(value, (int, float, str, bytes, type(None), type)):
        return value if depth else id(value)
    if isinstance(value, Mapping):
        return {key: _contents(one, depth - 1) for key, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_contents(one, depth - 1) for one in value]
    if isinstance(value, (set, frozenset)):
        return set(value)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    slots = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)}
    return id(value), _contents({**getattr(value, "__dict__", {}), **slots}, depth - 1)


class DraftProcessors:
    """The same processors on the drafter's logits of one round, so that p_d resembles p_t.

    Losslessness does not depend on it: any p_d serves, as long as tokens are drawn from it.

    Args:
        processors (`RowProcessors`): the user's.
        state (`State`): drafted tokens are written into it as they are drawn.
        places (`Sequence[int]`): the rows that are drafted for.
        drafter (`DSparkDrafter`): for its vocabulary.
        vocab_size (`int`): V of the target.
    """

    def __init__(self, processors: RowProcessors, state: State, places: Sequence[int], drafter: Any, vocab_size: int) -> None:
        processors = processors.for_drafts
        self._processors, self._state, self._drafter, self._vocab_size = processors, state, drafter, vocab_size
        self._places = list(places)
        self._index = torch.tensor(self._places).to(state.device, non_blocking=True) if processors.needs_ids else None

    def process(self, logits: torch.Tensor, k: int, drawn: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits `(R, V_draft)` at block position k (0-based) after the processors, given the tokens `(R,)` drawn before it."""
        if self._index is not None and k:
            self._state.write_draft(drawn[-1][:, None], self._index, k - 1)
        positions = [(place, k) for place in self._places]
        narrow = self._drafter.draft_token_ids
        if self._processors.any_vocabulary or narrow is None:
            processed = self._processors(logits.clone(), self._state, positions)
        else:
            processed = self._processors(self._drafter.widen(logits, fill=float("-inf")), self._state, positions)[:, narrow]
        # Processors may leave the drafter no token (a forced one outside its vocabulary): then its own distribution stands.
        return torch.where(torch.isfinite(processed).any(-1, keepdim=True), processed, logits)

    def allow(self, tokens: torch.Tensor, k: int) -> torch.Tensor | None:
        """Which copied tokens `(R,)` at block position k the processors do not rule out, bool `(R,)`; None where they rule out none."""
        if self._processors.any_vocabulary:
            return None
        return self._processors.allowed(tokens, self._vocab_size, self._state, [(place, k) for place in self._places])
