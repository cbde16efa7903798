"""Keeps a number of requests in flight: as one ends the next joins between rounds. Knows the decoding loop; knows no benchmark.

Each request has a number of its own all its life, so budgets and calibration never take a newcomer for the row whose place it got.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria

from hf_dspark.budgets.budget import Budget
from hf_dspark.decoding.loop import DecodingLoop, RoundListener
from hf_dspark.decoding.row_processors import RowProcessors, RowStopping, Sequences
from hf_dspark.decoding.statistics import DecodingStats, RowStats, Stopwatch
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.targets.target import Target, check_length


@dataclass(frozen=True)
class Served:
    """What came out, and when.

    Attributes:
        tokens (`list[list[int]]`): new tokens of each request, in the order they were given; empty for those that never began.
        spans (`list[tuple[float, float] | None]`): from when to when each was live on the clock, in seconds; None for those that never
            began.
        emitted (`int`): new tokens of all requests while the clock ran.
        seconds (`float`): on the clock.
        stats (`DecodingStats`): of the loop while the clock ran; `t_total_s` equals `seconds`.
        row_rounds (`int`): rounds times the rows that were live in them.
    """

    tokens: list[list[int]]
    spans: list[tuple[float, float] | None]
    emitted: int
    seconds: float
    stats: DecodingStats
    row_rounds: int


class Server:
    """Requests, some of them in flight, and the loop that answers them; runs for a while at a time.

    Args:
        model (`PreTrainedModel`): the target.
        drafter (`DSparkDrafter`, *optional*): None decodes plainly.
        prompts (`list[list[int]]`): token ids, in the order in which requests join.
        concurrency (`int`): rows in flight, as long as requests wait.
        max_new_tokens (`int` or `list[int]`): of each request.
        budget (`Budget`): started.
        end_ids (`list[int]`): that end a request; the one met is kept.
        temperature (`float`): 0 is greedy.
        top_p (`float`): nucleus.
        seed (`int`): of all draws.
        listener (`RoundListener`, *optional*): hears of rounds.
        copying (`bool`): draft what requests repeat too, where the drafter has weights for that.
        verification (`str`): how drawn tokens are judged, `"block"` or `"token"`.
    """

    def __init__(
        self,
        model: Any,
        drafter: Any,
        prompts: Sequence[Sequence[int]],
        *,
        concurrency: int,
        max_new_tokens: int | Sequence[int],
        budget: Budget,
        end_ids: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        listener: RoundListener | None = None,
        copying: bool = True,
        verification: str = DEFAULT_VERIFICATION,
    ) -> None:
        self.count = len(prompts)
        new = [max_new_tokens] * self.count if isinstance(max_new_tokens, int) else list(max_new_tokens)
        check_length(model, max(len(p) + n for p, n in zip(prompts, new, strict=True)))
        self.concurrency = concurrency
        self.loop = _loop(model, drafter, new, budget, end_ids, temperature, top_p, seed, listener, copying, verification)
        self._ids = [torch.tensor(list(prompt), device=self.loop.target.device) for prompt in prompts]
        self._waiting = 0
        self._clock = 0.0
        self._since: dict[int, float] = {}  # of the requests in flight
        self.spans: list[tuple[float, float] | None] = [None] * self.count
        self._counted = [0] * self.count
        self._left_with = 0  # new tokens of the requests that are answered

    @torch.no_grad()
    def run(self, *, steady: bool = False, seconds: float | None = None, tokens: int | None = None) -> Served:
        """Go on with the requests.

        Args:
            steady (`bool`): let the first requests join before the clock starts, and stop it when none is left to take a place that is
                free: `concurrency` rows are live all the time.
            seconds (`float`, *optional*): end when so much time has passed; all is as it was when `run` is called again. Without it, end
                when all requests are answered.
            tokens (`int`, *optional*): end when so many new tokens have come out since this server was made.
        Returns:
            `Served`: of this time. Its spans are on a clock that runs in `run` only.
        """
        loop, device = self.loop, self.loop.target.device
        row_rounds = 0
        with torch.inference_mode(), loop.target.open():
            if steady and not self._waiting:
                self._join(self._clock)
            loop.watch = Stopwatch(device)
            loop.stats = DecodingStats([RowStats.for_block(loop.block_size) for _ in range(self.count)], loop.block_size)
            before = self._clock
            start = time.perf_counter()
            while self._waiting < self.count or loop.live:
                self._join(before + time.perf_counter() - start)
                if loop.live:
                    row_rounds += len(loop.live)
                    loop.round()
                self._clock = before + time.perf_counter() - start
                self._leave()
                if seconds is not None and self._clock - before >= seconds:
                    break
                if tokens is not None and self.emitted >= tokens:
                    break
                if steady and self.exhausted:
                    break
            _wait(device)
            spent = time.perf_counter() - start
            self._clock = before + spent
        for name, value in loop.watch.read().items():
            setattr(loop.stats, f"t_{name}_s", value)
        loop.stats.t_total_s = spent
        spans = [(since, self._clock) if (since := self._since.get(r)) is not None else self.spans[r] for r in range(self.count)]
        answers = [loop.sequences.ids[r, : loop.sequences.lengths[r]].tolist() for r in range(self.count)]
        for request, row in enumerate(loop.stats.rows):
            self._counted[request] += row.generated
        return Served(answers, spans, sum(row.generated for row in loop.stats.rows), spent, loop.stats, row_rounds)

    @property
    def exhausted(self) -> bool:
        """Whether a place is free that no request is left to take."""
        return self._waiting == self.count and len(self.loop.live) < self.concurrency

    @property
    def emitted(self) -> int:
        """New tokens of all requests so far."""
        lengths = self.loop.sequences.lengths
        return self._left_with + sum(lengths[request] for request in self._since)

    def speeds(self, fewest: int = 8) -> list[float]:
        """Tokens a second of each request that has got `fewest` tokens on the clock, as its user sees them."""
        out = []
        for request, tokens in enumerate(self._counted):
            since = self._since.get(request)
            span = (since, self._clock) if since is not None else self.spans[request]
            if span is not None and tokens >= fewest:
                out.append(tokens / (span[1] - span[0]))
        return out

    def _join(self, now: float) -> None:
        loop = self.loop
        while self._waiting < self.count and len(loop.live) < self.concurrency:  # again where one ends with its first token
            more = range(self._waiting, min(self._waiting + self.concurrency - len(loop.live), self.count))
            self._since.update(dict.fromkeys(more, now))
            loop.join(more, [self._ids[request] for request in more])
            self._waiting = more.stop

    def _leave(self) -> None:
        for request in self._since.keys() - set(self.loop.live):
            self.spans[request] = (self._since.pop(request), self._clock)
            self._left_with += self.loop.sequences.lengths[request]


def serve(
    model: Any,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    *,
    steady: bool = False,
    stop_after_seconds: float | None = None,
    **server: Any,
) -> Served:
    """Answer requests in one run of a `Server`.

    Args:
        model, drafter, prompts, server: as `Server` takes them.
        steady, stop_after_seconds: as `Server.run` takes them.
    Returns:
        `Served`.
    """
    return Server(model, drafter, prompts, **server).run(steady=steady, seconds=stop_after_seconds)


def _loop(
    model: Any,
    drafter: Any,
    limits: list[int],
    budget: Budget,
    end_ids: Sequence[int],
    temperature: float,
    top_p: float,
    seed: int,
    listener: RoundListener | None,
    copying: bool,
    verification: str,
) -> DecodingLoop:
    """The decoding loop with a row of its own for each request, of which none has joined yet."""
    target = Target(model, [] if drafter is None else drafter.config.target_layer_ids)
    if drafter is not None:
        drafter.bind(model)
    count = len(limits)
    warpers: list[Any] = [] if temperature in (0.0, 1.0) else [TemperatureLogitsWarper(temperature)]
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return DecodingLoop(
        target,
        drafter,
        budget,
        # The loop counts each row from the end of its own prompt: what is kept of a request are its new tokens.
        Sequences(torch.zeros(count, 0, dtype=torch.long, device=target.device), max(limits), 16),
        RowProcessors(warpers, count),
        RowStopping([EosTokenCriteria(list(end_ids))] if end_ids else [], count, limits),
        sample=temperature > 0,
        block_size=1 if drafter is None else drafter.config.block_size,
        generator=torch.Generator(device=target.device).manual_seed(seed),
        listener=listener,
        copying=copying,
        verification=verification,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
