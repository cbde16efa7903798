"""The drafter as a `CandidateGenerator`, for transformers' own assisted loop at batch size 1. Knows that loop's
protocol; the target is run, cached and verified by transformers.

This door serves targets that ragged verification refuses but whose cache rolls back, and shows that the drafter is an
ordinary candidate generator. The loop of this package is faster and takes any batch.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from hf_dspark.budgets.budget import Budget, Drafts, FinishedRound, LiveRows
from hf_dspark.budgets.named import make_budget
from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.decoding.draft import draft_block
from hf_dspark.decoding.ngram_copy import Copies, Texts, weights_in_force
from hf_dspark.decoding.profiler import CostProfile
from hf_dspark.decoding.row_processors import RowProcessors, Sequences
from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.targets.target import Taps
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)


class DSparkCandidateGenerator(CandidateGenerator):
    """Proposes blocks of the drafter to transformers' assisted loop.

    Args:
        target (`PreTrainedModel`): the model that the loop runs.
        drafter (`DSparkDrafter`): bound to it here if it is not yet.
        input_ids (`torch.LongTensor` of shape `(1, n)`): the prompt.
        logits_processor (`LogitsProcessorList`, *optional*): applied to the draft too, so that p_d resembles p_t.
        do_sample (`bool`): draw the draft; arg-max otherwise.
        max_length (`int`): longest sequence, prompt included.
        budget (`str` or `Budget`, *optional*): `drafter.budget` where None.
        block_size (`int`, *optional*): gamma, the drafter's where None.
        max_verify_tokens (`int`, *optional*): most tokens of one pass, the anchor included.
        copying (`bool`): draft what the text repeats too, where the checkpoint has weights for that.
    Raises:
        ValueError: for more than one row.
    """

    requires_model_outputs = True
    # Read by the loop, which adds them to the target's inputs. Taps are caught by hooks, so nothing is asked for.
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        target: Any,
        drafter: Any,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any = (),
        do_sample: bool = False,
        max_length: int,
        budget: str | Budget | None = None,
        block_size: int | None = None,
        max_verify_tokens: int | None = None,
        copying: bool = True,
    ) -> None:
        if input_ids.shape[0] != 1:
            raise ValueError(f"transformers' assisted loop takes one row; got {input_ids.shape[0]}. Use target.generate for batches.")
        self.drafter = drafter.bind(target)
        self.do_sample = do_sample
        self.max_length = max_length
        chosen = make_budget(budget if budget is not None else drafter.budget, max_verify_tokens)
        self.budget = self._started(chosen, target, do_sample, max_verify_tokens)
        self.processors = RowProcessors(logits_processor, 1)
        self.taps = Taps(target, drafter.config.target_layer_ids)
        self.block_size = drafter.config.block_size if block_size is None else block_size
        self.copy_weights = weights_in_force(drafter.config, copying)
        self.given = input_ids.shape[1]
        self.target_vocab_size = target.config.get_text_config(decoder=True).vocab_size
        self.cache = RowCache()
        self.cache.add_rows(1)
        self._round: FinishedRound | None = None
        self._began = 0.0

    def _started(self, budget: Budget, target: Any, sample: bool, cap: int | None) -> Budget:
        try:
            return budget.start(lambda: CostProfile.cached(target, self.drafter, rows=1, sample=sample).costs(sample))
        except UnsupportedTargetError as refused:
            warn_once(logger, f"Budget {budget!r} cannot measure rounds of this target, so whole blocks are verified ({refused})")
            return make_budget("full", cap)

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drafted continuation of `input_ids`, `(1, n + l)`, and its processed logits `(1, l, V)`; nothing before the
        first target pass."""
        self._began, self._round = time.perf_counter(), None
        committed = input_ids.shape[1] - 1
        room = self.max_length - input_ids.shape[1] - 1
        if kwargs.get("is_first_iteration") or room < 1:
            return input_ids, None
        known = self.cache.lengths[0]
        if committed > known:
            # The loop keeps what it accepted; later tokens of its last pass were rejected, and their taps with them.
            taps = self.taps.take()[0, : committed - known]
            self.drafter.extend_context(taps, RowLayout([known], [committed - known], input_ids.device), self.cache)
            self.cache.lengths[0] = committed
        live = LiveRows((0,), self.block_size, (min(room, self.block_size),), committed)
        proposal = self.budget.propose(live)
        if proposal.length == 0:
            self._round = FinishedRound((0,), (0,), (0,), (0,), (0,))
            return input_ids, None
        config = self.drafter.config
        sequences = Sequences(input_ids, self.max_length, self.block_size + 1)
        kept: list[torch.Tensor] = []

        def process(logits: torch.Tensor, k: int, tokens: list[torch.Tensor]) -> torch.Tensor:
            wide = self.drafter.widen(logits, fill=float("-inf")) if config.draft_vocab_size else logits.clone()
            if k:
                sequences.pencil_in(0, tokens[-1], k - 1)
            processed = self.processors(wide, sequences, [(0, k)])
            narrow = processed[:, self.drafter.draft_token_ids] if config.draft_vocab_size else processed
            if not torch.isfinite(narrow).any():
                processed, narrow = wide, logits
            # Only draft ids can be drawn, so only they may carry probability.
            kept.append(self.drafter.widen(narrow, fill=float("-inf")) if config.draft_vocab_size else narrow)
            return narrow

        def allow(tokens: torch.Tensor, k: int) -> torch.Tensor:
            return self.processors.allowed(tokens, self.target_vocab_size, sequences, [(0, k)])

        block = draft_block(
            self.drafter,
            input_ids[:, -1],
            [committed],
            self.cache,
            length=proposal.length,
            sample=self.do_sample,
            process=process,
            with_confidence=self.budget.needs_confidence,
            copies=self._copies(input_ids, proposal.length),
            allow=allow if self.processors and not self.processors.any_vocabulary else None,
        )
        confidence = None if block.confidence is None else block.confidence.cpu()
        length = min(self.budget.plan(Drafts((min(proposal.length, room),), confidence, live))[0], room)
        self._round = FinishedRound((0,), (proposal.length,), (length,), (0,), (length,), confidence)
        if length == 0:
            return input_ids, None
        logits = torch.stack(kept[:length], dim=1)
        if block.copied is not None and self.do_sample:
            logits = block.copied.until(length).mixture(logits.softmax(-1)).log()
        return torch.cat([input_ids, block.tokens[:, :length]], dim=1), logits

    def _copies(self, input_ids: torch.Tensor, length: int) -> Copies | None:
        if self.copy_weights is None:
            return None
        texts = Texts(input_ids.device)
        texts.join([input_ids[0]], [self.given])
        return Copies(texts, None, self.copy_weights, length)

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Tell the budget how the round ended."""
        if self._round is not None:
            accepted = min(int(num_matches), self._round.verified[0])  # The device has been waited for.
            self.budget.learn(replace(self._round, accepted=(accepted,), seconds=time.perf_counter() - self._began))


_FACTORY: ContextVar[Callable[..., DSparkCandidateGenerator] | None] = ContextVar("hf_dspark_candidate_factory", default=None)
_LOCK = threading.Lock()
_USERS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_REPLACED: dict[Any, tuple[bool, Any]] = {}


@contextmanager
def stock_loop(
    target: Any,
    drafter: Any,
    budget: str | Budget | None = None,
    block_size: int | None = None,
    max_verify_tokens: int | None = None,
    copying: bool = True,
) -> Iterator[None]:
    """While open, `target._get_candidate_generator` proposes this drafter's blocks in this thread, and their taps are
    caught.

    Call transformers' original `_assisted_decoding` inside; the target is as it was afterwards. May be entered from
    several threads.
    """
    taps = Taps(target, drafter.config.target_layer_ids)

    def candidates(generation_config: Any, input_ids: torch.LongTensor, logits_processor: Any = (), **_: Any) -> DSparkCandidateGenerator:
        """What transformers asks for its candidates, with what `generate` has prepared."""
        made = DSparkCandidateGenerator(
            target,
            drafter,
            input_ids,
            logits_processor=logits_processor,
            do_sample=generation_config.do_sample,
            max_length=generation_config.max_length,
            budget=budget,
            block_size=block_size,
            max_verify_tokens=max_verify_tokens,
            copying=copying,
        )
        made.taps = taps
        return made

    token = _FACTORY.set(candidates)
    try:
        with _dispatching(target), taps.open():
            yield
    finally:
        _FACTORY.reset(token)


@contextmanager
def _dispatching(target: Any) -> Iterator[None]:
    """Let `target` ask the factory of the calling thread for candidates; threads without one get transformers' own."""
    with _LOCK:
        _USERS[target] = _USERS.get(target, 0) + 1
        if _USERS[target] == 1:
            own = target._get_candidate_generator
            _REPLACED[target] = "_get_candidate_generator" in vars(target), own
            target._get_candidate_generator = lambda *args, **kwargs: (_FACTORY.get() or own)(*args, **kwargs)
    try:
        yield
    finally:
        with _LOCK:
            _USERS[target] -= 1
            if _USERS[target] == 0:
                set_by_user, own = _REPLACED.pop(target)
                if set_by_user:
                    target._get_candidate_generator = own
                else:
                    del target._get_candidate_generator
