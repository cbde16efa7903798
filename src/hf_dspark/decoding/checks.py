"""What a call of `generate` with a drafter cannot honour is refused here, before anything is computed or changed."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from hf_dspark.decoding.options import Options
from hf_dspark.errors import UnsupportedOptionError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.targets.model_inputs import input_device
from hf_dspark.utils.compat import CACHE_NAMES, cache_in
from hf_dspark.utils.hardware import device_name, has_bf16
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

# Prepared arguments that say nothing this loop does not already have.
_HANDLED = {"attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "cache_position", "logits_to_keep"}
# Fields of transformers' assisted generation, and what `generate` fills in where the user says nothing.
_ASSISTANT_FIELDS = {"num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4}
_STATIC_CACHES = ("hybrid", "sliding_window", "offloaded_static", "offloaded_hybrid")


def check_call(config: Any, kwargs: dict[str, Any], input_ids: torch.Tensor, streamer: Any, synced_gpus: bool) -> None:
    """Refuse what `generate` was asked for and this decoding cannot do exactly.

    Args:
        config (`GenerationConfig`), kwargs (`dict`), input_ids, streamer, synced_gpus: as `generate` has prepared them.
    Raises:
        UnsupportedOptionError, ValueError: naming the option and what to do instead.
    """
    if not kwargs.get("use_cache", True):
        raise ValueError("assisted generate requires `use_cache=True`")
    cache = cache_in(kwargs)
    static = config.cache_implementation == "static" and not getattr(cache, "_is_user_defined", False)
    if config.cache_implementation in _STATIC_CACHES or ("Static" in type(cache).__name__ and not static):
        raise ValueError(
            "DSpark decoding takes no static cache object and no offloaded, sliding or hybrid one; cache_implementation='static' asks for "
            "compiled rounds, which keep their own buffers."
        )
    wrong = ""
    if (config.num_beams or 1) > 1:
        wrong = f"beam search (num_beams={config.num_beams}): drafted tokens follow one path. Use num_beams=1"
    elif synced_gpus:
        wrong = "synced_gpus: ranks would run different numbers of rounds. Gather the parameters, or go without a drafter"
    elif config.output_attentions or config.output_hidden_states:
        wrong = "output_attentions or output_hidden_states: rejected tokens' would be mixed in. Run a forward over the text"
    elif getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        wrong = "guidance_scale: guidance runs the target a second time. Generate without a drafter"
    elif getattr(config, "assistant_ensemble_weight", None) is not None:
        wrong = "assistant_ensemble_weight: it changes the output's distribution, and this decoding keeps it exact"
    elif streamer is not None and input_ids.shape[0] > 1:
        wrong = f"a streamer with a batch of {input_ids.shape[0]}: a streamer shows one row. Use batch size 1"
    elif cache is not None and not static and not isinstance(cache, DynamicCache):
        wrong = f"a cache of type {type(cache).__name__}: rejected tokens must be rolled back. Use DynamicCache or none"
    elif cache is not None and getattr(cache, "offloading", False):
        wrong = "an offloaded cache. Use DynamicCache or none"
    elif cache is not None and input_ids.shape[0] > 1 and cache.get_seq_length() > 0:
        wrong = (
            f"past_key_values with {cache.get_seq_length()} tokens for a batch of {input_ids.shape[0]}; reuse over "
            "turns is for batch size 1"
        )
    else:
        # Classes that also take images and audio prepare an empty dictionary where there is only text.
        extra = sorted(name for name, value in kwargs.items() if value is not None and value != {} and name not in _HANDLED)
        # Families mark text with token type 0; a mask of zeros says nothing.
        extra = [name for name in extra if not (name == "token_type_ids" and not kwargs[name].any())]
        if extra:
            wrong = f"model inputs {extra}: only input_ids of text are drafted for. Generate without a drafter"
    if wrong:
        raise UnsupportedOptionError(f"DSpark decoding does not support {wrong}.")


def with_assistant_fields(options: Options, drafter: DSparkDrafter, config: Any) -> Options:
    """Options of a call with what transformers' own fields for assisted generation ask for, where nothing else was said.

    `num_assistant_tokens` is a static length, `assistant_confidence_threshold` the threshold budget; the values that transformers fills in
    say nothing.

    Args:
        options (`Options`): of the call; a budget in it wins.
        drafter (`DSparkDrafter`), config (`GenerationConfig`): whose fields are read, the config's first.
    Raises:
        ValueError: for a length below 1.
    """
    given: dict[str, Any] = {}
    for source in (config, getattr(drafter, "generation_config", None)):
        for name, unset in _ASSISTANT_FIELDS.items():
            if (value := getattr(source, name, None)) not in (None, unset):
                given.setdefault(name, value)
    if "assistant_confidence_threshold" in given and drafter.confidence_head is None:
        del given["assistant_confidence_threshold"]
        warn_once(logger, "assistant_confidence_threshold is not followed: this drafter has no confidence head.")
    length, threshold = given.get("num_assistant_tokens"), given.get("assistant_confidence_threshold")
    schedule = given.pop("num_assistant_tokens_schedule", None)
    if schedule is not None:
        warn_once(
            logger,
            f"num_assistant_tokens_schedule={schedule!r} is not followed: drafts here have one length unless a budget chooses it. Set "
            "drafter.budget = 'load-aware' for lengths that adapt.",
        )
    if given and options.budget is not None:
        warn_once(logger, f"{', '.join(given)} of the generation config or assistant is not followed: the budget of the call was given.")
        return options
    if length is not None and length < 1:
        raise ValueError(f"num_assistant_tokens must be at least 1; got {length}. Without drafts, leave assistant_model out.")
    if length is not None:
        length = min(int(length), options.block_size or drafter.config.block_size)
        options = replace(options, budget=f"static:{length}", block_size=length)
    return replace(options, budget=f"threshold:{threshold}") if threshold else options


def check_placement(model: PreTrainedModel, drafter: DSparkDrafter) -> None:
    """Drafter and target may differ in dtype, not in device."""
    theirs, own = input_device(model), drafter.device
    if own.type != theirs.type or (own.index or 0) != (theirs.index or 0):
        raise UnsupportedOptionError(
            f"The drafter is on {own}, the target takes its tokens on {theirs}; they must share one device. Move the "
            f"drafter: drafter.to({str(theirs)!r})."
        )
    if drafter.dtype == torch.float16 and model.dtype in (torch.bfloat16, torch.float32):
        raise UnsupportedOptionError(
            f"A float16 drafter cannot hold the activations of a {model.dtype} target, which may exceed 65504; acceptance would silently "
            "fall to nothing. Load the drafter with dtype=torch.bfloat16 or torch.float32."
        )
    if model.dtype == torch.bfloat16 and not has_bf16(theirs):
        warn_once(
            logger,
            f"The target is in bfloat16, in which {device_name(theirs)} computes slower than in float32. Load target and drafter with "
            "dtype=torch.float32 (or load_target and load_drafter with dtype='fast').",
        )
    if drafter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UnsupportedOptionError(
            f"The drafter's weights are {drafter.dtype}; it drafts in float32, bfloat16, float16 or float64. Load it with dtype=."
        )


def prompt_masks(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, mask_length: int | None
) -> torch.Tensor | None:
    """Which tokens of the prompts exist for the target, checked. What the mask hides does not, and position ids count what is left.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, n)`): prompts.
        attention_mask (`torch.Tensor` of shape `(B, n)`, *optional*): all ones where None.
        position_ids (`torch.LongTensor` of shape `(B, n)`, or `(axes, B, n)` with m-rope, *optional*): checked only.
        mask_length (`int`, *optional*): how long a mask of ones was that `generate` has dropped.
    Returns:
        `torch.BoolTensor` of shape `(B, n)`; None where all do.
    Raises:
        UnsupportedOptionError: for shapes that do not fit, empty prompts and other positions.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UnsupportedOptionError(
            "DSpark decoding needs prompts as input_ids of shape (batch, length >= 1); got "
            f"{tuple(input_ids.shape)}. An empty prompt has nothing to condition on: start with a bos token."
        )
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(input_ids.device).bool()
    width = mask.shape[1] if attention_mask is not None or mask_length is None else mask_length
    if mask.shape[0] != input_ids.shape[0] or width != input_ids.shape[1]:
        raise UnsupportedOptionError(
            f"attention_mask covers {width} tokens, input_ids has shape {tuple(input_ids.shape)}; they must agree. "
            "With past_key_values too, give the ids of the whole text, not only the new ones."
        )
    counts = mask.sum(1).tolist()
    empty = [row for row, count in enumerate(counts) if not count]
    if empty:
        raise UnsupportedOptionError(f"Rows {empty} of the batch are empty prompts (attention_mask all 0); every row needs a token.")
    if position_ids is not None and position_ids.shape[-1] == input_ids.shape[1]:
        expected = (mask.long().cumsum(1) - 1)[mask]
        axes = position_ids.to(input_ids.device).expand(*position_ids.shape[:-2], *input_ids.shape)
        if not all(torch.equal(axis[mask], expected) for axis in axes.reshape(-1, *input_ids.shape)):
            raise UnsupportedOptionError("position_ids other than 0, 1, .. over the unmasked tokens are not supported; leave them out.")
    return None if min(counts) == mask.shape[1] else mask
