"""Plain generation with rows that come and go: each request has its own temperature, length and randomness, so that its tokens do not
depend on its neighbours. Knows the decoding loop; knows no text, no files and no training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.logits_process import TopPLogitsWarper

from hf_dspark.budgets.budget import StaticBudget
from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.decoding.loop import Context, DecodingLoop
from hf_dspark.decoding.row_processors import RowProcessors, RowStopping, Sequences
from hf_dspark.decoding.verify import DraftBlock, Verdict
from hf_dspark.targets.target import Target, check_length


@dataclass
class Request:
    """One text to be continued.

    Args:
        prompt (`list[int]`): what stands in front.
        limit (`int`): new tokens at most.
        stop (`frozenset[int]`): ids that end it; the one met is kept.
        temperature (`float`): 0 is greedy.
        top_p (`float`): nucleus, 1 is all tokens.
        random (`random.Random`): its own randomness, one number a token.
        owner: for the caller.
        tokens (`list[int]`): what came out.
        ended (`bool`): True where an id of `stop` ended it.
    """

    prompt: list[int]
    limit: int
    stop: frozenset[int]
    temperature: float
    top_p: float
    random: random.Random
    owner: Any = None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


class RowSampler(DecodingLoop):
    """The decoding loop without a drafter, in which every place is taken by one request after another.

    Args:
        model (`PreTrainedModel`): the target.
        places (`int`): requests in flight at most.
        max_tokens (`int`): longest prompt with its continuation.
    Raises:
        UnsupportedTargetError: if ragged passes cannot be exact on this model.
    """

    def __init__(self, model: Any, places: int, max_tokens: int) -> None:
        target = Target(model, [])
        check_length(model, max_tokens)
        # The loop counts tokens of each place here; the tokens themselves are the request's.
        sequences = Sequences(torch.empty(places, 0, dtype=torch.long, device=target.device), 1, 1)
        super().__init__(
            target,
            None,
            StaticBudget(0),
            sequences,
            RowProcessors([], places),
            RowStopping([], places),
            sample=False,
            block_size=1,
            context=Context(target=RowCache(max_tokens + 1)),
        )
        self.places: list[Request | None] = [None] * places
        self.finished: list[Request] = []
        self._top_p: dict[float, TopPLogitsWarper] = {}

    @property
    def free(self) -> int:
        """Places without a request."""
        return len(self.places) - len(self.live)

    def begin(self, requests: Sequence[Request]) -> None:
        """Read the requests' prompts and draw their first tokens; there must be as many free places."""
        empty = [place for place, request in enumerate(self.places) if request is None][: len(requests)]
        for place, request in zip(empty, requests, strict=True):
            self.places[place] = request
        device = self.sequences.ids.device
        self.join(empty, [torch.tensor(request.prompt, device=device) for request in requests])

    def take_finished(self) -> list[Request]:
        """Requests that have come to their end since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def join(self, rows: Sequence[int], prompts: Sequence[torch.Tensor], known: int = 0) -> None:
        first_row = len(self.live)
        self.context.add_rows(len(rows))
        logits = self._read(prompts, first_row, 0)
        self.live.extend(rows)
        tokens = self.choose(logits, rows)
        self.anchors = torch.cat([self.anchors, tokens])
        ended = [self.settle(row, [token], tokens, logits, logits)[1] for row, token in zip(rows, tokens.tolist(), strict=True)]
        self.leave([first_row + index for index, over in enumerate(ended) if over])

    def accept(self, logits: torch.Tensor, block: DraftBlock, layout: RowLayout) -> tuple[Verdict, torch.Tensor]:
        tokens = self.choose(logits, self.live)
        return Verdict(torch.zeros_like(tokens), tokens), logits

    def choose(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """The next token of each row: the arg-max, or a draw by the inverse of the distribution function at the request's own number.

        Args:
            logits (`torch.Tensor` of shape `(R, V)`): the target's.
            rows (`list[int]`): their places.
        Returns:
            `torch.LongTensor` of shape `(R,)`.
        Raises:
            RuntimeError: if a distribution holds NaN or infinity.
        """
        logits = logits.to(self.anchors.device)
        requests = [self.places[row] for row in rows]
        drawn = [k for k, request in enumerate(requests) if request is not None and request.temperature > 0]
        greedy = sorted(set(range(len(requests))) - set(drawn))
        tokens = torch.empty(len(requests), dtype=torch.long, device=logits.device)
        if greedy:
            tokens[greedy] = logits[greedy].float().argmax(-1)  # On a CPU the arg-max of bfloat16 takes five times as long.
        if drawn:
            tokens[drawn] = self._draw(logits[drawn].float(), [request for k in drawn if (request := requests[k]) is not None])
        return tokens

    def _draw(self, scores: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """One token for each of the requests from their scores `(R, V)`."""
        scores = scores / torch.tensor([[request.temperature] for request in requests], device=scores.device)
        for k, request in enumerate(requests):
            if request.top_p < 1:
                warper = self._top_p.setdefault(request.top_p, TopPLogitsWarper(request.top_p))
                scores[k : k + 1] = warper(None, scores[k : k + 1])
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        below = scores.softmax(-1).cumsum(-1, dtype=wide)
        total = below[:, -1:]
        self.require_sound(int(torch.isfinite(total).all()))
        numbers = torch.tensor([[request.random.random()] for request in requests], dtype=wide).to(scores.device)
        # The first token whose cumulated probability exceeds the number: one without probability never does.
        return torch.searchsorted(below, numbers * total, right=True)[:, 0].clamp_max(scores.shape[1] - 1)

    def settle(self, row: int, tokens: list[int], ids: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor) -> tuple[int, bool]:
        request = self.places[row]
        assert request is not None
        request.tokens += tokens
        request.ended = tokens[-1] in request.stop
        over = request.ended or len(request.tokens) >= request.limit
        if over:
            self.places[row] = None
            self.finished.append(request)
        return len(tokens), over
