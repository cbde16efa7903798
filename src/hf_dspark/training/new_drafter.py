"""A fresh drafter for a run: its shape, its draft vocabulary, its starting weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training.configuration import DrafterShape
from hf_dspark.training.initial_head import start_sequential_head
from hf_dspark.training.rows import ResponseRow
from hf_dspark.training.target_states import TargetStates
from hf_dspark.utils.tokens import eos_token_ids


def make_drafter(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ResponseRow],
    held_out: Sequence[ResponseRow],
    shape: DrafterShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    target_name: str | None = None,
) -> tuple[DSparkDrafter, dict[str, Any]]:
    """Make a fresh drafter, bound to its target, and say what it was made from.

    Args:
        target, tokenizer: the causal LM to draft for.
        rows, held_out: response rows; the draft vocabulary is chosen on the first and measured on the second.
        shape (`DrafterShape`): what to make.
        dtype (`torch.dtype`), device: of the drafter.
        target_name (`str`, *optional*): written into the config.
    Returns:
        the drafter, and facts for a recipe: parameters, bytes, mask token, coverage of the draft vocabulary, tokens that the head's start
        was read from.
    Raises:
        ValueError: for a shape that does not fit the target.
    """
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    draft_ids, covered = None, None
    if shape.draft_vocab is not None and shape.draft_vocab < vocab_size:
        draft_ids = frequent_tokens(
            rows, shape.draft_vocab, always=eos_token_ids(tokenizer, target.config, target.generation_config), vocab_size=vocab_size
        )
        inside, total = coverage(held_out, draft_ids)
        covered = {"held_out_tokens_inside": inside, "held_out_tokens": total, "share": inside / total if total else None}
    extra: dict[str, Any] = {} if target_name is None else {"target_name": target_name}
    drafter = DSparkDrafter.from_target(
        target,
        tokenizer=tokenizer,
        num_hidden_layers=shape.layers,
        block_size=shape.block_size,
        markov_rank=0 if shape.head == "none" else shape.rank,
        markov_head_type="vanilla" if shape.head == "none" else shape.head,
        target_layer_ids=None if shape.taps is None else list(shape.taps),
        mask_token_id=mask_id_of(tokenizer, shape.mask_token),
        draft_token_ids=draft_ids,
        init_from_target=shape.start == "target",
        **extra,
    )
    drafter.to(device=device, dtype=dtype)
    drafter.config.dtype = dtype
    drafter.bind(target)
    read = 0
    if shape.head_start == "target" and shape.head != "none":
        read = start_sequential_head(drafter, target, rows, TargetStates(target, drafter.config.target_layer_ids))
    facts = {
        **size_of(drafter),
        "mask_token_id": drafter.config.mask_token_id,
        "taps": list(drafter.config.target_layer_ids),
        "draft_vocabulary": covered,
        "head_start_tokens": read,
    }
    return drafter, facts


def size_of(drafter: torch.nn.Module) -> dict[str, int]:
    """Parameters, trainable parameters, and bytes of all weights and buffers that are saved."""
    parameters = list(drafter.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "weight_bytes": sum(t.numel() * t.element_size() for t in drafter.state_dict().values()),
    }


def mask_id_of(tokenizer: PreTrainedTokenizerBase, mask_token: str | None) -> int | None:
    """The id of a mask token given as its text or its id; a `ValueError` if the text is not one token."""
    if mask_token is None:
        return None
    if mask_token.isdecimal():
        return int(mask_token)
    found = tokenizer.convert_tokens_to_ids(mask_token)
    if found is None or (found == tokenizer.unk_token_id and mask_token != tokenizer.unk_token):
        raise ValueError(
            f"the mask token {mask_token!r} is no token of this tokenizer; allowed: one of its tokens, or an id. Or leave it out."
        )
    return found


def frequent_tokens(rows: Iterable[ResponseRow], size: int, *, always: Iterable[int] = (), vocab_size: int) -> Tensor:
    """The most frequent response tokens, and `always` (those that end a text): a reduced draft vocabulary, increasing ids `(size,)`.

    The rows are training rows only, or the coverage measured on held-out rows means nothing. Ids never seen fill up from the lowest.

    Raises:
        ValueError: if size is not in 1..vocab_size or smaller than the ids that must be in it.
    """
    forced = sorted(set(always))
    if not max(1, len(forced)) <= size <= vocab_size:
        raise ValueError(f"draft vocabulary of {size}; allowed: {max(1, len(forced))} to {vocab_size}. Choose another --draft-vocab.")
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in rows:
        ids = torch.tensor(list(chain.from_iterable(row.responses)))
        counts.index_add_(0, ids, torch.ones_like(ids))
    counts[forced] = torch.iinfo(torch.long).max
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(rows: Iterable[ResponseRow], token_ids: Tensor) -> tuple[int, int]:
    """Response tokens inside a draft vocabulary, and response tokens in all (numerator, denominator)."""
    known = set(token_ids.tolist())
    tokens = [token for row in rows for response in row.responses for token in response]
    return sum(token in known for token in tokens), len(tokens)
