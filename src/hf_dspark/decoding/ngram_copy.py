"""Copying: what followed the last earlier occurrence of the last few tokens, as a second opinion on every drafted token. Knows ids and
probabilities; knows no drafter, no target and no loop.

The drafted token is drawn from (1 - lambda_m) p_d + lambda_m [x = copy], where m is how many of the last tokens the earlier occurrence
agrees with, and lambda_m how often a copy of that length is right where p_d is not. Verification is told that distribution, so nothing
else changes. Names, numbers and repeated phrases, which a small drafter has no room to know, come from the text itself; the more so tokens
outside a reduced draft vocabulary.

Source: pointer-generator mixtures (See et al. 2017, arXiv 1704.04368) over the matches of prompt lookup. Not in the DSpark paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_dspark.configuration_dspark import COPY_RELATIONS, check_copying

_NONE, _AGREES, _WINS, _LOSES = range(len(COPY_RELATIONS))
# Earlier occurrences of so many of the last tokens say how much the text agrees with itself about what follows.
_AGREEMENT_LENGTH = 2
# Probabilities of a copy below this one are all the same to confidences, and those within it of 1.
_LEAST_DRAFTED = 1e-3


def weights_in_force(config: Any, copying: bool) -> list[float] | None:
    """lambda_1..lambda_M of a drafter's config, checked once more, since a config can be changed after it was made; None for no copies.

    Raises:
        ValueError: for weights that no probability could be; sampling from them would not be exact.
    """
    if not copying or config.copy_weights is None:
        return None
    check_copying(config.copy_weights, config.copy_confidence)
    return list(config.copy_weights)


class Texts:
    """Committed ids of the live rows, each from its own beginning, with room for what is drafted.

    Args:
        device (`torch.device`): where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.ids = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.lengths: list[int] = []
        self.given: list[int] = []

    def join(self, prompts: Sequence[torch.Tensor], given: Sequence[int] | None = None) -> None:
        """Add a row for each prompt, ids of shape `(n_r,)`, of which the first `given[r]` stood before the answer began; all where None."""
        first, lengths = len(self.lengths), [len(prompt) for prompt in prompts]
        self.lengths += lengths
        self.given += lengths if given is None else given
        self._grow(len(self.lengths), max(self.lengths))
        for row, prompt in enumerate(prompts, first):
            self.ids[row, : len(prompt)] = prompt

    def append(self, tokens: torch.Tensor, kept: Sequence[int]) -> None:
        """Commit the first `kept[r]` of `tokens[r]`, ids of shape `(R, n)`, to each row."""
        places = torch.tensor(self.lengths).to(self.ids.device, non_blocking=True)[:, None] + torch.arange(
            tokens.shape[1], device=self.ids.device
        )
        self._grow(len(self.lengths), max(self.lengths) + tokens.shape[1])
        self.ids[: len(self.lengths)].scatter_(1, places, tokens)  # What lies beyond the kept ones is overwritten later.
        self.lengths = [length + more for length, more in zip(self.lengths, kept, strict=True)]

    def keep(self, order: Sequence[int]) -> None:
        """Rows leave: place i is what was at `order[i]`."""
        self.ids = self.ids[torch.tensor(order, dtype=torch.long, device=self.ids.device)]
        self.lengths = [self.lengths[old] for old in order]
        self.given = [self.given[old] for old in order]

    def _grow(self, rows: int, width: int) -> None:
        have_rows, have = self.ids.shape
        if rows > have_rows or width > have:
            ids = self.ids.new_zeros(max(rows, have_rows), have if width <= have else width + width // 2 + 64)
            ids[:have_rows, :have] = self.ids
            self.ids = ids


class Copies:
    """What rows would go on with if they repeated themselves, from the anchor on, token by token as they are drafted.

    Of the earlier occurrences of the longest suffix, the last counts; suffixes of up to M tokens are told apart.

    Args:
        texts (`Texts`): of the live rows, the anchor the last token of each.
        rows (`list[int]`, *optional*): the ones to draft for, by place; all where None.
        weights (`list[float]`): lambda_1..lambda_M.
        drafted (`int`): tokens that will follow.
    """

    def __init__(self, texts: Texts, rows: Sequence[int] | None, weights: Sequence[float], drafted: int) -> None:
        lengths = texts.lengths if rows is None else [texts.lengths[row] for row in rows]
        device, width = texts.ids.device, max(lengths)
        ids = texts.ids[: len(lengths)] if rows is None else texts.ids[torch.tensor(rows).to(device, non_blocking=True)]
        self.ids = torch.nn.functional.pad(ids[:, :width], (0, drafted), value=-1)
        self.ends = torch.tensor(lengths).to(device, non_blocking=True)[:, None]
        self.given = torch.tensor(texts.given if rows is None else [texts.given[row] for row in rows]).to(device, non_blocking=True)
        self.weights = torch.tensor([0.0, *weights], dtype=torch.float32).to(device, non_blocking=True)
        self.longest = len(weights)
        self.places = torch.arange(self.ids.shape[1], device=device)[None]
        self.runs = self._suffixes()
        self._look()

    def _suffixes(self) -> torch.Tensor:
        """How many tokens up to each place equal the text's last ones, `(R, W)`, at most M; any number where no earlier match ends."""
        return self._suffixes_step_by_step() if self.ids.device.type == "cpu" else self._suffixes_at_once()

    def _suffixes_at_once(self) -> torch.Tensor:
        """In R W M bytes: no host has to hear whether a match is left."""
        back = torch.arange(self.longest, device=self.ids.device)
        last = torch.where(back < self.ends, self.ids.gather(1, (self.ends - 1 - back).clamp(min=0)), -2)
        before = torch.nn.functional.pad(self.ids, (self.longest - 1, 0), value=-3).unfold(1, self.longest, 1).flip(-1)
        differ = torch.nn.functional.pad(before != last[:, None], (0, 1), value=True)
        return differ.view(torch.uint8).argmax(-1)

    def _suffixes_step_by_step(self) -> torch.Tensor:
        """One token further back at a time, as long as anything matches: mostly a few steps."""
        runs, width = torch.zeros_like(self.ids), self.ids.shape[1]
        agree = self.places < self.ends - 1
        for back in range(min(self.longest, width)):
            last = self.ids.gather(1, (self.ends - 1 - back).clamp(min=0))
            same = (self.ids == last) & (self.ends > back)
            agree = agree & torch.nn.functional.pad(same[:, : width - back], (back, 0))
            if not agree.any():
                break
            runs += agree
        return runs

    def _look(self) -> None:
        earlier = torch.where(self.places < self.ends - 1, self.runs, 0)
        found = (earlier * self.places.shape[1] + self.places).argmax(1, keepdim=True)  # the longest, and of these the last
        length = earlier.gather(1, found)
        self.tokens = self.ids.gather(1, (found + 1).clamp(max=self.ids.shape[1] - 1))[:, 0].clamp(min=0)
        self.lengths = length[:, 0]
        self.weight = self.weights[self.lengths]
        self.from_prompt = found[:, 0] + 1 < self.given
        self.earlier = earlier

    def agreement(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How many earlier places of the last two tokens go on with the copy, and how many do not, `(R,)` each; of the last token alone
        where the two never stood together before.
        """
        alike = self.earlier >= self.lengths[:, None].clamp(1, _AGREEMENT_LENGTH)
        agreeing = (alike[:, :-1] & (self.ids[:, 1:] == self.tokens[:, None])).sum(1)
        return agreeing, alike.sum(1) - agreeing

    def extend(self, tokens: torch.Tensor) -> None:
        """Go on behind `tokens`, ids of shape `(R,)`."""
        self.ids = self.ids.scatter(1, self.ends, tokens[:, None])
        before = torch.nn.functional.pad(self.runs[:, :-1], (1, 0))
        self.runs = torch.where(self.ids == tokens[:, None], (before + 1).clamp(max=self.longest), 0)
        self.ends = self.ends + 1
        self._look()


@dataclass(frozen=True)
class Copied:
    """A block's copies beside what the drafter would draft without them: for verification, and for its confidence.

    Attributes:
        tokens (`torch.LongTensor` of shape `(R, gamma)`): target ids; any where the weight is 0.
        weights (`torch.Tensor` of shape `(R, gamma)`): lambda of each.
        relation (`torch.LongTensor` of shape `(R, gamma)`): to the drafter's most likely token, an index into `COPY_RELATIONS`.
        best (`torch.Tensor` of shape `(R, gamma)`): log p_d of that token.
        p_d (`torch.Tensor` of shape `(R, gamma)`): of the copies themselves; 0 where the drafter cannot propose them.
        from_prompt (`torch.BoolTensor` of shape `(R, gamma)`): whether they stand before this answer, earlier turns included.
        agreeing, disagreeing (`torch.LongTensor` of shape `(R, gamma)`): of `Copies.agreement`; 0 where no confidences are asked for.
        confidence (`torch.Tensor` of shape `(R, gamma)`, *optional*): logit of the confidence head.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    relation: torch.Tensor
    best: torch.Tensor
    p_d: torch.Tensor
    from_prompt: torch.Tensor
    agreeing: torch.Tensor
    disagreeing: torch.Tensor
    confidence: torch.Tensor | None = None

    @classmethod
    def beside(
        cls, copies: Copies, weights: torch.Tensor, agrees: torch.Tensor, best: torch.Tensor, p_d: torch.Tensor, *, counted: bool
    ) -> Copied:
        """Of the position that copies stand at: tensors of shape `(R,)`; `agrees` where the copy is p_d's most likely token; `counted`
        where confidences will be read off it.
        """
        wins = weights + (1 - weights) * p_d > (1 - weights) * best.exp()
        relation = torch.where(agrees, _AGREES, torch.where(wins, _WINS, _LOSES)).masked_fill(weights == 0, _NONE)
        counts = copies.agreement() if counted else (torch.zeros_like(copies.tokens),) * 2
        return cls(copies.tokens, weights, relation, best, p_d, copies.from_prompt, *counts)

    @classmethod
    def join(cls, positions: Sequence[Copied]) -> Copied:
        """Of a block, from its positions."""
        return cls(*(torch.stack(tensors, dim=1) for tensors in zip(*(p._tensors()[:-1] for p in positions), strict=True)))

    @property
    def wins(self) -> torch.Tensor:
        """Whether the most likely token of the mixture is a copy that p_d does not agree with."""
        return self.relation == _WINS

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
        if self.confidence is None:
            raise RuntimeError("these copies were drafted without confidences; draft with_confidence=True")
        best = torch.logit(self.best.exp(), eps=1e-6)
        drafted = torch.logit(self.p_d, eps=_LEAST_DRAFTED)
        agreement = torch.log((self.agreeing + 0.5) / (self.disagreeing + 0.5))
        unanimous = (self.agreeing > 1) & (self.disagreeing == 0)
        of_copy = torch.stack([torch.logit(self.weights, eps=1e-6), self.from_prompt, agreement, unanimous, drafted], dim=-1)
        odds, *others = of_copy.masked_fill((self.weights == 0)[..., None], 0.0).unbind(-1)
        return torch.stack([self.relation.float(), torch.ones_like(best), self.confidence, odds, best, *others], dim=-1)

    def on(self, rows: torch.Tensor) -> Copied:
        """Of other rows: place i holds what was at `rows[i]`."""
        return Copied(*(None if t is None else t[rows] for t in self._tensors()))  # type: ignore[arg-type]

    def until(self, length: int) -> Copied:
        """Of the first positions."""
        return Copied(*(None if t is None else t[:, :length] for t in self._tensors()))  # type: ignore[arg-type]

    def cpu(self) -> Copied:
        """On the host."""
        return Copied(*(None if t is None else t.cpu() for t in self._tensors()))  # type: ignore[arg-type]

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        of_copy = self.from_prompt, self.agreeing, self.disagreeing
        return self.tokens, self.weights, self.relation, self.best, self.p_d, *of_copy, self.confidence


def adjusted(features: torch.Tensor, table: Sequence[Sequence[float]]) -> torch.Tensor:
    """Logits of survival where copies are drafted too: for each relation a linear function of `COPY_FEATURES`.

    All of them are known before the token is drawn, as a budget's decisions must be.

    Args:
        features (`torch.Tensor` of shape `(R, n, 9)`): of `Copied.features`.
        table (`list[list[float]]` of shape `(4, 4)` or `(4, 8)`): `COPY_RELATIONS` by `COPY_FEATURES`, or by the first four of them.
    Returns:
        `torch.Tensor` of shape `(R, n)`.
    """
    rows = torch.tensor(table, dtype=features.dtype).to(features.device, non_blocking=True)[features[..., 0].long()]
    return (rows * features[..., 1 : 1 + rows.shape[-1]]).sum(-1)
