"""Plain generation with rows that come and go: each request has its own temperature, length and randomness, so that its tokens do not
depend on its neighbours."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import TopPLogitsWarper

from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding.loop import check_finite
from hf_dspark.decoding.prefill import prefill
from hf_dspark.decoding.state import State
from hf_dspark.targets.self_test import check_length
from hf_dspark.targets.target import Target


@dataclass
class Request:
    """One text to be continued, with its own randomness: one number a token."""

    prompt: list[int]
    limit: int  # new tokens at most
    stop: frozenset[int]  # ids that end it; the one met is kept
    temperature: float  # 0 is greedy
    top_p: float  # 1 is all tokens
    random: random.Random
    owner: Any = None  # for the caller
    tokens: list[int] = field(default_factory=list)  # what came out
    ended: bool = False  # by an id of `stop`


class RowSampler:
    """Plain decoding of at most `places` requests at a time, each of at most `max_tokens` tokens in all; an `UnsupportedTargetError` if
    ragged passes cannot be exact on this model."""

    def __init__(self, model: PreTrainedModel, places: int, max_tokens: int) -> None:
        self.target = Target(model, [])
        check_length(model, max_tokens)
        self.places = places
        self.state = State(self.target.device, limit=max_tokens + 1)
        self._requests: dict[int, Request] = {}  # in flight, by number
        self._next = 0

    @property
    def free(self) -> int:
        """Places without a request."""
        return self.places - self.in_flight

    @property
    def in_flight(self) -> int:
        """Requests that are being continued."""
        return self.state.num_rows

    def begin(self, requests: Sequence[Request]) -> list[Request]:
        """Read the prompts of requests, as many as places are free at most, and draw their first tokens; returns those that have ended."""
        first, numbers = self.state.num_rows, range(self._next, self._next + len(requests))
        self._next = numbers.stop
        self._requests.update(zip(numbers, requests, strict=True))
        prompts = [torch.tensor(request.prompt, device=self.state.device) for request in requests]
        self.state.add_rows(numbers, prompts)
        return self._commit(prefill(self.target, None, self.state, prompts, first), first)

    def round(self) -> list[Request]:
        """One token for every request in flight; returns those that have ended."""
        layout = RowLayout(self.state.context_lengths, [1] * self.in_flight, self.state.device)
        logits, _ = self.target.forward(self.state.anchors, layout, self.state.target_cache)
        return self._commit(logits)

    def choose(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """The next token of each of R requests from logits `(R, V)`: the arg-max, or a draw by the inverse of the distribution function at
        the request's own number. NaN and infinity are a `RuntimeError`."""
        drawn = [k for k, request in enumerate(requests) if request.temperature > 0]
        greedy = [k for k, request in enumerate(requests) if request.temperature == 0]
        tokens = torch.empty(len(requests), dtype=torch.long, device=logits.device)
        if greedy:
            tokens[greedy] = logits[greedy].float().argmax(-1)  # On a CPU the arg-max of bfloat16 takes five times as long.
        if drawn:
            tokens[drawn] = self._draw(logits[drawn].float(), [requests[k] for k in drawn])
        return tokens

    def _draw(self, scores: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        scores = scores / torch.tensor([[request.temperature] for request in requests], device=scores.device)
        for k, request in enumerate(requests):
            if request.top_p < 1:
                scores[k : k + 1] = TopPLogitsWarper(request.top_p)(None, scores[k : k + 1])
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        below = scores.softmax(-1).cumsum(-1, dtype=wide)
        total = below[:, -1:]
        check_finite(bool(torch.isfinite(total).all()))
        numbers = torch.tensor([[request.random.random()] for request in requests], dtype=wide).to(scores.device)
        # The first token whose cumulated probability exceeds the number: one without probability never does.
        return torch.searchsorted(below, numbers * total, right=True)[:, 0].clamp_max(scores.shape[1] - 1)

    def _commit(self, logits: torch.Tensor, first: int = 0) -> list[Request]:
        """Draw the next token of the rows from place `first` on, and let those that end leave."""
        requests = [self._requests[number] for number in self.state.requests[first:]]
        tokens = self.choose(logits.to(self.state.device), requests)
        self.state.commit(tokens[:, None], [1] * len(requests), tokens, first)
        gone = []
        for place, (request, token) in enumerate(zip(requests, tokens.tolist(), strict=True), first):
            request.tokens.append(token)
            request.ended = token in request.stop
            if request.ended or len(request.tokens) >= request.limit:
                gone.append(place)
        finished = [self._requests.pop(self.state.requests[place]) for place in gone]
        if gone:
            self.state.remove_rows(gone)
        return finished
