"""N-gram copying: what followed the last earlier occurrence of the last few tokens is mixed into every drafted token.

The drafted token is drawn from (1 - lambda_m) p_d + lambda_m [x = copy], where m is how many of the last tokens the earlier occurrence
agrees with, and lambda_m how often a copy of that length is right where p_d is not. Verification gets that distribution, so the output
stays exact. Names, numbers and repeated phrases come from the text itself, tokens outside a reduced draft vocabulary too.

Source: pointer-generator mixtures (See et al. 2017, arXiv 1704.04368) over the matches of prompt lookup. Not in the DSpark paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_dspark.configuration_dspark import COPY_RELATIONS, DSparkConfig, check_ngram_copying
from hf_dspark.decoding.state import State

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
        self.ids = torch.nn.functional.pad(ids, (0, drafted), value=-1)
        self.ends = lengths
        self.prompt_ends = prompt_ends
        self.weights = torch.tensor([0.0, *weights], dtype=torch.float32).to(ids.device, non_blocking=True)
        self.longest = len(weights)
        self.places = torch.arange(self.ids.shape[1], device=ids.device)[None]
        self.runs = self._suffixes()
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

    def _suffixes(self) -> torch.Tensor:
        """How many tokens up to each place equal the text's last ones, `(R, W)`, at most M; any number where no earlier match ends."""
        return self._suffixes_step_by_step() if self.ids.device.type == "cpu" else self._suffixes_at_once()

    def _suffixes_at_once(self) -> torch.Tensor:
        """In 2 R W (M + 1) bytes: no host has to hear whether a match is left."""
        back = torch.arange(self.longest, -1, -1, device=self.ids.device)  # the last one differs from everything: it ends the longest run
        last = self.ids.gather(1, (self.ends - 1 - back).clamp(min=0))
        last = torch.where((back < self.ends) & (back < self.longest) & (last >= 0), last, -2)
        # Views of the ids, oldest first; what is turned round is one byte a token.
        before = torch.nn.functional.pad(self.ids, (self.longest, 0), value=-3).unfold(1, self.longest + 1, 1)
        return (before != last[:, None]).flip(-1).view(torch.uint8).argmax(-1)

    def _suffixes_step_by_step(self) -> torch.Tensor:
        """One token further back at a time, as long as anything matches: mostly a few steps."""
        runs, width = torch.zeros_like(self.ids), self.ids.shape[1]
        agree = self.places < self.ends - 1
        for back in range(min(self.longest, width)):
            last = self.ids.gather(1, (self.ends - 1 - back).clamp(min=0))
            same = (self.ids == last) & (last >= 0) & (self.ends > back)
            agree = agree & torch.nn.functional.pad(same[:, : width - back], (back, 0))
            if not agree.any():
                break
            runs += agree
        return runs

    def _look(self) -> None:
        follows = torch.nn.functional.pad(self.ids[:, 1:], (0, 1), value=-1)  # negative at masked tokens, which are never copied
        earlier = torch.where((self.places < self.ends - 1) & (follows >= 0), self.runs, 0)
        found = (earlier * self.places.shape[1] + self.places).argmax(1, keepdim=True)  # the longest, and of these the last
        length = earlier.gather(1, found)
        self.tokens = self.ids.gather(1, (found + 1).clamp(max=self.ids.shape[1] - 1))[:, 0].clamp(min=0)
        self.lengths = length[:, 0]
        self.weight = self.weights[self.lengths]
        self.from_prompt = found[:, 0] + 1 < self.prompt_ends
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
