"""Prompt passes of bounded size, into the caches of target and drafter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hf_dspark.cache.layout import RowLayout
from hf_dspark.decoding.options import PREFILL_TOKENS
from hf_dspark.decoding.state import State
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.target import Target


def prompt_passes(lengths: Sequence[int], known: int, limit: int) -> Iterator[tuple[range, list[int], list[int]]]:
    """Plan prompt passes of at most `limit` tokens: short prompts that follow each other share one, a long one is cut.

    Args:
        lengths (`Sequence[int]`): tokens of each prompt.
        known (`int`): tokens of a single prompt that need not be read.
        limit (`int`): most tokens of one pass.
    Yields:
        the prompts of a pass, where it starts in each, and how many tokens of each it reads.
    """
    begin = 0
    while begin < len(lengths):
        end, total = begin + 1, lengths[begin] - known
        while end < len(lengths) and total + lengths[end] <= limit:
            total, end = total + lengths[end], end + 1
        if end > begin + 1:
            yield range(begin, end), [0] * (end - begin), list(lengths[begin:end])
        else:
            for start in range(known, lengths[begin], limit):
                yield range(begin, end), [start], [min(limit, lengths[begin] - start)]
        begin = end


def prefill(
    target: Target,
    drafter: DSparkDrafter | None,
    state: State,
    prompts: Sequence[torch.Tensor],
    first_row: int,
    known: int = 0,
    limit: int = PREFILL_TOKENS,
) -> torch.Tensor:
    """Read prompts into the caches.

    Args:
        target (`Target`): open.
        drafter (`DSparkDrafter`, *optional*): reads the hidden states of the tapped layers too.
        state (`State`): has these rows already, the first of them at place `first_row`.
        prompts (`list[torch.LongTensor]` of shapes `(n_r,)`): without masked tokens.
        first_row (`int`): place of the first of them.
        known (`int`): tokens of a single prompt that the caches already hold.
        limit (`int`): most tokens of one pass.
    Returns:
        `torch.Tensor` of shape `(rows, V)`: the logits after each prompt's last token.
    """
    final: dict[int, torch.Tensor] = {}
    for group, starts, counts in prompt_passes([len(prompt) for prompt in prompts], known, limit):
        ids = torch.cat([prompts[i][start : start + count] for i, start, count in zip(group, starts, counts, strict=True)])
        layout = RowLayout(starts, counts, ids.device, first_row + group.start)
        logits, hidden = target.forward(ids, layout, state.target_cache, only_last=True)
        if drafter is not None:
            drafter.extend_context(hidden, layout, state.drafter_cache)
        final[group.start] = logits  # a later piece of the same prompt replaces an earlier one's
    return torch.cat(list(final.values()))
