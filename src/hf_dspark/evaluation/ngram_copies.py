"""What n-gram copies of a target's own texts are worth to a drafter, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.calibration.ngram_copy_fit import fit_copy_weights
from hf_dspark.decoding.ngram_copy import Copies
from hf_dspark.targets.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_dspark.models.modeling_dspark import DSparkDrafter

_ANCHORS_A_PASS = 64


def fit_copying(
    model: PreTrainedModel, drafter: DSparkDrafter, texts: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int
) -> list[float]:
    """lambda_1..lambda_M of a drafter that is bound to `model`.

    Args:
        model (`PreTrainedModel`), drafter (`DSparkDrafter`): a pair.
        texts (`list[tuple[list[int], list[int]]]`): token ids of prompts and of the target's answers to them.
        longest (`int`): M.
    """
    parts = [part for prompt, answer in texts if len(answer) > 1 for part in _observed(model, drafter, prompt, answer, longest)]
    lengths, hits, p_d = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)) if parts else [np.zeros(0)] * 3
    return fit_copy_weights(lengths, hits, p_d, longest)


@torch.no_grad()
def _observed(
    model: PreTrainedModel, drafter: DSparkDrafter, prompt: Sequence[int], answer: Sequence[int], longest: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Lengths, hits and p_d as `fit_copy_weights` takes them, of every block position behind every anchor of an answer, its predecessors
    as the answer has them.
    """
    device, gamma = model.device, drafter.config.block_size
    ids = torch.tensor([*prompt, *answer], device=device)
    first, count = len(prompt), len(ids)
    lengths_, ends = torch.tensor([[first + 1]], device=device), torch.tensor([first], device=device)
    copies = Copies(ids[None, : first + 1], lengths_, ends, [0.5] * longest, len(answer))
    lengths, tokens = torch.zeros_like(ids), torch.full_like(ids, -1)
    for place in range(first + 1, count):  # of the token that is to come
        lengths[place], tokens[place] = copies.lengths[0], copies.tokens[0]
        copies.extend(ids[place : place + 1])
    seen = Target(model, drafter.config.target_layer_ids)
    cache = RowCache()
    cache.add_rows(1)
    with seen.open():
        _, taps = seen.forward(ids, RowLayout([0], [count], device), cache, only_last=True)
    found = []
    for anchors in torch.arange(first, count - 1, device=device).split(_ANCHORS_A_PASS):
        h = drafter.training_hidden(taps[None], ids[anchors][None], anchors[None])[0]
        places = anchors[:, None] + torch.arange(gamma, device=device)
        inside = places + 1 < count
        previous, follows = ids[places.clamp(max=count - 1)], (places + 1).clamp(max=count - 1)
        logits = drafter.base_logits(h)
        if drafter.markov_head is not None:
            logits = logits + drafter.markov_head.project(drafter.markov_head.block(previous, h))
        p_d = drafter.values_at(logits.float().softmax(-1), ids[follows])
        found.append((lengths[follows][inside], (tokens[follows] == ids[follows])[inside], p_d[inside]))
    return found
