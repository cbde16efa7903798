"""Holds a number of requests in flight: as one ends the next joins between rounds.

Each request has a number of its own all its life, so budgets and calibration never take a newcomer for the row whose place it got.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria

from hf_dspark.budgets.budget import Budget
from hf_dspark.decoding.loop import DecodingLoop, Rules
from hf_dspark.decoding.options import Options
from hf_dspark.decoding.row_processors import RowProcessors
from hf_dspark.decoding.row_stopping import RowStopping
from hf_dspark.decoding.state import State
from hf_dspark.decoding.statistics import DecodingStats
from hf_dspark.evaluation.speed import synchronize
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.self_test import check_length
from hf_dspark.targets.target import Target
from hf_dspark.utils.graphs import Graphs


@dataclass(frozen=True)
class Served:
    """What came out in one run of a `Server`."""

    tokens: list[list[int]]  # new ones of each request so far, in the order they were given; empty for those that never began
    emitted: int  # new tokens of all requests while the clock ran
    seconds: float  # on the clock
    stats: DecodingStats  # while the clock ran, of the requests that were live then


class Server:
    """Requests, some of them in flight, and the loop that answers them; runs for a while at a time.

    Args:
        model (`PreTrainedModel`), drafter (`DSparkDrafter`, *optional*): a pair; without a drafter it decodes plainly.
        prompts (`list[list[int]]`): token ids, in the order in which requests join.
        concurrency (`int`): rows in flight, as long as requests wait.
        max_new_tokens (`int` or `list[int]`): of each request.
        budget (`Budget`): started.
        end_ids (`list[int]`): that end a request; the one met is kept.
        temperature, top_p, seed: as in `generate`; temperature 0 is greedy.
        graphs (`Graphs`, *optional*): of the pair, to run rounds with.
        options: `round_callback`, `copying` and `verification`, as in `Options`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: DSparkDrafter | None,
        prompts: Sequence[Sequence[int]],
        *,
        concurrency: int,
        max_new_tokens: int | Sequence[int],
        budget: Budget,
        end_ids: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        graphs: Graphs | None = None,
        **options: Any,
    ) -> None:
        self.count = len(prompts)
        new = [max_new_tokens] * self.count if isinstance(max_new_tokens, int) else list(max_new_tokens)
        limits = [len(prompt) + n for prompt, n in zip(prompts, new, strict=True)]
        check_length(model, max(limits))
        target = Target(model, [] if drafter is None else drafter.bind(model).config.target_layer_ids)
        warpers: list[LogitsProcessor] = [] if temperature in (0.0, 1.0) else [TemperatureLogitsWarper(temperature)]
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        criteria = [EosTokenCriteria(list(end_ids))] if end_ids else []
        gamma, generator = 1 if drafter is None else drafter.config.block_size, torch.Generator(device=target.device).manual_seed(seed)
        how = Options(block_size=gamma, generator=generator, sample=temperature > 0, **options)
        rules = Rules(RowProcessors(warpers, self.count), RowStopping(criteria, self.count, limits))
        state = State(target.device, limit=max(limits) + gamma + 2)
        self.loop = DecodingLoop(target, drafter, budget, how, rules, state, graphs, single_row=concurrency == 1)
        self.concurrency = concurrency
        self._ids = [torch.tensor(list(prompt), device=target.device) for prompt in prompts]
        self._waiting = 0
        self._clock = 0.0
        self._since: dict[int, float] = {}  # of the requests in flight, on the clock
        self._spent: dict[int, float] = {}  # seconds on the clock of those that are answered
        self._counted: Counter[int] = Counter()  # new tokens of each request while the clock ran
        self._left_with = 0  # new tokens of the requests that are answered

    @torch.inference_mode()
    def run(self, *, steady: bool = False, seconds: float | None = None, tokens: int | None = None) -> Served:
        """Go on with the requests, until all are answered where nothing else is said.

        Args:
            steady (`bool`): let the first requests join before the clock starts, and stop it when none is left to take a place that is
                free: `concurrency` rows are live all the time.
            seconds (`float`, *optional*): end when so much time has passed; all is as it was when `run` is called again.
            tokens (`int`, *optional*): end when so many new tokens have come out since this server was made.
        Returns:
            `Served`: of this time.
        """
        loop = self.loop
        with loop.target.open():
            if steady and not self._waiting:
                self._join()
            loop.start_clock()
            before, start = self._clock, time.perf_counter()
            while self._waiting < self.count or loop.state.num_rows:
                self._clock = before + time.perf_counter() - start
                self._join()
                if loop.state.num_rows:
                    loop.round()
                self._clock = before + time.perf_counter() - start
                self._leave()
                out_of_time = seconds is not None and self._clock - before >= seconds
                if out_of_time or (tokens is not None and self.emitted >= tokens) or (steady and self.exhausted):
                    break
            synchronize(loop.target.device)
            spent = time.perf_counter() - start  # before the watch is read, which takes time on a device
        loop.stats.set_times(loop.watch.read() | {"total": spent})
        self._clock = before + spent
        self._counted.update({request: row.generated for request, row in loop.stats.by_request.items()})
        answers = [self._answer(request) for request in range(self.count)]
        return Served(answers, sum(row.generated for row in loop.stats.rows), spent, loop.stats)

    def _answer(self, request: int) -> list[int]:
        """New tokens of a request so far."""
        state = self.loop.state
        if request in self.loop.finished:
            return self.loop.finished[request].new_tokens
        if request not in state.requests:
            return []
        place = state.requests.index(request)
        return state.ids[place, state.prompt_ends[place] : state.lengths[place]].tolist()

    @property
    def exhausted(self) -> bool:
        """Whether a place is free that no request is left to take."""
        return self._waiting == self.count and self.loop.state.num_rows < self.concurrency

    @property
    def emitted(self) -> int:
        """New tokens of all requests so far."""
        state = self.loop.state
        return self._left_with + sum(state.lengths) - sum(state.prompt_ends)

    def speeds(self, fewest: int = 8) -> list[float]:
        """Tokens a second of each request that has got `fewest` tokens on the clock, as its user sees them."""
        spent = self._spent | {request: self._clock - since for request, since in self._since.items()}
        return [self._counted[request] / seconds for request, seconds in spent.items() if self._counted[request] >= fewest]

    def _join(self) -> None:
        loop = self.loop
        while self._waiting < self.count and loop.state.num_rows < self.concurrency:  # again where one ends with its first token
            more = range(self._waiting, min(self._waiting + self.concurrency - loop.state.num_rows, self.count))
            self._since.update(dict.fromkeys(more, self._clock))
            loop.join(more, [self._ids[request] for request in more])
            self._waiting = more.stop

    def _leave(self) -> None:
        for request in self._since.keys() - set(self.loop.state.requests):
            self._spent[request] = self._clock - self._since.pop(request)
            row = self.loop.finished[request]
            self._left_with += len(row.ids) - row.prompt_end


def serve(model: PreTrainedModel, drafter: DSparkDrafter | None, prompts: Sequence[Sequence[int]], **server: Any) -> Served:
    """Answer all requests in one run of a `Server`, whose arguments these are."""
    return Server(model, drafter, prompts, **server).run()
