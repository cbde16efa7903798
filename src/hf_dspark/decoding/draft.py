"""One draft block: backbone, sequential head left to right, confidence. Knows the drafter; knows no target pass and no loop.

Source: DSPARK.md steps 2-4; paper sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.decoding.ngram_copy import Copied, Copies, adjusted
from hf_dspark.decoding.sampling import draw_from_logits, exponential_noise
from hf_dspark.decoding.verify import DraftBlock

# Which of the tokens `(R,)` may stand at block position k (0-based), behind the tokens drafted so far, bool `(R,)`.
AllowCopies = Callable[[torch.Tensor, int], torch.Tensor]
# Turns the drafter's logits at block position k (0-based), `(R, V_draft)` float32, into processed ones, given tokens drawn so far.
ProcessDraft = Callable[[torch.Tensor, int, list[torch.Tensor]], torch.Tensor]


def calibrated(logits: torch.Tensor, temperatures: Sequence[float] | None) -> torch.Tensor:
    """c_k = sigmoid(logit_k / T_k).

    Source: paper section 3.2.1.

    Args:
        logits (`torch.Tensor` of shape `(R, n)`): of the first n block positions, float32.
        temperatures (`list[float]`, *optional*): T_1..T_gamma, n or more; ones where None.
    """
    if temperatures is not None:
        logits = logits / torch.tensor(temperatures[: logits.shape[1]], device=logits.device)
    return logits.sigmoid()


def draft_block(
    drafter: Any,
    anchors: torch.Tensor,
    starts: Sequence[int],
    cache: RowCache,
    *,
    length: int,
    sample: bool,
    process: ProcessDraft | None = None,
    with_confidence: bool = False,
    generator: torch.Generator | None = None,
    row_ids: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    copies: Copies | None = None,
    allow: AllowCopies | None = None,
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
        process (`ProcessDraft`, *optional*): the user's logits processors; makes p_d resemble the processed p_t.
        with_confidence (`bool`): compute c_k too.
        generator (`torch.Generator`, *optional*): source of randomness.
        row_ids (`list[int]`, *optional*): the cache's rows that these are; 0..R-1 where None.
        temperatures (`list[float]`, *optional*): T_k to calibrate c_k with; the checkpoint's where None.
        copies (`Copies`, *optional*): of the same rows; draws from the mixture of p_d and them.
        allow (`AllowCopies`, *optional*): which copies the user's logits processors do not rule out; asked after `process`.
    """
    h = drafter.draft_hidden(anchors, starts, cache, length, row_ids)
    base = drafter.base_logits(h)
    noise = exponential_noise(tuple(base.shape), base, generator) if sample else None
    coins = None
    if noise is not None and copies is not None:
        coins = torch.rand(base.shape[:2], generator=generator, dtype=torch.float32, device=base.device)
    head = drafter.markov_head
    state = None if head is None else head.initial_state(h[:, 0])
    prev = anchors
    tokens: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    mixed: list[Copied] = []
    for k in range(length):
        logits = base[:, k]
        if head is not None:
            latent, state = head.step(prev, h[:, k], state)
            logits = logits + head.project(latent)
        if sample or process is not None or copies is not None:
            logits = logits.float()
        if process is not None:
            logits = process(logits, k, tokens)
        chosen = logits.argmax(-1) if noise is None else draw_from_logits(logits, noise[:, k])
        prev = drafter.to_target_ids(chosen)
        if copies is not None:
            best = prev if noise is None else drafter.to_target_ids(logits.argmax(-1))
            weights = copies.weight if allow is None else torch.where(allow(copies.tokens, k), copies.weight, 0.0)
            copied = _compare(drafter, copies, weights, logits, best, counted=with_confidence)
            takes = copied.wins if coins is None else coins[:, k] < copied.weights
            prev = torch.where(takes, copied.tokens, prev)
            mixed.append(copied)
            if k + 1 < length:
                copies.extend(prev)
        ids.append(chosen)
        tokens.append(prev)
        kept.append(logits)
    drafted = torch.stack(tokens, dim=1)
    record = Copied.join(mixed) if mixed else None
    raw = drafter.confidence(h, torch.cat([anchors[:, None], drafted[:, :-1]], dim=1)) if with_confidence else None
    if raw is not None and record is not None:
        record = replace(record, confidence=raw)
        if drafter.config.copy_confidence is not None:
            raw = adjusted(record.features(), drafter.config.copy_confidence)
    confidence = None if raw is None else calibrated(raw, temperatures or _temperatures(drafter.config, copies))
    if not sample:
        return DraftBlock(drafted, confidence, confidence_logits=raw, copied=record)
    p_d = torch.stack(kept, dim=1).softmax(-1)
    if record is None:
        drawn = p_d.gather(-1, torch.stack(ids, dim=1)[..., None])[..., 0]
    else:
        drawn = record.mix(drafter.values_at(p_d, drafted), drafted)
    return DraftBlock(drafted, confidence, p_d, drafter.draft_token_ids, drawn, raw, copied=record)


def _compare(drafter: Any, copies: Copies, weights: torch.Tensor, logits: torch.Tensor, best: torch.Tensor, *, counted: bool) -> Copied:
    """One position's copies, `(R,)` each, beside the drafter's own distribution, processed logits `(R, V_draft)`, and its best token."""
    log_p = logits.log_softmax(-1)
    p_copy = drafter.values_at(log_p, copies.tokens, outside=float("-inf")).exp()
    return Copied.beside(copies, weights, copies.tokens == best, log_p.amax(-1), p_copy, counted=counted)


def _temperatures(config: Any, copies: Copies | None) -> list[float] | None:
    """The checkpoint's T_k, which hold with copying where they were fitted with it, and without where without."""
    return config.confidence_temperatures if (copies is None) == (config.copy_weights is None) else None
