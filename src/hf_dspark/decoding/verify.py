"""Which drafted tokens stand, and what follows them.

Source: paper section 2; the acceptance rules of Leviathan et al. 2023 (arXiv 2211.17192), token by token, and of Sun et al. 2024 (arXiv
2403.10444), block verification. What a budget leaves out of a row is the end of its block to both: neither looks past it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding.ngram_copy import Copied
from hf_dspark.decoding.row_stopping import ends
from hf_dspark.decoding.sampling import ELEMENTS_AT_ONCE, draw

# How drafted tokens are judged where tokens are drawn; see `accept_sampled`. Greedily both say the same.
VERIFICATIONS = ("block", "token")
DEFAULT_VERIFICATION = "block"


def check_verification(verification: str) -> None:
    """Refuse what is not one of `VERIFICATIONS`.

    Raises:
        ValueError: naming what is allowed.
    """
    if verification not in VERIFICATIONS:
        raise ValueError(f"verification must be 'block' (block verification) or 'token' (token by token); got {verification!r}.")


@dataclass(frozen=True)
class DraftBlock:
    """What the drafter proposes in one round for R rows, gamma tokens each.

    Attributes:
        tokens (`torch.LongTensor` of shape `(R, gamma)`): x_1..x_gamma, target ids.
        confidence (`torch.Tensor` of shape `(R, gamma)`, *optional*): c_k, calibrated, float32.
        confidence_logits (`torch.Tensor` of shape `(R, gamma)`, *optional*): the same before calibration and sigmoid.
        probs (`torch.Tensor` of shape `(D, gamma, V_draft)`, *optional*): p_d, the distribution that each token was drawn from, before it
            was mixed with `copied`, in the dtype of the base logits; None where the draft is an arg-max.
        mass (`torch.Tensor` of shape `(D, gamma)`, *optional*): what `probs` is to be divided by, where that dtype rounds it; float32.
        draft_ids (`torch.LongTensor` of shape `(V_draft,)`, *optional*): target id of each draft id; None where they
            are the same.
        drawn (`torch.Tensor` of shape `(R, gamma)`, *optional*): probability that each token was drawn with: in p_d, or in the mixture of
            p_d and `copied`; goes with `probs`.
        places (`torch.LongTensor` of shape `(R,)`, *optional*): row of `probs` for each row, where only D of the R rows were
            drafted (any row of it for the others); None where they are the same.
        copied (`Copied`, *optional*): what p_d was mixed with, a row for each of the R.
    """

    tokens: torch.Tensor
    confidence: torch.Tensor | None = None
    probs: torch.Tensor | None = None
    draft_ids: torch.Tensor | None = None
    drawn: torch.Tensor | None = None
    confidence_logits: torch.Tensor | None = None
    places: torch.Tensor | None = None
    copied: Copied | None = None
    mass: torch.Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.tokens.shape[1]

    def truncate(self, length: int) -> DraftBlock:
        """The first `length` tokens of every row, whole record."""
        if length == self.block_size:
            return self
        names = ("tokens", "confidence", "confidence_logits", "probs", "drawn", "mass")
        copied = None if self.copied is None else self.copied.until(length)
        return replace(self, copied=copied, **{name: value[:, :length] for name in names if (value := getattr(self, name)) is not None})

    def part(self, first: int, end: int) -> DraftBlock:
        """The rows from place `first` up to `end`, record by record."""
        if end - first == self.tokens.shape[0]:
            return self
        rows, names = slice(first, end), ["tokens", "confidence", "confidence_logits", "drawn"]
        names += ["probs", "mass"] if self.places is None else ["places"]
        copied = None if self.copied is None else self.copied.on(rows)
        return replace(self, copied=copied, **{name: value[rows] for name in names if (value := getattr(self, name)) is not None})

    def p_d(self, rows: torch.Tensor | slice, positions: torch.Tensor | slice) -> torch.Tensor:
        """`(..., V_draft)` in float32, at these rows and block positions."""
        assert self.probs is not None
        if self.places is not None:
            rows = self.places[rows]
        probs = self.probs[rows, positions].float()
        return probs if self.mass is None else probs / self.mass[rows, positions][..., None]

    def among(self, rows: Sequence[int], total: int) -> DraftBlock:
        """The record of `total` rows, of which these D, `rows`, were drafted; what it holds for the others means nothing."""
        places = [0] * total
        for place, row in enumerate(rows):
            places[row] = place
        index = torch.tensor(places).to(self.tokens.device, non_blocking=True)
        names = ("tokens", "confidence", "confidence_logits", "drawn")
        spread = {name: value[index] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, places=index, copied=None if self.copied is None else self.copied.on(index), **spread)


@dataclass(frozen=True)
class Verdict:
    """Outcome of one verification.

    Attributes:
        accepted (`torch.LongTensor` of shape `(R,)`): drafted tokens that stand, 0..l_r.
        next_token (`torch.LongTensor` of shape `(R,)`): the token after them: a correction, or the bonus where all
            l_r stand.
    """

    accepted: torch.Tensor
    next_token: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[Verdict]) -> Verdict:
        """Of all rows, from those of some after others."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([one.accepted for one in parts]), torch.cat([one.next_token for one in parts]))


@dataclass(frozen=True)
class Conclusion:
    """A round's new tokens and where rows end.

    Attributes:
        tokens (`torch.LongTensor` of shape `(R, n + 1)`): accepted tokens and the target's own behind them; what lies beyond is scratch.
        next_token (`torch.LongTensor` of shape `(R,)`): the target's own.
        host (`torch.LongTensor` of shape `(R, 3)`): what the host has to hear: whether every distribution can be drawn from, accepted
            tokens, and the place of the token that the row would end with.
    """

    tokens: torch.Tensor
    next_token: torch.Tensor
    host: torch.Tensor


def conclude(drafted: torch.Tensor, verdict: Verdict, best: torch.Tensor | None, room: torch.Tensor, eos: torch.Tensor) -> Conclusion:
    """What a verdict leaves of the rows' blocks.

    Args:
        drafted (`torch.LongTensor` of shape `(R, n)`): the drafted tokens.
        verdict (`Verdict`): over them.
        best (`torch.Tensor` of shape `(T,)`, *optional*): the highest score of each processed distribution, where tokens were drawn.
        room (`torch.LongTensor` of shape `(R,)`), eos (`torch.LongTensor` of shape `(E,)`): as in `ends`.
    """
    following = verdict.next_token[:, None]
    tokens = torch.cat([drafted, following], dim=1).scatter(1, verdict.accepted[:, None], following)
    last = ends(tokens, room, eos)
    # Greedy choices need no check.
    finite = torch.ones_like(last) if best is None else (best.abs().amax() < float("inf")).long().expand_as(last)
    return Conclusion(tokens, verdict.next_token, torch.stack([finite, verdict.accepted, last], dim=1))


def _stands(agrees: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Length of the accepted prefix: agreement until the first failure, and never past what was verified."""
    verified = layout.added - 1
    within = torch.arange(agrees.shape[1], device=agrees.device) < verified[:, None]
    return (agrees & within).long().cumprod(dim=1).sum(dim=1)


def accept_greedy(choice: torch.Tensor, block: DraftBlock, layout: RowLayout) -> Verdict:
    """Keep drafted tokens while they are the target's arg-max.

    Args:
        choice (`torch.LongTensor` of shape `(T,)`): the target's arg-max after each token of the flattened pass.
        block (`DraftBlock`): the draft, truncated to the longest verified length.
        layout (`RowLayout`): rows of [anchor, x_1..x_{l_r}].
    """
    padded = choice[layout.padded_index]
    accepted = _stands(block.tokens == padded[:, : block.block_size], layout)
    return Verdict(accepted, padded.gather(1, accepted[:, None])[:, 0])


def accept_sampled(p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, u: torch.Tensor, *, blockwise: bool = False) -> Verdict:
    """Speculative sampling: the result is distributed as p_t exactly, whatever p_d is, as long as x_k was drawn from p_d; where copies
    were drafted too, p_d here is its mixture with them.

    Token by token: x_k stands with probability min(1, p_t / p_d) behind tokens that stand; the first that does not is replaced by a draw
    from norm(max(p_t - p_d, 0)).

    Over the block: x_1..x_k is kept, with or without more behind it, with probability w_k = min(1, w_{k-1} p_t / p_d), w_0 = 1, so that
    likely tokens behind an unlikely one make up for it. Prefixes are tried from the longest on, each with what its longer ones leave of
    that, and behind the one that stands comes a draw from norm(max(w_k p_t - p_d, 0)), or from p_t behind all l_r. On average it keeps
    as many tokens as any rule that is exact round by round, never fewer than token by token.

    Args:
        p_t (`torch.Tensor` of shape `(T, V)`): the target's distribution after each token of the flattened pass,
            float32, after the user's processors.
        block (`DraftBlock`): the draft, truncated to the longest verified length; without `probs` its tokens count as
            certain.
        layout (`RowLayout`): rows of [anchor, x_1..x_{l_r}].
        u (`torch.Tensor` of shape `(R, >= n + 1)`): of `sampling.uniform`; the last for the token behind.
        blockwise (`bool`): over the block; token by token otherwise.
    """
    length = block.block_size
    flat = layout.padded_index
    p_x = p_t[flat[:, :length], block.tokens]
    p_d = torch.ones_like(p_x) if block.drawn is None else block.drawn
    coins, last = u[:, :length], u[:, -1]
    if not (blockwise and length > 1):
        # u < p_t / p_d without the division; u is in [0, 1), so p_t == p_d always accepts and p_t == 0 never does.
        accepted = _stands(coins * p_d < p_x, layout)
        return Verdict(accepted, draw(_after(p_t, block, layout, accepted), last))
    weights = _prefix_weights(p_x, p_d)
    place = torch.arange(1, length + 1, device=p_x.device)
    within = place < layout.added[:, None]
    stands = (coins < _prefix_chances(weights, p_t, block, layout, within)) & within
    accepted = (place * stands).amax(1)
    return Verdict(accepted, draw(_after(p_t, block, layout, accepted, weights), last))


def _after(
    p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, accepted: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """What the token after the accepted ones is drawn from, not normalised, `(R, V)`: p_t where all of them stand, else
    max(w p_t - p_d, 0), w that of the accepted prefix `(R, n)`, or 1.
    """
    rows = torch.arange(layout.num_rows, device=p_t.device)
    final = p_t[layout.padded_index[rows, accepted]]
    if not block.block_size:
        return final
    at = accepted.clamp(max=block.block_size - 1)
    if weights is None:
        residual = final.clone()
    else:
        residual = final * torch.nn.functional.pad(weights, (1, 0), value=1.0)[rows, accepted][:, None]
    if block.probs is None:
        residual[rows, block.tokens[rows, at]] -= 1.0
    else:
        p_d = block.p_d(rows, at)
        if block.copied is not None:
            weight = block.copied.weights[rows, at][:, None]
            p_d = torch.addcmul(p_d, p_d, weight, value=-1)
            residual.scatter_add_(1, block.copied.tokens[rows, at][:, None], -weight)
        residual = residual - p_d if block.draft_ids is None else residual.index_add_(1, block.draft_ids, p_d, alpha=-1)
    residual.clamp_(min=0.0)
    # p_t == p_d up to rounding leaves nothing; then a rejection had probability zero and p_t itself is the limit.
    usable = (accepted + 1 < layout.added) & residual.any(-1)
    return torch.where(usable[:, None], residual, final)


def _prefix_weights(p_x: torch.Tensor, p_d: torch.Tensor) -> torch.Tensor:
    """w_k = min(1, w_{k-1} p_t(x_k) / p_d(x_k)), all of shape `(R, n)`: the product of the ratios since it was last above 1."""
    # Rows that were not drafted may hold anything, zero too, and get anything; none of it is verified.
    total = (p_x / p_d).log().cumsum(1)
    return (total - total.cummax(1).values.clamp(min=0.0)).exp()


def _prefix_chances(weights: torch.Tensor, p_t: torch.Tensor, block: DraftBlock, layout: RowLayout, within: torch.Tensor) -> torch.Tensor:
    """Probability of keeping x_1..x_k if no longer prefix is kept, `(R, n)`: (w_k - o_k) / (1 - o_k), so that it is w_k in all.

    o_k, how likely one of the longer ones is, is how far w_k p_t and the distribution of x_{k+1} overlap; nothing at a row's end.
    """
    length = block.block_size
    w, at = weights[:, :-1], layout.padded_index[:, 1:length]
    if block.probs is None:
        overlap = w * p_t[at, block.tokens[:, 1:]]
    else:
        copied = None if block.copied is None else block.copied.weights[:, 1:length]
        drafted = None if copied is None else 1 - copied
        sums = []
        # So many positions at once that little memory is needed for them, and few kernels; all where the number of rows is a symbol.
        rows: Any = w.shape[0]
        some = length if isinstance(rows, torch.SymInt) else max(ELEMENTS_AT_ONCE // (block.probs.shape[2] * rows), 1)
        for k in range(0, length - 1, some):
            end = min(k + some, length - 1)
            here = slice(k, end)
            p_d = block.p_d(slice(None), slice(k + 1, end + 1))
            p_d = p_d if drafted is None else drafted[:, here, None] * p_d
            reached = p_t[at[:, here]] if block.draft_ids is None else p_t[at[:, here, None], block.draft_ids]
            sums.append(torch.minimum(w[:, here, None] * reached, p_d).sum(-1))
        overlap = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
        if block.copied is not None and copied is not None and drafted is not None:
            # The copy is drawn more often than p_d says, one outside the draft vocabulary too.
            reached = w * p_t[at, block.copied.tokens[:, 1:length]]
            beyond = torch.addcmul(reached, drafted, block.copied.p_d[:, 1:length], value=-1).clamp(min=0.0)
            overlap = overlap + torch.minimum(beyond, copied)
    overlap = torch.nn.functional.pad(overlap * within[:, 1:], (0, 1))
    # 0 / 0 where a prefix is as likely as can be, and so is one of the longer ones.
    return ((weights - overlap) / (1 - overlap)).clamp(0.0, 1.0).nan_to_num(1.0)
