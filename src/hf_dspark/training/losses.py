"""The training objective over sampled blocks (paper Eqs. 8-12), its gradient, and its metrics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training.blocks import Blocks, BlockTargets
from hf_dspark.training.configuration import LossWeights
from hf_dspark.training.target_states import TargetHead, TargetProbabilities, TargetStates, places, row_blocks

DraftLogits = Callable[[Tensor, Tensor | None], Tensor]


def position_weights(block_size: int, decay: float) -> Tensor:
    """w_k = exp(-(k - 1) / decay) for k = 1..block_size, float32 `(block_size,)`.

    Source: paper Eq. 9 (there decay = block_size; released configs use 4.0 at block 7).

    Raises:
        ValueError: if decay is not positive.
    """
    if not decay > 0:
        raise ValueError(f"decay is {decay}; allowed: above 0. Use 4.0 for a block of 7, or float('inf') for equal weights.")
    return torch.exp(-torch.arange(block_size, dtype=torch.float32) / decay)


def weight_totals(targets: BlockTargets, weights: LossWeights, label_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the terms of a step are divided by: sums of w_k over the supervised positions of all its parts, first over those whose label is
    in the draft vocabulary (for the CE), then over all; `label_index` as in `dspark_loss`."""
    mask, ids = targets.position_mask, targets.target_ids
    w = position_weights(mask.shape[-1], weights.decay).to(mask.device) * mask
    known = torch.ones_like(mask) if label_index is None else label_index.to(ids.device)[ids] >= 0
    return (w * known).sum(), w.sum()


@dataclass
class Tally:
    """Named sums as numerator and denominator, so that batches, groups and processes can be added exactly."""

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
        found: dict[str, Any] = {}
        for name, (top, bottom) in self.sums.items():
            pairs = zip(top.reshape(-1).tolist(), bottom.reshape(-1).tolist(), strict=True)
            ratios = [round(t / b, 6) if b else None for t, b in pairs]
            found[name] = ratios if bottom.dim() else ratios[0]
        return found


@dataclass(frozen=True)
class LossResult:
    """The loss of one batch of blocks and what the metrics need, a number for each of the `(batch, anchors, block_size)` positions."""

    loss: Tensor  # scalar; gradients flow to the draft hidden states, the latents and the head
    terms: dict[str, Tensor]  # unweighted cross_entropy (nats), total_variation (an L1 distance, 0 to 2), confidence (nats)
    acceptance: Tensor  # 1 - 0.5 ||p_d - p_t||_1, 0 where unsupervised
    agreement: Tensor  # bool, both distributions have the same arg-max
    confidence_error: Tensor | None  # |c_k - acceptance|
    position_mask: Tensor  # bool, supervised
    cross_entropy: Tensor  # nats, 0 where the label is outside the draft vocabulary
    label_inside: Tensor  # bool, supervised and in the draft vocabulary

    def tally(self, rows: Tensor | None = None) -> Tally:
        """Metrics of all rows, or of those in a bool tensor of shape `(batch,)`.

        `tau_sampled` and `tau_greedy` are teacher-forced estimates of the accepted length a round including the bonus token, over blocks
        that are supervised to their end: 1 + E[accepted prefix] with acceptance 1 - TV for T = 1, and with arg-max agreement for T = 0.
        They overstate decoding by about a tenth.
        """
        mask = self.position_mask if rows is None else self.position_mask & rows.to(self.position_mask.device).view(-1, 1, 1)
        whole = mask.all(dim=-1)
        inside = self.label_inside & mask
        tally = Tally()
        tally.add("acceptance", (self.acceptance * mask).sum(dim=(0, 1)), mask.sum(dim=(0, 1)))
        tally.add("agreement", (self.agreement & mask).sum(dim=(0, 1)), mask.sum(dim=(0, 1)))
        for name, survives in (("tau_sampled", self.acceptance), ("tau_greedy", self.agreement.float())):
            prefix = 1 + survives.cumprod(dim=-1).sum(dim=-1)
            tally.add(name, (prefix * whole).sum(), whole.sum())
        tally.add("cross_entropy", (self.cross_entropy * inside).sum(), inside.sum())
        tally.add("labels_outside", (mask & ~inside).sum(), mask.sum())
        if self.confidence_error is not None:
            tally.add("confidence_error", (self.confidence_error * mask).sum(), mask.sum())
        return tally


class _Positions:
    """The n supervised positions in the order of their target positions, and everything that a chunk of them needs."""

    def __init__(
        self,
        targets: BlockTargets,
        target_hidden: Tensor,
        weights: LossWeights,
        label_index: Tensor | None,
        totals: tuple[Tensor, Tensor] | None,
    ) -> None:
        shape, device = targets.position_mask.shape, targets.position_mask.device
        batch_rows = torch.arange(shape[0], device=device).view(-1, 1, 1)
        flat_target = (batch_rows * target_hidden.shape[1] + targets.target_index).reshape(-1)
        index = targets.position_mask.reshape(-1).nonzero().squeeze(1)
        self.index = index[flat_target[index].argsort(stable=True)]  # into the flattened (batch, anchors, block_size)
        distinct, self.target_rows = flat_target[self.index].unique_consecutive(return_inverse=True)
        self.target_hidden = target_hidden.reshape(-1, target_hidden.shape[-1])[distinct]  # one row for each of target_rows
        labels = targets.target_ids.reshape(-1)[self.index]
        self.labels = labels if label_index is None else label_index.to(device)[labels]  # -1 outside the draft vocabulary
        w = position_weights(shape[-1], weights.decay).to(device).expand(shape).reshape(-1)[self.index]
        known = w * (self.labels >= 0)
        known_total, total = (t.to(device) for t in totals or (known.sum(), w.sum()))
        self.ce_share, self.tv_share = known / known_total.clamp(min=torch.finfo(torch.float32).tiny), w / total
        hard, self.soft = weights.cross_entropy * (1 - weights.soft_labels), weights.cross_entropy * weights.soft_labels
        # Coefficients of CE, CE against p_t and L1.
        self.scales = hard * self.ce_share, self.soft * self.tv_share, weights.total_variation * self.tv_share

    def pick(self, values: Tensor) -> Tensor:
        """The supervised ones of `(batch, anchors, block_size, ..)`, `(n, ..)`."""
        return values.reshape(-1, *values.shape[3:]).index_select(0, self.index)

    def compare(
        self, raw: Tensor, p_t: TargetProbabilities, here: slice, slopes: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Loss, CE, L1 distance and arg-max agreement of some positions, and where wanted the loss's gradient at their draft logits.

        With p = softmax(z), s = sign(p - p_t) and m the mass of p_t on the draft vocabulary, the gradient with respect to z is
        a_ce (p - onehot) + a_soft (m p - p_t) + a_tv p (s - <p, s>), each coefficient times the position's share of the weights.
        """
        ce, soft_ce, tv = (scale[here].unsqueeze(1) for scale in self.scales)
        z, labels = raw.float(), self.labels[here]
        columns = labels.clamp(min=0).unsqueeze(1)
        agreement = z.argmax(dim=-1) == p_t.best
        p_d = z.log_softmax(dim=-1)
        cross_entropy = -p_d.gather(1, columns).squeeze(1) * (labels >= 0)
        loss = ce.squeeze(1) * cross_entropy
        if self.soft:
            loss -= soft_ce.squeeze(1) * (p_d * p_t.inside).sum(dim=-1)
        p_d.exp_()
        difference = p_d - p_t.inside
        distance = torch.linalg.vector_norm(difference, ord=1, dim=-1) + p_t.outside
        loss += tv.squeeze(1) * distance
        if not slopes:
            return loss, cross_entropy, distance, agreement, None
        signed = difference.sign_().mul_(p_d)
        mean_sign = signed.sum(dim=-1, keepdim=True)
        slope = signed.mul_(tv).addcmul_(p_d, ce - tv * mean_sign + soft_ce * (1 - p_t.outside).unsqueeze(1))
        if self.soft:
            slope.sub_(p_t.inside.mul_(soft_ce))
        return loss, cross_entropy, distance, agreement, slope.scatter_add_(1, columns, -ce)


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the positions' losses, with its gradient taken chunk by chunk in the forward pass; it meets autograd again at
    `draft_logits`. The tensors are the states of the positions (hidden, and latent where there is one), then parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        positions: _Positions,
        draft_logits: DraftLogits,
        target: Callable[[Tensor], TargetProbabilities],
        chunk: int,
        needs_grad: bool,
        num_states: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        states, parameters = tensors[:num_states], tensors[num_states:]
        count, device = states[0].shape[0], states[0].device
        measured = [torch.zeros(count, device=device) for _ in range(3)] + [torch.zeros(count, dtype=torch.bool, device=device)]
        state_grads = [torch.zeros_like(state) for state in states] if needs_grad else []
        grads = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters] if needs_grad else []
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            with torch.set_grad_enabled(needs_grad):
                leaves = [state[part].detach().requires_grad_(needs_grad) for state in states]
                logits = draft_logits(leaves[0], leaves[1] if num_states > 1 else None)
            raw = logits.detach()
            slopes = torch.empty_like(raw) if needs_grad else None
            rows = positions.target_rows[part]
            first = int(rows[0])
            p_t = target(positions.target_hidden[first : int(rows[-1]) + 1])
            for block in row_blocks(raw.shape[0], raw.shape[1], device):
                here = slice(start + block.start, start + block.stop)
                *found, slope = positions.compare(raw[block], p_t.rows(rows[block] - first), here, needs_grad)
                for values, piece in zip(measured, found, strict=True):
                    values[here] = piece
                if slopes is not None and slope is not None:
                    slopes[block] = slope
            if slopes is None:
                continue
            pieces = torch.autograd.grad(logits, [*leaves, *parameters], slopes, allow_unused=True)
            for grad, piece in zip(state_grads, pieces, strict=False):
                grad[part] = piece
            for grad, piece in zip(grads, pieces[num_states:], strict=True):
                if piece is not None:
                    grad += piece
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*state_grads, *grads)
        ctx.mark_non_differentiable(*measured[1:])
        return measured[0].sum(), *measured[1:]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [(grad * grad_outputs[0]).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, None, None, None, None, *scaled


def dspark_loss(
    hidden: Tensor,
    latent: Tensor | None,
    confidence_logits: Tensor | None,
    targets: BlockTargets,
    target_hidden: Tensor,
    *,
    draft_logits: DraftLogits,
    target: Callable[[Tensor], TargetProbabilities],
    weights: LossWeights,
    parameters: Sequence[Tensor] = (),
    label_index: Tensor | None = None,
    chunk_positions: int = 256,
    totals: tuple[Tensor, Tensor] | None = None,
) -> LossResult:
    """a_ce CE + a_tv sum_k w_k ||p_d - p_t||_1 + a_conf BCE(c_k, 1 - 0.5 ||p_d - p_t||_1), teacher-forced.

    Every term is a mean over supervised positions with the weights w_k (CE: over those whose label is in the draft vocabulary). With a
    reduced draft vocabulary p_t has its full normalisation, and its mass outside counts as L1 distance that no draft can remove. With soft
    labels that share of the CE is taken against p_t on the draft vocabulary.

    Source: paper Eqs. 8-12. Differs: the weights are normalised by their sum.

    Args:
        hidden (`torch.Tensor` of shape `(batch, anchors, block_size, hidden)`): h from the drafter.
        latent (`torch.Tensor` of shape `(batch, anchors, block_size, rank)`, *optional*): the sequential head's latents.
        confidence_logits (`torch.Tensor` of shape `(batch, anchors, block_size)`, *optional*): before calibration.
        targets (`BlockTargets`): labels, their positions, and which are supervised.
        target_hidden (`torch.Tensor` of shape `(batch, sequence, hidden)`): the target's last hidden states.
        draft_logits (`Callable`): `(h (n, hidden), latent (n, rank) or None) -> (n, draft_vocab)` logits U + B.
        target (`Callable`): `(m, hidden) -> TargetProbabilities`, for example a `TargetHead`.
        weights (`LossWeights`): coefficients.
        parameters: tensors used by `draft_logits` that want a gradient (the head's second matrix).
        label_index (`torch.Tensor` of shape `(vocab,)`, *optional*): draft index of each target id, -1 where it has none.
        chunk_positions (`int`): positions whose logits exist at one time; 31 MB for 256 of them with V = 49,152 and V_draft = 12,288.
        totals (*optional*): `weight_totals` of the whole step where this call sees a part of it, which may be without a supervised
            position; the losses of all parts then add up to that of the whole.
    Raises:
        ValueError: if no position is supervised in a whole step.
    """
    if totals is None and not bool(targets.position_mask.any()):
        raise ValueError("no supervised position in this batch; allowed: one or more. Drop rows with fewer than two response tokens.")
    positions = _Positions(targets, target_hidden, weights, label_index, totals)
    states = [positions.pick(state) for state in (hidden, latent) if state is not None]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*states, *parameters))
    loss, cross_entropy, distance, agreement = _ChunkedLoss.apply(
        positions, draft_logits, target, chunk_positions, needs_grad, len(states), *states, *parameters
    )
    acceptance = (1 - 0.5 * distance).clamp(0, 1)
    terms = {"cross_entropy": (positions.ce_share * cross_entropy).sum(), "total_variation": (positions.tv_share * distance).sum()}

    def scatter(values: Tensor) -> Tensor:
        return values.new_zeros(targets.position_mask.numel()).index_copy_(0, positions.index, values).view(targets.position_mask.shape)

    confidence_error = None
    if confidence_logits is not None:
        logit = positions.pick(confidence_logits).float()
        term = (positions.tv_share * F.binary_cross_entropy_with_logits(logit, acceptance, reduction="none")).sum()
        loss = loss + weights.confidence * term
        terms["confidence"] = term.detach()
        confidence_error = scatter((logit.detach().sigmoid() - acceptance).abs())
    per_position = scatter(acceptance), scatter(agreement), confidence_error, targets.position_mask, scatter(cross_entropy)
    return LossResult(loss, terms, *per_position, scatter(positions.labels >= 0))


class BlockObjective(nn.Module):
    """The loss of blocks under a drafter and its frozen target, as one module whose forward uses every weight, so that it can be sharded.

    The target is no submodule: it is neither saved nor sharded with this. `seconds_of` says where the time of the calls since it was last
    emptied went. Arguments and `label_index` as in `dspark_loss` and `TargetStates`.
    """

    def __init__(self, drafter: DSparkDrafter, target: PreTrainedModel, *, chunk_positions: int, states_memory_gib: float = 0.0) -> None:
        super().__init__()
        self.drafter, self.chunk_positions = drafter, chunk_positions
        self.device = next(drafter.parameters()).device
        self.states = TargetStates(target, drafter.config.target_layer_ids, memory_gib=states_memory_gib)
        ids = drafter.draft_token_ids
        text_config = target.config.get_text_config(decoder=True)
        self.head = TargetHead(target.get_output_embeddings(), ids, softcap=getattr(text_config, "final_logit_softcapping", None))
        self.label_index = None if ids is None else places(text_config.vocab_size, ids.to(self.device), self.device)
        self.seconds_of: dict[str, float] = {}

    def forward(self, blocks: Blocks, weights: LossWeights, totals: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, LossResult]:
        """The loss of the blocks of a whole step, or of a part of it with the `weight_totals` of the whole, and the whole result."""
        marks = [time.perf_counter()]
        batch, targets = blocks.batch, blocks.targets.to(self.device)
        taps, last = self.states.of_batch(batch.input_ids, batch.lengths)
        marks.append(time.perf_counter())
        positions = blocks.anchor_positions.to(self.device)
        hidden = self.drafter.training_hidden(taps.to(self.device), batch.input_ids.to(self.device).gather(1, positions), positions)
        head = self.drafter.markov_head
        latent = None if head is None else head.block(targets.prev_ids, hidden)
        confidence = self.drafter.confidence(hidden, targets.prev_ids)
        marks.append(time.perf_counter())
        result = dspark_loss(
            hidden,
            latent,
            confidence,
            targets,
            last,
            draft_logits=self._draft_logits,
            target=self._target_probabilities,
            weights=weights,
            parameters=[] if head is None else [p for p in head.markov_w2.parameters() if p.requires_grad],
            label_index=self.label_index,
            chunk_positions=self.chunk_positions,
            totals=totals,
        )
        marks.append(time.perf_counter())
        for name, (a, b) in zip(("target_s", "backbone_s", "loss_s"), itertools.pairwise(marks), strict=True):
            self.seconds_of[name] = self.seconds_of.get(name, 0.0) + b - a
        return result.loss, result

    def _draft_logits(self, hidden: Tensor, latent: Tensor | None) -> Tensor:
        base, head = self.drafter.base_logits(hidden), self.drafter.markov_head
        return base if latent is None or head is None else base + head.project(latent)

    def _target_probabilities(self, hidden: Tensor) -> TargetProbabilities:
        return self.head(hidden.to(self.states.device)).to(self.device)
