"""One draft block: backbone, sequential head left to right, confidence.

Source: paper sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.calibration.temperature_scaling import calibrated
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.decoding.ngram_copy import Copied, Copies, Position, adjusted
from hf_dspark.decoding.row_processors import DraftProcessors
from hf_dspark.decoding.sampling import draw, uniform
from hf_dspark.decoding.verify import DraftBlock
from hf_dspark.models.modeling_dspark import DSparkDrafter


@torch.inference_mode()
def draft_block(
    drafter: DSparkDrafter,
    anchors: torch.Tensor,
    starts: Sequence[int],
    cache: RowCache,
    *,
    length: int,
    sample: bool,
    processors: DraftProcessors | None = None,
    with_confidence: bool = False,
    generator: torch.Generator | None = None,
    row_ids: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    copies: Copies | None = None,
) -> DraftBlock:
    """Draft `length` tokens a row.

    Args:
        drafter (`DSparkDrafter`): bound.
        anchors (`torch.LongTensor` of shape `(R,)`): last committed token of each row.
        starts (`list[int]`): context tokens of each row, which is also its anchor's position.
        cache (`RowCache`): the drafter's context.
        length (`int`): tokens to draft, at most gamma. The backbone computes so many positions: what masks would stand behind them
            hardly changes them.
        sample (`bool`): draw from p_d; arg-max otherwise.
        processors (`DraftProcessors`, *optional*): the user's, for these rows; they make p_d resemble the processed p_t.
        with_confidence (`bool`): compute c_k too.
        generator (`torch.Generator`, *optional*): source of randomness.
        row_ids (`list[int]`, *optional*): the cache's rows that these are; 0..R-1 where None.
        temperatures (`list[float]`, *optional*): T_k to calibrate c_k with; the checkpoint's where None.
        copies (`Copies`, *optional*): n-gram copies for the same rows; tokens are drawn from the mixture of p_d and them.
    Returns:
        `DraftBlock`: of these rows.
    """
    layout = drafter.block_layout(starts, length, row_ids)
    u = uniform((len(starts), 2, length), layout.device, generator) if sample else None
    if temperatures is None:
        temperatures = default_temperatures(drafter.config, copying=copies is not None)
    return draft_from(drafter, anchors, layout, cache, u, processors, with_confidence, temperatures, copies)


def draft_from(
    drafter: DSparkDrafter,
    anchors: torch.Tensor,
    layout: RowLayout,
    cache: RowCache,
    u: torch.Tensor | None,
    processors: DraftProcessors | None,
    with_confidence: bool,
    temperatures: Sequence[float] | torch.Tensor | None,
    copies: Copies | None,
) -> DraftBlock:
    """`draft_block` of a given `DSparkDrafter.block_layout`, and with its random numbers given: `u` of `uniform`, of shape `(R, 2, n)`, for
    the draws of the drafter and for the choice between them and the copies; arg-max where None.
    """
    h = drafter.block_hidden(anchors, layout, cache)
    chain = _draw_chain(drafter, h, anchors, u, processors, copies, counted=with_confidence)
    drafted = torch.stack(chain.tokens, dim=1)
    # Nobody reads what greedy tokens were mixed from, but for their confidences.
    copied = None if copies is None or (u is None and not with_confidence) else Copied.of_block(copies.prompt_ends, chain.copied)
    raw = drafter.confidence(h, torch.cat([anchors[:, None], drafted[:, :-1]], dim=1)) if with_confidence else None
    if raw is not None and copied is not None:
        copied = replace(copied, confidence=raw)
        if drafter.config.copy_confidence is not None:
            raw = adjusted(copied.features(), drafter.config.copy_confidence)
    confidence = None if raw is None else calibrated(raw, temperatures)
    if u is None:
        return DraftBlock(drafted, confidence, confidence_logits=raw, copied=copied)
    drawn = torch.stack(chain.drawn, dim=1)
    drawn = drawn if copied is None else copied.mix(drawn, drafted)
    mass = torch.stack(chain.mass, dim=1) if chain.mass else None
    return DraftBlock(drafted, confidence, chain.probs, drafter.draft_token_ids, drawn, raw, copied=copied, mass=mass)


@dataclass
class _Chain:
    """What the sequential head drew: all p_d `(R, n, V_draft)`, in the place of the base logits; and, a list entry for each block
    position, x_k as target id `(R,)`, its p_d and what p_d is to be divided by, `(R,)`, and the copies beside it.
    """

    probs: torch.Tensor
    tokens: list[torch.Tensor] = field(default_factory=list)
    drawn: list[torch.Tensor] = field(default_factory=list)
    mass: list[torch.Tensor] = field(default_factory=list)
    copied: list[Position] = field(default_factory=list)

    def keep(self, p_d: torch.Tensor, k: int) -> torch.Tensor:
        """Record p_d at block position k, `(R, V_draft)`; returns it as it is recorded, rounded perhaps, so that draws are from that."""
        self.probs[:, k] = p_d
        if self.probs.dtype == p_d.dtype:
            return p_d
        rounded = self.probs[:, k].to(p_d.dtype)
        self.mass.append(rounded.sum(-1))
        return rounded / self.mass[-1][:, None]


def _draw_chain(
    drafter: DSparkDrafter,
    h: torch.Tensor,
    anchors: torch.Tensor,
    u: torch.Tensor | None,
    processors: DraftProcessors | None,
    copies: Copies | None,
    *,
    counted: bool,
) -> _Chain:
    """x_1..x_n left to right from hidden states `(R, n, d)`: p_k = softmax(U_k + B_k), mixed with the copies."""
    base = drafter.base_logits(h)
    head = drafter.markov_head
    state = None if head is None else head.initial_state(h[:, 0])
    previous, chain, length = anchors, _Chain(base), h.shape[1]
    for k in range(length):
        logits = base[:, k]
        if head is not None:
            latent, state = head.step(previous, h[:, k], state)
            logits = logits + head.project(latent)
        if processors is not None:
            logits = processors.process(logits.float(), previous if k else None)
        if u is None and copies is None:
            drawn = logits.argmax(-1)
            previous = drafter.to_target_ids(drawn)
        else:
            p_d = logits.softmax(-1, dtype=torch.float32)
            del logits  # as large as p_d
            if u is not None:
                p_d = chain.keep(p_d, k)
            if copies is not None:
                best_p, best = p_d.max(-1)
                best_ids = drafter.to_target_ids(best)
                allowed = None if processors is None else processors.allow(copies.tokens)
                copied = Position.of(copies, best_ids, best_p, drafter.values_at(p_d, copies.tokens), allowed, counted=counted)
                chain.copied.append(copied)
            if u is None:
                drawn, previous = best, best_ids
            else:
                drawn = draw(p_d, u[:, 0, k])
                previous = drafter.to_target_ids(drawn)
            if copies is not None:
                takes = copied.wins if u is None else u[:, 1, k] < copied.weights
                previous = torch.where(takes, copied.tokens, previous)
                if k + 1 < length:
                    copies.extend(previous)
            if u is not None:
                chain.drawn.append(drafter.values_at(p_d, previous) if copies is not None else p_d.gather(1, drawn[:, None])[:, 0])
            del p_d
        chain.tokens.append(previous)
    return chain


def default_temperatures(config: DSparkConfig, *, copying: bool) -> Sequence[float] | None:
    """The checkpoint's T_k, which hold with copying where they were fitted with it, and without where without."""
    return config.confidence_temperatures if copying == (config.copy_weights is not None) else None
