"""The mask token of a new drafter: a token id that text never contains."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MASK_NAMES = re.compile(r"mask|reserved|unused|gh_stars", re.IGNORECASE)


def mask_token_for(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, mask_token_id: int | None = None) -> int:
    """The mask token of a new drafter: the given one, checked, or one chosen from the tokenizer.

    Args:
        target (`PreTrainedModel` or a PEFT wrapper): the causal LM to draft for.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
        mask_token_id (`int`, *optional*): the id to use.
    Returns:
        `int`: the id.
    Raises:
        ValueError: if neither is given, none can be chosen, or the given one is in use.
    """
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    in_use = _token_ids_in_use(target)
    if mask_token_id is not None:
        _check_mask_token(mask_token_id, vocab_size, in_use, tokenizer)
        return mask_token_id
    if tokenizer is None:
        raise ValueError("from_target needs tokenizer= (to choose a mask token that text does not use) or mask_token_id=; got neither.")
    return choose_mask_token_id(tokenizer, vocab_size, in_use)


def choose_mask_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int, in_use: Iterable[int] = ()) -> int:
    """Choose a token id for the drafter's mask that text never contains.

    In this order: the tokenizer's own mask token; the last embedding row, if no token uses it; the last added token whose name says that
    it is spare (mask, reserved, unused; StarCoder's `<gh_stars>`, which SmolLM2 inherits); the last added special token. Tokens in use
    (bos, eos, pad, unk and the like) and tokens of the chat template are left out.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the target's.
        vocab_size (`int`): rows of the target's embedding.
        in_use (`Iterable[int]`): further ids to leave out.
    Returns:
        `int`: the id.
    Raises:
        ValueError: if there is no such token.
    """
    named = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id")
    taken = {*in_use, *(i for name in named if (i := getattr(tokenizer, name, None)) is not None)}
    own = getattr(tokenizer, "mask_token_id", None)
    if own is not None and 0 <= own < vocab_size and own not in taken:
        return own
    added = tokenizer.added_tokens_decoder
    highest = max(len(tokenizer) - 1, *added, 0)
    if vocab_size - 1 > highest and vocab_size - 1 not in taken:
        return vocab_size - 1
    template = str(getattr(tokenizer, "chat_template", None) or "")
    spare = [
        (token_id, str(token))
        for token_id, token in sorted(added.items())
        if 0 <= token_id < vocab_size and token_id not in taken and str(token) not in template
    ]
    by_name = [token_id for token_id, text in spare if _MASK_NAMES.search(text)]
    special = [token_id for token_id, _ in spare if getattr(added[token_id], "special", False)]
    if by_name or special:
        return (by_name or special)[-1]
    raise ValueError(
        "The tokenizer has no spare token for the drafter's mask: no unused embedding row, no mask, reserved or unused token. "
        "Pass mask_token_id= with a token that your text never contains."
    )


def _check_mask_token(mask_token_id: int, vocab_size: int, in_use: set[int], tokenizer: PreTrainedTokenizerBase | None) -> None:
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id must be a row of the target's embedding, 0..{vocab_size - 1}; got {mask_token_id}.")
    named = ("bos_token_id", "eos_token_id", "pad_token_id")
    if mask_token_id in in_use | {getattr(tokenizer, name, None) for name in named}:
        raise ValueError(
            f"mask_token_id {mask_token_id} is the target's bos, eos or pad token; the drafter could not tell it from "
            "text. Choose a token that the tokenizer does not use, or pass tokenizer= and let one be chosen."
        )
    if tokenizer is not None and mask_token_id < len(tokenizer) and mask_token_id not in tokenizer.added_tokens_decoder:
        logger.warning("mask_token_id %d (%r) is an ordinary token of the tokenizer.", mask_token_id, tokenizer.decode([mask_token_id]))


def _token_ids_in_use(target: PreTrainedModel) -> set[int]:
    """bos, eos and pad ids of the target's config and generation config."""
    found: set[int] = set()
    text = target.config.get_text_config(decoder=True)
    for config in (target.config, text, getattr(target, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return found
