"""N-gram copying: what followed the last earlier occurrence of the last few tokens is mixed into every drafted token.

The drafted token is drawn from (1 - lambda_m) p_d + lambda_m [x = copy], where m is how many of the last tokens the earlier occurrence
agrees with, and lambda_m how often a copy of that length is right where p_d is not. Verification gets that distribution, so the output
stays exact. Names, numbers and repeated phrases come from the text itself, tokens outside a reduced draft vocabulary too.

Source: pointer-generator mixtures (See et al. 2017, arXiv 1704.04368) over the matches of prompt lookup. Not in the DSpark paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from hf_dspark.configuration_dspark import COPY_RELATIONS, DSparkConfig, check_ngram_copying
from hf_dspark.decoding.state import State
from hf_dspark.utils.constants import constant

_NONE, _AGREES, _WINS, _LOSES = range(len(COPY_RELATIONS))
# Earlier occurrences of so many of the last tokens say how much the text agrees with itself about what follows.
_AGREEMENT_LENGTH = 2
# Probabilities of a copy below this one are all the same to confidences, and those within it of 1.
_LEAST_DRAFTED = 1e-3


def copy_weights_of(config: DSparkConfig, copying: bool) -> list[float] | None:
    """lambda_1..lambda_M of a drafter's config; None without n-gram copying. Checked again, since a config can be changed after it was
    made.

    Raises:
        ValueError: for weights that no probability could be; sampling from them would not be exact.
    """
    if not copying or config.copy_weights is None:
        return None
    check_ngram_copying(config.copy_weights, config.copy_confidence)
    return list(config.copy_weights)


class Copies:
    """What rows would go on with if they repeated themselves, from the anchor on, token by token as they are drafted.

    Of the earlier occurrences of the longest suffix, the last counts; suffixes of up to M tokens are told apart.

    Args:
        ids (`torch.LongTensor` of shape `(R, W)`): committed ids of the rows, the anchor the last of each; negative at masked tokens.
        lengths (`torch.LongTensor` of shape `(R, 1)`): committed tokens of each row.
        prompt_ends (`torch.LongTensor` of shape `(R,)`): where each row's answer begins.
        weights (`list[float]`): lambda_1..lambda_M.
        drafted (`int`): tokens that will follow.
    """

    def __init__(self, ids: torch.Tensor, lengths: torch.Tensor, prompt_ends: torch.Tensor, weights: Sequence[float], drafted: int) -> None:
        self.longest, self.width = len(weights), ids.shape[1] + drafted
        # M places in front, so that every place has as many before it, and a column more, so that every place has a successor.
        padded = torch.nn.functional.pad(ids, (self.longest, drafted + 1), value=-1)
        self.ids = padded[:, self.longest :]
        # Negative where nothing is committed: rows that are shorter than others have a scratch behind them.
        places = torch.arange(self.width + 1, device=ids.device)
        scratch = places >= lengths
        self.ids.masked_fill_(scratch, -1)
        behind = lengths + torch.arange(max(self.longest, drafted + 1), device=ids.device)
        self._all_ends, self._extended = behind.split(1, dim=1), 0
        self.ends = self._all_ends[0]
        self.prompt_ends = prompt_ends
        odds = [w / (1 - w) if w < 1 else float("inf") for w in weights]
        table = constant(((0.0, 0.0), *zip(weights, odds, strict=True)), ids.device)
        self._table = table[:, None].expand(-1, self.width, -1).reshape(-1, 2)  # by `run * width + place`
        # The longest run, and of these the last, has the largest `run * width + place`; one whose successor is masked has no run.
        self.places, most, later = places[:-1].expand(ids.shape[0], -1), places[:-1] + self.longest * self.width, scratch[:, 1:]
        self.most = torch.where((self.ids[:, 1:] < 0) ^ later, self.places, most)
        runs = self._suffixes(padded, behind[:, : self.longest]).masked_fill_(later, 0)
        score = torch.minimum(torch.add(self.places, runs, alpha=self.width), self.most)
        self.score = torch.nn.functional.pad(score, (1, 0), value=-1)  # the place before the first one, where no run ends
        self._look()

    @classmethod
    def of_rows(cls, state: State, places: Sequence[int] | None, weights: Sequence[float], drafted: int) -> Copies:
        """For the live rows at these places; for all where None."""
        lengths = state.lengths if places is None else [state.lengths[place] for place in places]
        ends = state.prompt_ends if places is None else [state.prompt_ends[place] for place in places]
        device, width = state.device, max(lengths)
        index = slice(len(lengths)) if places is None else torch.tensor(places).to(device, non_blocking=True)
        ids = state.ids[index, :width]
        if state.masked_at is not None:
            ids = ids.masked_fill(state.masked_at[index, :width], -1)
        lengths_, ends_ = (torch.tensor(values).to(device, non_blocking=True) for values in (lengths, ends))
        return cls(ids, lengths_[:, None], ends_, weights, drafted)

    def _suffixes(self, padded: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """How many tokens up to each place equal the text's last ones, `(R, W)`, at most M, in 2 R W (M + 1) bytes; `last` `(R, M)` says
        where these are in `padded`.
        """
        tokens = padded.gather(1, last)
        tokens = tokens.masked_fill_(tokens < 0, -2)
        # Views of the ids, oldest first; what is turned round is one byte a token.
        differ = (padded[:, 1 : self.longest + self.width].unfold(1, self.longest, 1) != tokens[:, None]).flip(-1)
        return torch.nn.functional.pad(differ.view(torch.uint8), (0, 1), value=1).argmax(-1)

    def _look(self) -> None:
        self._best, self.found = self.score[:, 1:].max(1)
        self.tokens = self.ids[:, 1:].gather(1, self.found[:, None])[:, 0]  # may be negative where there is no copy
        self.weight, self.odds = self._table[self._best].unbind(-1)

    @property
    def lengths(self) -> torch.Tensor:
        """How many of the last tokens the copy's predecessors are, `(R,)`."""
        return torch.div(self._best, self.width, rounding_mode="floor")

    @property
    def from_prompt(self) -> torch.Tensor:
        """Whether the copy stands before this answer, `(R,)`."""
        return self.found + 1 < self.prompt_ends

    def agreement(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How many earlier places of the last two tokens go on with the copy, and how many do not, `(R,)` each; of the last token alone
        where the two never stood together before.
        """
        alike = self.score[:, 1:] >= self.lengths[:, None].clamp(1, _AGREEMENT_LENGTH) * self.width
        agreeing = (alike & (self.ids[:, 1:] == self.tokens[:, None])).sum(1)
        return agreeing, alike.sum(1) - agreeing

    def extend(self, tokens: torch.Tensor) -> None:
        """Go on behind `tokens`, ids of shape `(R,)`."""
        tokens, score = tokens[:, None], self.score[:, 1:]
        longer = self.score[:, :-1] + (self.width + 1)  # a token more, a place on
        # Before they are written: the text's own end is no earlier place.
        torch.where(self.ids[:, :-1] == tokens, longer, self.places, out=score)
        torch.minimum(score, self.most, out=score)
        self.ids.scatter_(1, self.ends, tokens)
        self._extended += 1
        self.ends = self._all_ends[self._extended]
        self._look()


@dataclass(frozen=True)
class Position:
    """A block position's copies beside what the drafter would draft without them, tensors of shape `(R,)`.

    Attributes:
        tokens, weights, found: of `Copies`, weights 0 where a processor rules the copy out.
        best_ids, best: the drafter's most likely token, as target id, and its p_d.
        p_d: of the copies.
        wins: whether the copy is the most likely token of the mixture.
        counts: of `Copies.agreement`, where confidences are asked for.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    found: torch.Tensor
    best_ids: torch.Tensor
    best: torch.Tensor
    p_d: torch.Tensor
    wins: torch.Tensor
    counts: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(
        cls, copies: Copies, best_ids: torch.Tensor, best: torch.Tensor, p_d: torch.Tensor, allowed: torch.Tensor | None, *, counted: bool
    ) -> Position:
        """From what the copies are now; `allowed` where a processor rules some out."""
        weights, odds = copies.weight, copies.odds
        if allowed is not None:
            weights, odds = torch.where(allowed, weights, 0.0), torch.where(allowed, odds, 0.0)
        # w + (1 - w) p_copy > (1 - w) p_best
        return cls(copies.tokens, weights, copies.found, best_ids, best, p_d, odds + p_d > best, copies.agreement() if counted else ())


@dataclass(frozen=True)
class Copied:
    """A block's copies beside what the drafter would draft without them: for verification, and for its confidence.

    Attributes:
        tokens (`torch.LongTensor` of shape `(R, gamma)`): target ids; any where the weight is 0.
        weights (`torch.Tensor` of shape `(R, gamma)`): lambda of each.
        p_d (`torch.Tensor` of shape `(R, gamma)`): of the copies themselves; 0 where the drafter cannot propose them.
        relation (`torch.LongTensor` of shape `(R, gamma)`, *optional*): to the drafter's most likely token, an index into
            `COPY_RELATIONS`. This and what follows where confidences are asked for.
        best (`torch.Tensor` of shape `(R, gamma)`, *optional*): log p_d of that token.
        from_prompt (`torch.BoolTensor` of shape `(R, gamma)`, *optional*): whether they stand before this answer, earlier turns included.
        agreeing, disagreeing (`torch.LongTensor` of shape `(R, gamma)`, *optional*): of `Copies.agreement`.
        confidence (`torch.Tensor` of shape `(R, gamma)`, *optional*): logit of the confidence head.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    p_d: torch.Tensor
    relation: torch.Tensor | None = None
    best: torch.Tensor | None = None
    from_prompt: torch.Tensor | None = None
    agreeing: torch.Tensor | None = None
    disagreeing: torch.Tensor | None = None
    confidence: torch.Tensor | None = None

    @classmethod
    def of_block(cls, prompt_ends: torch.Tensor, positions: Sequence[Position]) -> Copied:
        """Of a block, from its positions; `prompt_ends` `(R,)` as in `Copies`."""
        names = ("tokens", "weights", "p_d", *(("found", "best_ids", "best", "wins") if positions[0].counts else ()))
        tokens, weights, p_d, *others = (torch.stack([getattr(p, name) for p in positions], dim=1) for name in names)
        record = cls(tokens.clamp_(min=0), weights, p_d)  # any id that exists where there is no copy
        if not others:
            return record
        found, best_ids, best, wins = others
        relation = torch.where(tokens == best_ids, _AGREES, torch.where(wins, _WINS, _LOSES)).masked_fill(weights == 0, _NONE)
        agreeing, disagreeing = (torch.stack(counts, dim=1) for counts in zip(*(p.counts for p in positions), strict=True))
        return replace(
            record,
            relation=relation,
            best=best.log(),
            from_prompt=found + 1 < prompt_ends[:, None],
            agreeing=agreeing,
            disagreeing=disagreeing,
        )

    def mix(self, p_d: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:
        """Probability of the drafted tokens `(R, gamma)` in the mixture, from that in p_d, both `(R, gamma)`."""
        return torch.lerp(p_d, (self.tokens == drafted).to(p_d.dtype), self.weights)

    def mixture(self, p_d: torch.Tensor) -> torch.Tensor:
        """The whole distribution that tokens are drawn from, `(R, gamma, V)`, from p_d over the target's vocabulary."""
        return ((1 - self.weights)[..., None] * p_d).scatter_add_(-1, self.tokens[..., None], self.weights[..., None])

    def features(self) -> torch.Tensor:
        """What survival is read off, `(R, gamma, 9)`: the relation, and behind it `COPY_FEATURES`, those of the copy 0 where none is.

        Raises:
            RuntimeError: without the confidence head's logits.
        """
        known = self.relation, self.best, self.from_prompt, self.agreeing, self.disagreeing, self.confidence
        if any(one is None for one in known):
            raise RuntimeError("these copies were drafted without confidences; draft with_confidence=True")
        relation, log_best, from_prompt, agreeing, disagreeing, confidence = cast(tuple[torch.Tensor, ...], known)
        best = torch.logit(log_best.exp(), eps=1e-6)
        drafted = torch.logit(self.p_d, eps=_LEAST_DRAFTED)
        agreement = torch.log((agreeing + 0.5) / (disagreeing + 0.5))
        unanimous = (agreeing > 1) & (disagreeing == 0)
        of_copy = torch.stack([torch.logit(self.weights, eps=1e-6), from_prompt, agreement, unanimous, drafted], dim=-1)
        odds, *others = of_copy.masked_fill((self.weights == 0)[..., None], 0.0).unbind(-1)
        return torch.stack([relation.float(), torch.ones_like(best), confidence, odds, best, *others], dim=-1)

    def on(self, rows: torch.Tensor | slice) -> Copied:
        """Of other rows: place i holds what was at `rows[i]`."""
        return replace(self, **{name: t[rows] for name, t in vars(self).items() if t is not None})

    def until(self, length: int) -> Copied:
        """Of the first positions."""
        return replace(self, **{name: t[:, :length] for name, t in vars(self).items() if t is not None})


def adjusted(features: torch.Tensor, table: Sequence[Sequence[float]]) -> torch.Tensor:
    """Logits of survival where copies are drafted too: for each relation a linear function of `COPY_FEATURES`.

    All of them are known before the token is drawn, as a budget's decisions must be.

    Args:
        features (`torch.Tensor` of shape `(R, n, 9)`): of `Copied.features`.
        table (`list[list[float]]` of shape `(4, 4)` or `(4, 8)`): `COPY_RELATIONS` by `COPY_FEATURES`, or by the first four of them.
    Returns:
        `torch.Tensor` of shape `(R, n)`.
    """
    rows = constant(tuple(map(tuple, table)), features.device)[features[..., 0].long()]
    return (rows * features[..., 1 : 1 + rows.shape[-1]]).sum(-1)
