"""The user's logits processors for rows that grow by different amounts, exactly as a plain call applies them to rows that grow in step.

transformers' own are applied to all rows and positions at once; others to one row at one length.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation import logits_process as lp

from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding.batched_processors import ANY_VOCABULARY, BY_SCORES, Prefixes, Values, form_of
from hf_dspark.decoding.state import State
from hf_dspark.errors import UnsupportedOptionError
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

# Look at the row's ids one by one, and treat every row alike wherever it stands in the batch.
_ANY_ROW = (lp.WatermarkLogitsProcessor,)
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
        of_rows (`list[frozenset[str]]`): of each, the `values` that have an entry for each row.
        needs_ids (`bool`): some read the texts.
        any_vocabulary (`bool`): all serve a reduced vocabulary as well.
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
                f"say so: {name}.stateless = True.",
            )
        self._processors = list(processors)
        self._forms = [form_of(processor, batch_size) for processor in processors]
        self._batch_size = batch_size
        # Those of one row that may keep state see committed tokens only; those of several are watched.
        self.in_order = bool(unknown) and batch_size == 1
        self._watched = [] if self.in_order else unknown
        self.for_drafts = RowProcessors([p for p in processors if p not in unknown], 1) if self.in_order else self
        self.of_rows = [frozenset() if form is None else form.of_rows for form in self._forms]
        self.needs_ids = any(type(p) not in BY_SCORES for p in processors)
        self.any_vocabulary = all(type(p) in ANY_VOCABULARY for p in processors)
        self._values: dict[torch.device, list[dict[str, torch.Tensor]]] = {}

    def __bool__(self) -> bool:
        return bool(self._processors)

    def __call__(self, scores: torch.Tensor, prefixes: Prefixes, values: Sequence[Values]) -> torch.Tensor:
        """Process N distributions.

        Args:
            scores (`torch.Tensor` of shape `(N, V)`): float32.
            prefixes (`Prefixes`): the texts before them, drafted tokens written.
            values (`list[dict[str, torch.Tensor]]`): of `values`, for the rows of `prefixes`.
        Returns:
            `torch.Tensor` of shape `(N, V)`.
        """
        return self._apply(scores, prefixes, values, all_of_them=True)

    def allowed(self, tokens: torch.Tensor, vocab_size: int, prefixes: Prefixes, values: Sequence[Values]) -> torch.Tensor:
        """Which of N tokens the processors that go by token id do not rule out; top-k and the like are left out.

        Args:
            tokens (`torch.LongTensor` of shape `(N,)`): one for each distribution.
            vocab_size (`int`): V of the target.
            prefixes (`Prefixes`), values: as in a call.
        Returns:
            `torch.BoolTensor` of shape `(N,)`.
        """
        scores = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.float32, device=tokens.device)
        scores = self._apply(scores, prefixes, values, all_of_them=False)
        return scores.gather(1, tokens[:, None])[:, 0] > float("-inf")

    @property
    def sizes(self) -> tuple[Hashable, ...] | None:
        """All that decides, beside `values`, what these processors do; None where some ask the host, or are called one by one."""
        if self.in_order or not all(form is not None and form.traceable for form in self._forms):
            return None
        return tuple(form.kind for form in self._forms if form)

    def values(self, requests: Sequence[int], device: torch.device) -> list[dict[str, torch.Tensor]]:
        """What each processor reads beside scores and texts, for the rows with these numbers in the caller's batch."""
        if device not in self._values:
            self._values[device] = [
                {} if form is None else {name: value.to(device) for name, value in form.values.items()} for form in self._forms
            ]
        values = self._values[device]
        if not any(self.of_rows):
            return values
        index = torch.tensor(list(requests)).to(device, non_blocking=True)
        return [
            {name: value[index] if name in of_rows else value for name, value in own.items()}
            for of_rows, own in zip(self.of_rows, values, strict=True)
        ]

    def prefixes(self, state: State, places: Sequence[int], extra: Sequence[int], ahead: int = 0) -> Prefixes:
        """The texts of live rows, one for each place, as many tokens past the committed ones as `extra` says, with room for `ahead`
        more.
        """
        if not self.needs_ids:
            return Prefixes(state.ids, state.ids[:0, 0], state.ids[:0, 0])  # which nobody reads
        each = [(place, state.lengths[place] + more, state.requests[place]) for place, more in zip(places, extra, strict=True)]
        index = torch.from_numpy(np.array([(row, length) for row, length, _ in each]).T).to(state.device, non_blocking=True)
        width = max(length for _, length, _ in each) + ahead
        state.reserve(state.num_rows, width)
        return Prefixes(state.ids[: state.num_rows, :width], index[0], index[1], each if None in self._forms else ())

    def of_pass(self, state: State, layout: RowLayout) -> Prefixes:
        """The texts before the answers to all tokens of a pass over live rows, drafted tokens written."""
        if not self.needs_ids:
            return self.prefixes(state, (), ())
        if None in self._forms:
            counts = list(enumerate(layout.counts, layout.first_row))
            return self.prefixes(state, [row for row, n in counts for _ in range(n)], [j for _, n in counts for j in range(n)])
        ids = state.ids[: state.num_rows, : max(state.lengths) + layout.max_count - 1]
        return Prefixes(ids, layout.rows, state.lengths_on_device()[layout.rows] + layout.within)

    def _apply(self, scores: torch.Tensor, prefixes: Prefixes, values: Sequence[Values], *, all_of_them: bool) -> torch.Tensor:
        for processor, form, own in zip(self._processors, self._forms, values, strict=True):
            if not all_of_them and type(processor) in ANY_VOCABULARY:
                continue
            if form is not None:
                scores = form.apply(scores, prefixes, own)
            else:
                scores = torch.cat(
                    [self._one(processor, scores[i : i + 1].clone(), prefixes.ids, *each) for i, each in enumerate(prefixes.each)]
                )
        return scores

    def _one(
        self, processor: lp.LogitsProcessor, scores: torch.Tensor, ids: torch.Tensor, place: int, length: int, row: int
    ) -> torch.Tensor:
        text = ids[place : place + 1, :length]
        if self._batch_size == 1 or type(processor) in _ANY_ROW:
            return processor(text, scores)
        # Bound to its place in the batch, or unknown: show it the whole batch with this row's ids everywhere, read this
        # row's answer.
        before = _contents(processor) if processor in self._watched else None
        answer = processor(text.expand(self._batch_size, -1), scores.repeat(self._batch_size, 1))[row : row + 1]
        if before is not None and _contents(processor) != before:
            name = type(processor).__name__
            raise UnsupportedOptionError(
                f"{name} changed as it was called, so it keeps a state, and cannot follow the rows of a batch of {self._batch_size}: they "
                f"do not advance in step here. Use batch size 1, or declare {name}.stateless = True if what changes is no more than a "
                "memory of answers."
            )
        return answer


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
        prefixes (`Prefixes`): the committed texts of the R rows that are drafted for; drafted tokens are written behind them.
        values (`list[dict[str, torch.Tensor]]`): of the processors, for the rows of `prefixes`.
        drafter (`DSparkDrafter`): for its vocabulary.
        vocab_size (`int`): V of the target.
    """

    def __init__(self, processors: RowProcessors, prefixes: Prefixes, values: Sequence[Values], drafter: Any, vocab_size: int) -> None:
        self._processors, self._prefixes, self._values = processors, prefixes, values
        self._drafter, self._vocab_size = drafter, vocab_size

    @classmethod
    def of_rows(
        cls, processors: RowProcessors, state: State, places: Sequence[int] | None, drafter: Any, vocab_size: int, length: int
    ) -> DraftProcessors | None:
        """For the live rows at these places, all where None, and `length` tokens; None without processors that serve drafts."""
        if not (processors := processors.for_drafts):
            return None
        places = range(state.num_rows) if places is None else places
        prefixes = processors.prefixes(state, places, [0] * len(places), ahead=length)
        return cls(processors, prefixes, processors.values(state.requests, state.device), drafter, vocab_size)

    def process(self, logits: torch.Tensor, drawn: torch.Tensor | None) -> torch.Tensor:
        """Logits `(R, V_draft)` of the next block position after the processors, given the tokens `(R,)` drawn at the one before it."""
        if drawn is not None and self._processors.needs_ids:
            self._prefixes = self._prefixes.behind(drawn)
        narrow = self._drafter.draft_token_ids
        if self._processors.any_vocabulary or narrow is None:
            processed = self._processors(logits, self._prefixes, self._values)
        else:
            wide = self._drafter.widen(logits, fill=float("-inf"))
            processed = self._processors(wide, self._prefixes, self._values)[:, narrow]
        # Processors may leave the drafter no token (a forced one outside its vocabulary): then its own distribution stands.
        return torch.where(torch.isfinite(processed.amax(-1, keepdim=True)), processed, logits)

    def allow(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Which copied tokens `(R,)` at this block position the processors do not rule out, bool `(R,)`; None where they rule out none."""
        if self._processors.any_vocabulary:
            return None
        return self._processors.allowed(tokens.clamp(min=0), self._vocab_size, self._prefixes, self._values)
