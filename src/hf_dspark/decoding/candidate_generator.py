"""The drafter as a `CandidateGenerator`, for transformers' own assisted loop at batch size 1: the target is run, cached and verified by
transformers.

It serves targets that ragged verification refuses but whose cache rolls back. The loop of this package is faster and takes any batch.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from hf_dspark.budgets.budget import Drafts, FinishedRound, LiveRows
from hf_dspark.budgets.named import make_budget
from hf_dspark.cache.layout import RowLayout
from hf_dspark.configuration_dspark import check_block_size
from hf_dspark.decoding.draft import draft_block
from hf_dspark.decoding.ngram_copy import Copies, copy_weights_of
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.profiler import started
from hf_dspark.decoding.row_processors import DraftProcessors, RowProcessors
from hf_dspark.decoding.state import State
from hf_dspark.errors import UnsupportedOptionError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.taps import Taps
from hf_dspark.targets.uncompiled import uncompiled


class DSparkCandidateGenerator(CandidateGenerator):
    """Proposes blocks of the drafter to transformers' assisted loop.

    Args:
        target (`PreTrainedModel`): the model that the loop runs.
        drafter (`DSparkDrafter`): bound to it here if it is not yet.
        input_ids (`torch.LongTensor` of shape `(1, n)`): the prompt.
        logits_processor (`LogitsProcessorList`, *optional*): applied to the draft too, so that p_d resembles p_t.
        do_sample (`bool`): draw the draft; arg-max otherwise.
        max_length (`int`): longest sequence, prompt included.
        options (`Options`, *optional*): budget, block size, cap and n-gram copying; the rest is the loop's own.
    Raises:
        ValueError: for more than one row, and for options that this loop cannot honour.
    """

    requires_model_outputs = True
    # Read by the loop, which adds them to the target's inputs. Taps are caught by hooks, so no output is requested.
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: DSparkDrafter,
        input_ids: torch.Tensor,
        *,
        logits_processor: Sequence[LogitsProcessor] = (),
        do_sample: bool = False,
        max_length: int,
        options: Options | None = None,
    ) -> None:
        if input_ids.shape[0] != 1:
            raise ValueError(f"transformers' assisted loop takes one row; got {input_ids.shape[0]}. Use target.generate for batches.")
        options = options or Options()
        if options.generator is not None or options.round_callback is not None:
            raise ValueError("transformers' assisted loop takes no generator and reports no rounds; leave both out of the options.")
        self.drafter = drafter.bind(target)
        self.do_sample = do_sample
        self.max_length = max_length
        budget = make_budget(drafter.budget if options.budget is None else options.budget, options.max_verify_tokens)
        self.budget = started(budget, target, drafter, do_sample)
        self.processors = RowProcessors(logits_processor, 1)
        if self.processors.in_order:
            raise UnsupportedOptionError(
                "This target is decoded by transformers' assisted loop, which also calls logits processors for tokens that it rejects, "
                "and one of them is not known to keep no state (its name is in the warning). Declare it: `stateless = True` on its class."
            )
        self.taps = Taps(target, drafter.config.target_layer_ids)
        self.block_size = check_block_size(options.block_size, drafter.config.block_size)
        self.copy_weights = copy_weights_of(drafter.config, options.copying)
        self.target_vocab_size = target.config.get_text_config(decoder=True).vocab_size
        self.state = State(input_ids.device)
        self.state.add_rows([0], list(input_ids))
        self._known = 0  # tokens in the drafter's cache
        self._round: FinishedRound | None = None
        self._began = 0.0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Propose a continuation.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, n)`): the text so far.
            kwargs: `is_first_iteration`, before the target's first pass, when nothing is proposed.
        Returns:
            ids `(1, n + l)`, and log p_d of the l new ones `(1, l, V)` where they were drawn.
        """
        self._began, self._round = time.perf_counter(), None
        room = self.max_length - input_ids.shape[1] - 1
        if kwargs.get("is_first_iteration") or room < 1:
            return input_ids, None
        self._follow(input_ids)
        live = LiveRows((0,), self.block_size, (min(room, self.block_size),), self._known)
        proposal = self.budget.propose(live)
        if proposal.length == 0:
            self._round = FinishedRound((0,), (0,), (0,), (0,), (0,))
            return input_ids, None
        block = draft_block(
            self.drafter,
            input_ids[:, -1],
            [self._known],
            self.state.drafter_cache,
            length=proposal.length,
            sample=self.do_sample,
            processors=DraftProcessors.of_rows(self.processors, self.state, None, self.drafter, self.target_vocab_size, proposal.length),
            with_confidence=self.budget.needs_confidence,
            copies=None if self.copy_weights is None else Copies.of_rows(self.state, None, self.copy_weights, proposal.length),
        )
        confidence = None if block.confidence is None else block.confidence.cpu().clone()
        length = min(self.budget.plan(Drafts((min(proposal.length, room),), confidence, live))[0], room)
        self._round = FinishedRound((0,), (proposal.length,), (length,), (0,), (length,), confidence)
        if length == 0:
            return input_ids, None
        block = block.truncate(length)
        ids = torch.cat([input_ids, block.tokens], dim=1)
        if block.probs is None:
            return ids, None
        p_d = self.drafter.widen(block.p_d(slice(None), slice(None)))
        return ids, (p_d if block.copied is None else block.copied.mixture(p_d)).log()

    def _follow(self, input_ids: torch.Tensor) -> None:
        """Take in what the loop has committed since; later tokens of its last pass were rejected, and their hidden states with them."""
        committed, state = input_ids.shape[1] - 1, self.state
        new = input_ids[:, state.lengths[0] :]
        state.commit(new, [new.shape[1]], input_ids[:, -1])
        if committed > self._known:
            hidden = self.taps.take()[0, : committed - self._known]
            layout = RowLayout([self._known], [committed - self._known], input_ids.device)
            self.drafter.extend_context(hidden, layout, state.drafter_cache)
            self._known = committed

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
def stock_loop(target: PreTrainedModel, drafter: DSparkDrafter, options: Options | None = None) -> Iterator[None]:
    """While open, `target._get_candidate_generator` proposes this drafter's blocks in this thread, and their taps are caught.

    Call transformers' original `_assisted_decoding` inside; the target is as it was afterwards. May be entered from several threads.
    """
    taps = Taps(target, drafter.config.target_layer_ids)

    def candidates(generation_config: Any, input_ids: torch.LongTensor, logits_processor: Any = (), **_: Any) -> DSparkCandidateGenerator:
        made = DSparkCandidateGenerator(
            target,
            drafter,
            input_ids,
            logits_processor=logits_processor,
            do_sample=generation_config.do_sample,
            max_length=generation_config.max_length,
            options=options,
        )
        made.taps = taps
        return made

    token = _FACTORY.set(candidates)
    try:
        with uncompiled(target), drafter.decoding_for(target), _dispatching(target), taps.open():
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
