"""The training objective over sampled blocks and its metrics. Does not know models, files or training loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CACHED_NUMBERS = 2**20  # of float32: 4 MiB


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the three terms, the decay along the block, and what the cross entropy is taken against.

    Source: paper Eqs. 8-12 and the released recipe (0.1, 0.9, 1.0; decay 4.0 at block 7). Differs: `soft_labels` is ours.

    Args:
        cross_entropy, total_variation, confidence (`float`): coefficients.
        decay (`float`): tokens after which a position's weight has fallen to 1/e.
        soft_labels (`float`): share, in [0, 1], of the cross entropy taken against the target's whole distribution p_t instead of
            against the one token of the data (the paper's form, 0).
    """

    cross_entropy: float = 0.1
    total_variation: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    soft_labels: float = 0.0


def position_weights(block_size: int, decay: float) -> Tensor:
    """w_k = exp(-(k - 1) / decay) for k = 1..block_size.

    Source: paper Eq. 9 (there decay = block_size; released configs use 4.0 at block 7).

    Args:
        block_size (`int`): gamma.
        decay (`float`): tokens after which the weight has fallen to 1/e.
    Returns:
        `torch.Tensor` of shape `(block_size,)`: float32, 1 at the first position.
    Raises:
        ValueError: if decay is not positive.
    """
    if not decay > 0:
        raise ValueError(f"decay is {decay}; allowed: above 0. Use 4.0 for a block of 7, or float('inf') for equal weights.")
    return torch.exp(-torch.arange(block_size, dtype=torch.float32) / decay)


@dataclass(frozen=True)
class TargetProbabilities:
    """The target's distribution at m row positions, on the draft vocabulary.

    Args:
        inside (`torch.Tensor` of shape `(m, draft_vocab)`): p_t on the draft ids, float32; sums to 1 - outside.
        outside (`torch.Tensor` of shape `(m,)`): p_t's mass that no draft token can reach; 0 with the full vocabulary.
        best (`torch.Tensor` of shape `(m,)`): draft index of the target's most likely token, -1 where it is outside.
    """

    inside: Tensor
    outside: Tensor
    best: Tensor


def row_blocks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that elementwise work goes through one after the other: as many as a CPU's cache holds a few copies of; all at once on
    an accelerator.

    Args:
        count (`int`): rows.
        width (`int`): float32 numbers of a row.
        device (`torch.device`): where they are.
    """
    size = max(1, _CACHED_NUMBERS // width) if device.type == "cpu" else max(1, count)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class TargetHead:
    """p_t from the target's last hidden states, for as few positions at a time as the caller asks for.

    Holds a copy of a plain linear head with the draft tokens' rows first (vocab * hidden * bytes of its dtype; 57 MB
    for
    SmolLM2-135M in bf16), so that the draft columns of the logits are a slice. Any other head is called as a module.

    Args:
        output_embeddings (`torch.nn.Module`): the target's lm_head.
        draft_token_ids (`torch.Tensor` of shape `(draft_vocab,)`, *optional*): target ids; None is the full vocabulary.
        softcap (`float`, *optional*): final logit soft-cap c, logits <- c tanh(logits / c).
    """

    def __init__(self, output_embeddings: nn.Module, draft_token_ids: Tensor | None = None, *, softcap: float | None = None) -> None:
        self._head = output_embeddings
        self._ids = draft_token_ids
        self._softcap = softcap
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if type(output_embeddings) is not nn.Linear:
            return
        weight, bias = output_embeddings.weight.detach(), output_embeddings.bias
        if draft_token_ids is None:
            self._weight, self._bias = weight, None if bias is None else bias.detach()
        else:
            ids = draft_token_ids.to(weight.device)
            rest = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
            rest[ids] = False
            order = torch.cat([ids, rest.nonzero().squeeze(1)])
            self._weight, self._bias = weight[order], None if bias is None else bias.detach()[order]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(m, vocab)` before the soft-cap, in the head's dtype; draft columns come first where it is a plain linear layer."""
        return self._head(hidden) if self._weight is None else F.linear(hidden.to(self._weight.dtype), self._weight, self._bias)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> TargetProbabilities:
        """p_t at the given positions.

        Args:
            hidden (`torch.Tensor` of shape `(m, hidden)`): the target's last hidden states, after its final norm.
        Returns:
            `TargetProbabilities`: float32.
        """
        logits = self.logits(hidden)
        count, vocab = logits.shape
        size = vocab if self._ids is None else self._ids.numel()
        ids = None if self._ids is None or self._weight is not None else self._ids.to(logits.device)
        inside = torch.empty(count, size, device=logits.device)
        best = torch.empty(count, dtype=torch.long, device=logits.device)
        for block in row_blocks(count, vocab, logits.device):
            z = logits[block].float()
            if self._softcap is not None:
                z = torch.tanh(z / self._softcap) * self._softcap
            best[block] = z.argmax(dim=-1)
            p = z.softmax(dim=-1)
            inside[block] = p[:, :size] if ids is None else p[:, ids]
        if self._ids is None:
            return TargetProbabilities(inside, torch.zeros_like(inside[:, 0]), best)
        if ids is None:
            best = best.masked_fill(best >= size, -1)
        else:
            index = torch.full((vocab,), -1, dtype=torch.long, device=logits.device)
            index[ids] = torch.arange(size, device=logits.device)
            best = index[best]
        return TargetProbabilities(inside, (1 - inside.sum(dim=-1)).clamp_(min=0), best)


@dataclass
class Tally:
    """Named sums kept as numerator and denominator, so that batches, groups and processes can be added exactly."""

    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        top, bottom = numerator.detach().double().cpu(), denominator.detach().double().cpu()
        if name in self.sums:
            top, bottom = top + self.sums[name][0], bottom + self.sums[name][1]
        self.sums[name] = (top, bottom)

    def merge(self, other: Tally) -> Tally:
        for name, (top, bottom) in other.sums.items():
            self.add(name, top, bottom)
        return self

    def values(self) -> dict[str, Any]:
        """Ratios as floats or lists of floats; None where nothing was counted."""

        def ratio(top: Any, bottom: Any) -> Any:
            if isinstance(bottom, list):
                return [ratio(t, b) for t, b in zip(top, bottom, strict=True)]
            return round(top / bottom, 6) if bottom else None

        return {name: ratio(top.tolist(), bottom.tolist()) for name, (top, bottom) in self.sums.items()}


@dataclass(frozen=True)
class LossResult:
    """The loss of one batch of blocks and what the metrics need.

    Args:
        loss (`torch.Tensor`): scalar, float32; gradients flow to the draft hidden states, the latents and the head.
        terms (`dict[str, torch.Tensor]`): unweighted cross_entropy, total_variation (an L1 distance, 0 to 2),
            confidence.
        acceptance (`torch.Tensor` of shape `(batch, anchors, block_size)`): 1 - 0.5 L1(p_d, p_t), 0 where unsupervised.
        agreement (`torch.Tensor` of shape `(batch, anchors, block_size)`): bool, both distributions have the same
            arg-max.
        confidence_error (`torch.Tensor` of shape `(batch, anchors, block_size)`): |c_k - acceptance|; None without a
            head.
        position_mask (`torch.Tensor` of shape `(batch, anchors, block_size)`): bool, as passed in.
        labels_outside (`torch.Tensor`): scalar; supervised labels that are not in the draft vocabulary.
        cross_entropy_per_position (`torch.Tensor` of shape `(batch, anchors, block_size)`): nats, 0 where masked from
            the term.
        label_inside (`torch.Tensor` of shape `(batch, anchors, block_size)`): bool, supervised and in the draft
            vocabulary.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    acceptance: Tensor
    agreement: Tensor
    confidence_error: Tensor | None
    position_mask: Tensor
    labels_outside: Tensor
    cross_entropy_per_position: Tensor
    label_inside: Tensor

    def tally(self, rows: Tensor | None = None) -> Tally:
        """Metrics of all rows, or of those in a bool tensor of shape `(batch,)`.

        `tau_sampled` and `tau_greedy` are teacher-forced estimates of the accepted length a round including the bonus
        token (paper's convention), over blocks that are supervised to their end: 1 + E[accepted prefix] with
        acceptance 1 - TV for T = 1, and with arg-max agreement for T = 0. They overstate decoding by about a tenth.
        """
        mask = self.position_mask if rows is None else self.position_mask & rows.to(self.position_mask.device).view(-1, 1, 1)
        whole = mask.all(dim=-1)
        inside = self.label_inside & mask
        tally = Tally()
        tally.add("acceptance", (self.acceptance * mask).sum(dim=(0, 1)), mask.sum(dim=(0, 1)))
        tally.add("agreement", (self.agreement & mask).sum(dim=(0, 1)), mask.sum(dim=(0, 1)))
        for name, kept in (("tau_sampled", self.acceptance), ("tau_greedy", self.agreement.float())):
            prefix = 1 + kept.cumprod(dim=-1).sum(dim=-1)
            tally.add(name, (prefix * whole).sum(), whole.sum())
        tally.add("cross_entropy", (self.cross_entropy_per_position * inside).sum(), inside.sum())
        tally.add("labels_outside", (mask & ~inside).sum(), mask.sum())
        if self.confidence_error is not None:
            tally.add("confidence_error", (self.confidence_error * mask).sum(), mask.sum())
        return tally


@dataclass(frozen=True)
class _Positions:
    """Supervised positions in the order of their target positions, and everything a chunk of them needs."""

    labels: Tensor  # (n,) draft indices, -1 outside the draft vocabulary
    target_hidden: Tensor  # (u, d) one row for each distinct target position
    target_rows: Tensor  # (n,) non-decreasing, into target_hidden
    ce_scale: Tensor  # (n,) coefficient of the cross entropy at each position, normalised; 0 for labels outside
    soft_scale: Tensor  # (n,) coefficient of the cross entropy against p_t at each position, normalised
    tv_scale: Tensor  # (n,) coefficient of the L1 distance at each position, normalised
    draft_logits: Callable[[Tensor, Tensor | None], Tensor]
    target: Callable[[Tensor], TargetProbabilities]
    chunk: int
    needs_grad: bool
    soft: bool  # whether any of the cross entropy is taken against p_t


class _BlockObjective(torch.autograd.Function):
    """sum_i ce_scale_i CE_i + soft_scale_i SCE_i + tv_scale_i L1_i with its gradient taken chunk by chunk in the forward pass.

    The gradient with respect to the draft logits z, with p = softmax(z), s = sign(p - p_t) and m the mass of p_t on the draft vocabulary,
    is ce_scale (p - onehot) + soft_scale (m p - p_t) + tv_scale p (s - <p, s>); it meets autograd again at `draft_logits`.
    """

    @staticmethod
    def forward(ctx: Any, positions: _Positions, hidden: Tensor, latent: Tensor | None, *parameters: Tensor) -> tuple[Tensor, ...]:
        count = hidden.shape[0]
        device = hidden.device
        cross_entropy = torch.zeros(count, device=device)
        soft_cross_entropy = torch.zeros(count, device=device)
        distance = torch.zeros(count, device=device)
        agreement = torch.zeros(count, dtype=torch.bool, device=device)
        grads: list[Tensor | None] = []
        if positions.needs_grad:
            grads = [torch.zeros_like(hidden), None if latent is None else torch.zeros_like(latent)]
            grads += [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for start in range(0, count, positions.chunk):
            part = slice(start, min(start + positions.chunk, count))
            with torch.set_grad_enabled(positions.needs_grad):
                inputs = [hidden[part].detach().requires_grad_(positions.needs_grad)]
                if latent is not None:
                    inputs.append(latent[part].detach().requires_grad_(positions.needs_grad))
                logits = positions.draft_logits(inputs[0], inputs[1] if latent is not None else None)
            raw = logits.detach()
            slopes = torch.empty_like(raw) if positions.needs_grad else None
            rows = positions.target_rows[part]
            first = int(rows[0])
            p_t = positions.target(positions.target_hidden[first : int(rows[-1]) + 1])
            for block in row_blocks(raw.shape[0], raw.shape[1], device):
                here = slice(start + block.start, start + block.stop)
                index = rows[block] - first
                inside, outside = p_t.inside[index], p_t.outside[index]
                z = raw[block].float()
                agreement[here] = z.argmax(dim=-1) == p_t.best[index]
                labels = positions.labels[here].clamp(min=0).unsqueeze(1)
                p_d = z.log_softmax(dim=-1)
                cross_entropy[here] = -p_d.gather(1, labels).squeeze(1) * (positions.labels[here] >= 0)
                if positions.soft:
                    soft_cross_entropy[here] = -(p_d * inside).sum(dim=-1)
                p_d.exp_()
                difference = p_d - inside
                distance[here] = torch.linalg.vector_norm(difference, ord=1, dim=-1) + outside
                if slopes is None:
                    continue
                ce, tv, soft = (scale[here].unsqueeze(1) for scale in (positions.ce_scale, positions.tv_scale, positions.soft_scale))
                signed = difference.sign_().mul_(p_d)
                mean_sign = signed.sum(dim=-1, keepdim=True)
                slope = signed.mul_(tv).addcmul_(p_d, ce - tv * mean_sign + soft * (1 - outside).unsqueeze(1))
                if positions.soft:
                    slope.sub_(inside.mul_(soft))
                slopes[block] = slope.scatter_add_(1, labels, -ce)
            if slopes is None:
                continue
            wanted = [*inputs, *parameters]
            found = torch.autograd.grad(logits, wanted, slopes, allow_unused=True)
            grads[0][part] = found[0]  # type: ignore[index]
            if latent is not None:
                grads[1][part] = found[1]  # type: ignore[index]
            for total, piece in zip(grads[2:], found[len(inputs) :], strict=True):
                if piece is not None:
                    total += piece  # type: ignore[operator]
        ctx.dtypes = [hidden.dtype, None if latent is None else latent.dtype, *(p.dtype for p in parameters)]
        ctx.save_for_backward(*grads)
        total_loss = (positions.ce_scale * cross_entropy).sum() + (positions.tv_scale * distance).sum()
        total_loss = total_loss + (positions.soft_scale * soft_cross_entropy).sum()
        ctx.mark_non_differentiable(cross_entropy, distance, agreement)
        return total_loss, cross_entropy, distance, agreement

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grad_outputs[0]).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *scaled


def weight_totals(
    target_ids: Tensor, position_mask: Tensor, weights: LossWeights, label_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the terms of a step are divided by: sums of w_k over all supervised positions of all its parts.

    Args:
        target_ids (`torch.Tensor` of shape `(batch, anchors, block_size)`): labels, target ids.
        position_mask (`torch.Tensor` of shape `(batch, anchors, block_size)`): bool, supervised positions.
        weights (`LossWeights`): whose decay gives w_k.
        label_index (`torch.Tensor` of shape `(vocab,)`, *optional*): as in `dspark_loss`.
    Returns:
        `tuple` of scalars: over positions whose label is in the draft vocabulary (for the CE), and over all.
    """
    w = position_weights(position_mask.shape[-1], weights.decay).to(position_mask.device) * position_mask
    known = torch.ones_like(position_mask) if label_index is None else label_index.to(target_ids.device)[target_ids] >= 0
    return (w * known).sum(), w.sum()


def dspark_loss(
    *,
    hidden: Tensor,
    latent: Tensor | None,
    confidence_logits: Tensor | None,
    target_ids: Tensor,
    target_index: Tensor,
    position_mask: Tensor,
    target_hidden: Tensor,
    draft_logits: Callable[[Tensor, Tensor | None], Tensor],
    target: Callable[[Tensor], TargetProbabilities],
    weights: LossWeights,
    parameters: Sequence[Tensor] = (),
    label_index: Tensor | None = None,
    chunk_positions: int = 256,
    totals: tuple[Tensor, Tensor] | None = None,
) -> LossResult:
    """a_ce CE + a_tv sum_k w_k ||p_d - p_t||_1 + a_conf BCE(c_k, 1 - 0.5 ||p_d - p_t||_1), teacher-forced.

    Every term is a mean over supervised positions with the weights w_k (CE: over those whose label is in the draft
    vocabulary). With a reduced draft vocabulary p_t keeps its full normalisation and its mass outside counts as L1
    distance that no draft can remove. With soft labels that share of the CE is taken against p_t on the draft vocabulary.

    Source: paper Eqs. 8-12. Differs: the weights are normalised by their sum.

    Memory: logits exist for one chunk of n positions at a time, and p_t once for each distinct target position in it
    (m <= n). Peak, in bytes: n V_d (2 logits in bf16 + 2 their gradient) + m (2 V + 4 V_d), and on a CPU a few blocks of
    4 MiB besides (on an accelerator 16 n V_d + 8 m V: all rows at once); for n = 256, m = 128, V = 49,152,
    V_d = 12,288: 31 MB. Nothing of vocabulary size survives the call but gradients of the head's own weights.

    Args:
        hidden (`torch.Tensor` of shape `(batch, anchors, block_size, hidden)`): h from the drafter.
        latent (`torch.Tensor` of shape `(batch, anchors, block_size, rank)`, *optional*): the sequential head's
            latents.
        confidence_logits (`torch.Tensor` of shape `(batch, anchors, block_size)`, *optional*): before calibration.
        target_ids (`torch.Tensor` of shape `(batch, anchors, block_size)`): labels, target ids.
        target_index (`torch.Tensor` of shape `(batch, anchors, block_size)`): row positions that give p_t.
        position_mask (`torch.Tensor` of shape `(batch, anchors, block_size)`): bool, supervised positions.
        target_hidden (`torch.Tensor` of shape `(batch, sequence, hidden)`): the target's last hidden states.
        draft_logits (`Callable`): `(h (n, hidden), latent (n, rank) or None) -> (n, draft_vocab)` logits U + B.
        target (`Callable`): `(m, hidden) -> TargetProbabilities`, for example a `TargetHead`.
        weights (`LossWeights`): coefficients.
        parameters: tensors used by `draft_logits` that want a gradient (the head's second matrix).
        label_index (`torch.Tensor` of shape `(vocab,)`, *optional*): draft index of each target id, -1 where it has
            none.
        chunk_positions (`int`): n above.
        totals (`tuple[torch.Tensor, torch.Tensor]`, *optional*): from `weight_totals` of the whole step, where this call
            sees a part of it; the losses of all parts then add up to that of the whole. A part may be without a
            supervised position. By default this call's own positions are the whole.
    Returns:
        `LossResult`: the loss, its terms, and per-position acceptance and agreement.
    Raises:
        ValueError: if no position is supervised in a whole step, or chunk_positions is below 1.
    """
    if chunk_positions < 1:
        raise ValueError(f"chunk_positions is {chunk_positions}; allowed: 1 or more. Use 128 to 512.")
    if totals is None and not bool(position_mask.any()):
        raise ValueError("no supervised position in this batch; allowed: one or more. Drop rows with fewer than two response tokens.")
    shape, device = position_mask.shape, hidden.device
    batch_rows = torch.arange(shape[0], device=device).view(-1, 1, 1)
    flat_target = (batch_rows * target_hidden.shape[1] + target_index).reshape(-1)
    kept = position_mask.reshape(-1).nonzero().squeeze(1)
    kept = kept[flat_target[kept].argsort(stable=True)]
    distinct, target_rows = flat_target[kept].unique_consecutive(return_inverse=True)

    labels = target_ids.reshape(-1)[kept]
    labels = labels if label_index is None else label_index.to(device)[labels]
    w = position_weights(shape[-1], weights.decay).to(device).expand(shape).reshape(-1)[kept]
    known = labels >= 0
    known_total, total = ((w * known).sum(), w.sum()) if totals is None else (t.to(device) for t in totals)
    ce_share = w * known / known_total.clamp(min=torch.finfo(torch.float32).tiny)
    tv_share = w / total

    needs_grad = torch.is_grad_enabled() and (
        hidden.requires_grad or (latent is not None and latent.requires_grad) or any(p.requires_grad for p in parameters)
    )
    positions = _Positions(
        labels=labels,
        target_hidden=target_hidden.reshape(-1, target_hidden.shape[-1])[distinct],
        target_rows=target_rows,
        ce_scale=weights.cross_entropy * (1 - weights.soft_labels) * ce_share,
        soft_scale=weights.cross_entropy * weights.soft_labels * tv_share,
        soft=weights.soft_labels > 0,
        tv_scale=weights.total_variation * tv_share,
        draft_logits=draft_logits,
        target=target,
        chunk=chunk_positions,
        needs_grad=needs_grad,
    )
    flat_hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept)
    flat_latent = None if latent is None else latent.reshape(-1, latent.shape[-1]).index_select(0, kept)
    loss, cross_entropy, distance, agreement = _BlockObjective.apply(positions, flat_hidden, flat_latent, *parameters)
    acceptance = (1 - 0.5 * distance).clamp(0, 1)
    terms = {"cross_entropy": (ce_share * cross_entropy).sum(), "total_variation": (tv_share * distance).sum()}

    def scatter(values: Tensor) -> Tensor:
        return values.new_zeros(position_mask.numel()).index_copy_(0, kept, values).view(shape)

    confidence_error = None
    if confidence_logits is not None:
        logit = confidence_logits.reshape(-1).index_select(0, kept).float()
        term = (tv_share * F.binary_cross_entropy_with_logits(logit, acceptance, reduction="none")).sum()
        loss = loss + weights.confidence * term
        terms["confidence"] = term.detach()
        confidence_error = scatter((logit.detach().sigmoid() - acceptance).abs())
    return LossResult(
        loss=loss,
        terms=terms,
        acceptance=scatter(acceptance),
        agreement=scatter(agreement),
        confidence_error=confidence_error,
        position_mask=position_mask,
        labels_outside=(~known).sum(),
        cross_entropy_per_position=scatter(cross_entropy),
        label_inside=scatter(known),
    )
