"""One draft block: backbone, sequential head left to right, confidence. Knows the drafter; knows no target pass and no loop.

Source: DSPARK.md steps 2-4; paper sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .row_cache import RowCache
from .sampling import draw_from_logits, exponential_noise
from .verification import DraftBlock

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
    """
    h = drafter.draft_hidden(anchors, starts, cache, length, row_ids)
    base = drafter.base_logits(h)
    noise = exponential_noise(tuple(base.shape), base, generator) if sample else None
    head = drafter.markov_head
    state = None if head is None else head.initial_state(h[:, 0])
    prev = anchors
    tokens: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for k in range(length):
        logits = base[:, k]
        if head is not None:
            latent, state = head.step(prev, h[:, k], state)
            logits = logits + head.project(latent)
        if sample or process is not None:
            logits = logits.float()
        if process is not None:
            logits = process(logits, k, tokens)
        chosen = logits.argmax(-1) if noise is None else draw_from_logits(logits, noise[:, k])
        prev = drafter.to_target_ids(chosen)
        ids.append(chosen)
        tokens.append(prev)
        kept.append(logits)
    drafted = torch.stack(tokens, dim=1)
    raw = drafter.confidence(h, torch.cat([anchors[:, None], drafted[:, :-1]], dim=1)) if with_confidence else None
    confidence = None if raw is None else calibrated(raw, temperatures or drafter.config.confidence_temperatures)
    if not sample:
        return DraftBlock(drafted, confidence, confidence_logits=raw)
    p_d = torch.stack(kept, dim=1).softmax(-1)
    drawn = p_d.gather(-1, torch.stack(ids, dim=1)[..., None])[..., 0]
    return DraftBlock(drafted, confidence, p_d, drafter.draft_token_ids, drawn, raw)
