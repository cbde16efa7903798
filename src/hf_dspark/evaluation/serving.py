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

from hf_dspark.constraints import RowProcessors, RowStopping, Sequences
from hf_dspark.decoding import DecodingLoop, RoundListener
from hf_dspark.scheduling import Budget
from hf_dspark.statistics import DecodingStats, RowStats, Stopwatch
from hf_dspark.target import Target, check_length


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


@torch.no_grad()
def serve(
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
    steady: bool = False,
    stop_after_seconds: float | None = None,
) -> Served:
    """Answer requests with `concurrency` of them in flight.

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
        steady (`bool`): start the clock when the first requests have joined, and stop it when the last one waiting has: in between
            `concurrency` rows are live all the time.
        stop_after_seconds (`float`, *optional*): end when so much time has passed on the clock.
    Returns:
        `Served`.
    """
    count = len(prompts)
    new = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    check_length(model, max(len(p) + n for p, n in zip(prompts, new, strict=True)))
    loop = _loop(model, drafter, new, budget, end_ids, temperature, top_p, seed, listener)
    device = loop.target.device
    ids = [torch.tensor(list(prompt), device=device) for prompt in prompts]
    spans: list[tuple[float, float] | None] = [None] * count
    joined: dict[int, float] = {}
    waiting = 0
    row_rounds = 0
    with torch.inference_mode(), loop.target.open():
        start = time.perf_counter()
        on_clock = not steady
        while waiting < count or loop.live:
            while waiting < count and len(loop.live) < concurrency:  # again where one ends with its first token
                more = range(waiting, min(waiting + concurrency - len(loop.live), count))
                now = time.perf_counter()
                joined.update(dict.fromkeys(more, now))
                loop.join(more, [ids[request] for request in more])
                waiting = more.stop
            if not on_clock and loop.live:
                on_clock = True
                loop.stats = _reset(loop)
                start = time.perf_counter()
                joined.update(dict.fromkeys(loop.live, start))
            if loop.live:
                row_rounds += len(loop.live)
                loop.round()
            now = time.perf_counter()
            for request in joined.keys() - set(loop.live):
                spans[request] = (joined.pop(request) - start, now - start)
            if stop_after_seconds is not None and now - start >= stop_after_seconds:
                break
            if steady and waiting == count and len(loop.live) < concurrency:
                break
        _wait(device)
        seconds = time.perf_counter() - start
    for request, since in joined.items():
        spans[request] = (since - start, seconds)
    for name, value in loop.watch.read().items():
        setattr(loop.stats, f"t_{name}_s", value)
    loop.stats.t_total_s = seconds
    emitted = sum(row.generated for row in loop.stats.rows)
    tokens = [loop.sequences.ids[r, : loop.sequences.lengths[r]].tolist() for r in range(count)]
    return Served(tokens, spans, emitted, seconds, loop.stats, row_rounds)


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
    )


def _reset(loop: DecodingLoop) -> DecodingStats:
    """Forget what happened before the clock started."""
    loop.watch = Stopwatch(loop.target.device)
    return DecodingStats([RowStats.for_block(loop.block_size) for _ in loop.stats.rows], loop.block_size)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
