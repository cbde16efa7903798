"""Makes the drafter that a run trains: shape, draft vocabulary, starting weights. Knows target, rows and drafter; knows no loss, no loop
and no command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_dspark.configuration_dspark import MARKOV_HEAD_TYPES
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.training.bigram import start_sequential_head
from hf_dspark.training.data import ResponseRow, coverage, frequent_tokens
from hf_dspark.training.states import TargetStates

HEADS = (*MARKOV_HEAD_TYPES, "none")
STARTS = ("target", "random")


@dataclass(frozen=True)
class DrafterShape:
    """What a fresh drafter looks like and where its weights start.

    Args:
        layers (`int`): backbone layers.
        block_size (`int`): gamma; 1 gives a one-token drafter in the manner of MTP-1.
        head (`str`): `vanilla`, `gated`, `rnn`, or `none` (DFlash).
        rank (`int`): of the sequential head; without a head it does not matter.
        taps (`tuple[int, ...]`, *optional*): target layers to read; default: five, spread over depth.
        mask_token (`str` or `int`, *optional*): default: one that the tokenizer does not use in text.
        draft_vocab (`int`, *optional*): most frequent response tokens that may be drafted; default: all.
        start (`str`): backbone from the target's last layers (`target`) where shapes allow, or `random`.
        head_start (`str`): sequential head from the target's own next-token logits (`target`), or `random`.
    Raises:
        ValueError: naming the field that is out of range.
    """

    layers: int = 2
    block_size: int = 7
    head: str = "vanilla"
    rank: int = 256
    taps: tuple[int, ...] | None = None
    mask_token: str | int | None = None
    draft_vocab: int | None = None
    start: str = "target"
    head_start: str = "target"

    def __post_init__(self) -> None:
        for name, allowed in (("head", HEADS), ("start", STARTS), ("head_start", STARTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        for name in ("layers", "block_size", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more. For a drafter without a head say head 'none'.")


def mask_id_of(tokenizer: Any, mask_token: str | int | None) -> int | None:
    """The id of a mask token given as a text or an id; None where none is given.

    Raises:
        ValueError: if the text is not one token of the tokenizer.
    """
    if mask_token is None or isinstance(mask_token, int):
        return mask_token
    if mask_token.isdecimal():
        return int(mask_token)
    found = tokenizer.convert_tokens_to_ids(mask_token)
    if found is None or (found == tokenizer.unk_token_id and mask_token != tokenizer.unk_token):
        raise ValueError(
            f"the mask token {mask_token!r} is no token of this tokenizer; allowed: one of its tokens, or an id. Or leave it out."
        )
    return found


def ending_ids(tokenizer: Any, target: Any) -> list[int]:
    """Special ids that end a text: a reduced draft vocabulary must reach them."""
    listed = [tokenizer.eos_token_id, target.config.eos_token_id, target.generation_config.eos_token_id]
    return sorted({i for item in listed if item is not None for i in (item if isinstance(item, list) else [item])})


def make_drafter(
    target: Any,
    tokenizer: Any,
    rows: Sequence[ResponseRow],
    held_out: Sequence[ResponseRow],
    shape: DrafterShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    target_name: str | None = None,
) -> tuple[DSparkDrafter, dict[str, Any]]:
    """Make a fresh drafter and tell what it was made from.

    Args:
        target (`PreTrainedModel`): the causal LM to draft for.
        tokenizer: its tokenizer.
        rows, held_out: response rows; the draft vocabulary is chosen on the first and measured on the second.
        shape (`DrafterShape`): what to make.
        dtype (`torch.dtype`), device: of the drafter.
        target_name (`str`, *optional*): written into the config.
    Returns:
        the drafter, bound, and facts for a recipe: parameters, bytes, mask token, coverage of the draft vocabulary,
        tokens that the head's start was read from.
    Raises:
        ValueError: for a shape that does not fit the target.
    """
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    draft_ids, covered = None, None
    if shape.draft_vocab is not None and shape.draft_vocab < vocab_size:
        draft_ids = frequent_tokens(rows, shape.draft_vocab, always=ending_ids(tokenizer, target), vocab_size=vocab_size)
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
