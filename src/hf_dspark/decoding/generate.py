"""`generate` for a batch: from transformers' prepared arguments to the loop and back to transformers' outputs. Knows
the options that `generate` prepares; knows no private name of transformers beyond them, and nothing of how the call got
here.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_dspark.adapters.lora import active_adapters
from hf_dspark.budgets.budget import Budget
from hf_dspark.budgets.named import make_budget
from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.calibration.online import OnlineCalibration
from hf_dspark.decoding.loop import PREFILL_TOKENS, Context, DecodingLoop, Recorder
from hf_dspark.decoding.profiler import CostProfile
from hf_dspark.decoding.row_processors import RowProcessors, RowStopping, Sequences
from hf_dspark.decoding.statistics import DecodingStats
from hf_dspark.decoding.verify import DEFAULT_VERIFICATION
from hf_dspark.errors import UnsupportedOptionError, UnsupportedTargetError
from hf_dspark.targets.target import Target, check_length, input_device
from hf_dspark.utils.compat import CACHE, CACHE_NAMES, cache_in
from hf_dspark.utils.hardware import device_name, has_bf16
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

# Prepared arguments that say nothing this loop does not already know.
_KNOWN_KWARGS = {"attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "cache_position", "logits_to_keep"}


@dataclass
class GenerateDSparkOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`: transformers' fields and `stats`.

    Attributes:
        stats (`DecodingStats`): rounds, drafted, verified and accepted tokens of every row, tau, and where the time
            went.
    """

    stats: DecodingStats | None = None


@dataclass(frozen=True)
class CallOptions:
    """Options of one call that transformers' `generate` has no argument for."""

    budget: str | Budget | None = None
    generator: torch.Generator | None = None
    block_size: int | None = None
    adapter: str | None = None
    max_verify_tokens: int | None = None
    online: OnlineCalibration | None = None
    copying: bool = True
    verification: str = DEFAULT_VERIFICATION


_OPTIONS: ContextVar[CallOptions | None] = ContextVar("hf_dspark_call_options", default=None)


@contextmanager
def call_options(options: CallOptions) -> Iterator[None]:
    """Options for the calls of `generate` made inside, in this thread."""
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def current_options() -> CallOptions:
    """The options of the call being made in this thread."""
    return _OPTIONS.get() or CallOptions()


@torch.no_grad()
def generate_batch(
    model: Any,
    drafter: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> GenerateDSparkOutput | torch.Tensor:
    """Decode a batch speculatively, with the target's exact distribution.

    Args:
        model (`PreTrainedModel`): the target.
        drafter (`DSparkDrafter`): bound here if it is not yet.
        input_ids (`torch.LongTensor` of shape `(B, n)`): prompts, left-padded.
        logits_processor, stopping_criteria, generation_config: as `generate` has prepared them.
        streamer (`BaseStreamer`, *optional*): B = 1 only; gets each round's tokens, 1-D.
        model_kwargs: attention_mask, past_key_values and what else `generate` prepares. A cache is filled, and returned, for a single row
            without padding; for batches it stays as it is and None is returned.
    Raises:
        UnsupportedTargetError, UnsupportedOptionError, BindingError: before anything is computed or changed.
    """
    options = current_options()
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedTargetError(f"{type(model).__name__} is an encoder-decoder; DSpark needs a decoder-only causal language model.")
    _check_options(generation_config, model_kwargs, input_ids, streamer, synced_gpus)
    budget = make_budget(options.budget if options.budget is not None else drafter.budget, options.max_verify_tokens)
    if (budget.needs_confidence or options.online is not None) and drafter.confidence_head is None:
        raise UnsupportedOptionError(
            f"{f'Budget {budget!r}' if budget.needs_confidence else 'Online calibration'} needs a drafter with a confidence head; this "
            "one has none. Use 'full' or 'static:N'."
        )
    if options.online is not None:
        options.online.check(drafter.config, options.copying, options.verification if generation_config.do_sample else None)
    block_size = _block_size(drafter, options)
    _check_placement(model, drafter)
    drafter.bind(model)
    target = Target(model, drafter.config.target_layer_ids)
    prompts = _prompts(input_ids, model_kwargs, getattr(generation_config, "_mask_length", None), target.device)
    batch = len(prompts)
    processors = RowProcessors(logits_processor, batch)
    stopping = RowStopping(stopping_criteria, batch)
    max_length = stopping.max_length if stopping.max_length is not None else generation_config.max_length
    check_length(model, max_length)

    user_cache = cache_in(model_kwargs)
    covers_text = batch == 1 and len(prompts[0]) == input_ids.shape[1]
    if not covers_text and user_cache is not None and user_cache.get_seq_length() > 0:
        raise UnsupportedOptionError("DSpark decoding does not support past_key_values with a padded prompt; leave the padding out.")
    context, known = _resume(user_cache, drafter, prompts) if covers_text else (None, 0)
    if context is None:
        context = Context()
    context.target.limit = context.drafter.limit = max_length + block_size + 1
    sequences = Sequences(input_ids.to(target.device), max_length, block_size + 1)
    keeps = generation_config.return_dict_in_generate
    recorder = Recorder(
        scores=[[] for _ in prompts] if keeps and generation_config.output_scores else None,
        logits=[[] for _ in prompts] if keeps and generation_config.output_logits else None,
    )
    sample = generation_config.do_sample
    loop = DecodingLoop(
        target,
        drafter,
        budget.start(lambda: CostProfile.cached(model, drafter, rows=batch, sample=sample).costs(sample)),
        sequences,
        processors,
        stopping,
        sample=sample,
        block_size=block_size,
        prefill_tokens=getattr(generation_config, "prefill_chunk_size", None) or PREFILL_TOKENS,
        generator=options.generator,
        recorder=recorder,
        emit=None if streamer is None else lambda row, tokens: streamer.put(tokens.cpu()),
        context=context,
        keep_context=covers_text,
        listener=options.online,
        copying=options.copying,
        verification=options.verification,
    )
    with target.open():
        loop.join(range(batch), prompts, known)
        loop.run()
    if streamer is not None:
        streamer.end()

    output_ids = _padded(sequences, generation_config).to(input_ids.device)
    if covers_text and user_cache is not None:
        _hand_over(user_cache, loop.context, drafter, output_ids[0, :-1], drafted=loop.drafts)
    if not keeps:
        return output_ids
    return GenerateDSparkOutput(
        sequences=output_ids,
        scores=_stacked(recorder.scores),
        logits=_stacked(recorder.logits),
        stats=loop.stats,
        **{CACHE: user_cache if covers_text else None},
    )


# ------------------------------------------------------------------------------------------------------------ arguments


def _check_options(config: Any, kwargs: dict[str, Any], input_ids: torch.Tensor, streamer: Any, synced_gpus: bool) -> None:
    if not kwargs.get("use_cache", True):
        raise ValueError("assisted generate requires `use_cache=True`")
    cache = cache_in(kwargs)
    static = config.cache_implementation in (
        "static",
        "hybrid",
        "sliding_window",
        "offloaded_static",
        "offloaded_hybrid",
    )
    if static or "Static" in type(cache).__name__:
        raise ValueError("assisted generate is not supported with Static cache classes`")
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
    elif cache is not None and not isinstance(cache, DynamicCache):
        wrong = f"a cache of type {type(cache).__name__}: rejected tokens must be rolled back. Use DynamicCache or none"
    elif cache is not None and getattr(cache, "offloading", False):
        wrong = "an offloaded cache. Use DynamicCache or none"
    elif cache is not None and input_ids.shape[0] > 1 and cache.get_seq_length() > 0:
        wrong = (
            f"past_key_values with {cache.get_seq_length()} tokens for a batch of {input_ids.shape[0]}; reuse over "
            "turns is for batch size 1"
        )
    else:
        extra = sorted(name for name, value in kwargs.items() if value is not None and name not in _KNOWN_KWARGS)
        # Families mark text with token type 0; a mask of zeros says nothing.
        extra = [name for name in extra if not (name == "token_type_ids" and not kwargs[name].any())]
        if extra:
            wrong = f"model inputs {extra}: only input_ids of text are drafted for. Generate without a drafter"
    if wrong:
        raise UnsupportedOptionError(f"DSpark decoding does not support {wrong}.")


def _check_placement(model: Any, drafter: Any) -> None:
    """Drafter and target may differ in dtype, and the drafter may sit on any device of the target's kind."""
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
            f"The target is in bfloat16, which {device_name(theirs)} does not compute in: float32 is several times faster here. Load "
            "target and drafter with dtype=torch.float32 (or load_target and load_drafter with dtype='fast').",
        )
    if drafter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UnsupportedOptionError(
            f"The drafter's weights are {drafter.dtype}; it drafts in float32, bfloat16, float16 or float64. Load it with dtype=."
        )


def _block_size(drafter: Any, options: CallOptions) -> int:
    longest = drafter.config.block_size
    if options.block_size is None:
        return longest
    if not 1 <= options.block_size <= longest:
        raise ValueError(
            f"block_size={options.block_size}, but this drafter was trained for blocks of 1..{longest} tokens; beyond "
            "that acceptance collapses. Ask for fewer, or train a drafter with a longer block."
        )
    return options.block_size


def _prompts(input_ids: torch.Tensor, kwargs: dict[str, Any], mask_length: int | None, device: torch.device) -> list[torch.Tensor]:
    """Each row's ids without padding. What the mask leaves out does not exist here, and position ids count what is
    left."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UnsupportedOptionError(
            "DSpark decoding needs prompts as input_ids of shape (batch, length >= 1); got "
            f"{tuple(input_ids.shape)}. An empty prompt has nothing to condition on: start with a bos token."
        )
    mask = kwargs.get("attention_mask")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(input_ids.device).bool()
    # `generate` drops masks of ones, but remembers how long they were.
    width = keep.shape[1] if mask is not None or mask_length is None else mask_length
    if keep.shape[0] != input_ids.shape[0] or width != input_ids.shape[1]:
        raise UnsupportedOptionError(
            f"attention_mask covers {width} tokens, input_ids has shape {tuple(input_ids.shape)}; they must agree. "
            "With past_key_values too, give the ids of the whole text, not only the new ones."
        )
    empty = (~keep.any(1)).nonzero().flatten().tolist()
    if empty:
        raise UnsupportedOptionError(f"Rows {empty} of the batch are empty prompts (attention_mask all 0); every row needs a token.")
    positions = kwargs.get("position_ids")
    if positions is not None and positions.shape[-1] == input_ids.shape[1]:
        expected = (keep.long().cumsum(1) - 1)[keep]
        if not torch.equal(positions.to(input_ids.device).expand_as(input_ids)[keep], expected):
            raise UnsupportedOptionError("position_ids other than 0, 1, .. over the unmasked tokens are not supported; leave them out.")
    return [row[kept].to(device) for row, kept in zip(input_ids, keep, strict=True)]


# -------------------------------------------------------------------------------------------------------------- outputs


def _padded(sequences: Sequences, config: Any) -> torch.Tensor:
    longest = max(sequences.lengths)
    out = sequences.ids[:, :longest].clone()
    pad = getattr(config, "_pad_token_tensor", None)
    for row, length in enumerate(sequences.lengths):
        if length < longest:
            out[row, length:] = 0 if pad is None else pad.flatten()[0]
    return out


def _stacked(rows: list[list[torch.Tensor]] | None) -> tuple[torch.Tensor, ...] | None:
    """One `(B, V)` tensor a generated position, as transformers returns them; zeros where a row had already ended."""
    if rows is None:
        return None
    longest = max(map(len, rows))
    blank = torch.zeros_like(next(r[0] for r in rows if r))
    return tuple(torch.stack([r[k] if k < len(r) else blank for r in rows]) for k in range(longest))


# ---------------------------------------------------------------------------------------------------- caches over turns


@dataclass
class _TurnState:
    """Rides on the caller's cache from one turn to the next: what transformers' cache cannot hold."""

    ids: torch.Tensor
    context: Context
    drafter: weakref.ref[Any]
    adapters: tuple[str, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> _TurnState:
        return _TurnState(self.ids.clone(), copy.deepcopy(self.context, memo), self.drafter, self.adapters)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # A pickled cache comes back without it, and the next call reads the whole prompt.


def _resume(cache: Any, drafter: Any, prompts: list[torch.Tensor]) -> tuple[Context | None, int]:
    """Continue a lone row where the caller's cache ends, if its context is at hand; otherwise read the whole prompt
    again."""
    cached = cache.get_seq_length() if cache is not None else 0
    if cached == 0:
        return None, 0
    state = getattr(cache, "_dspark_state", None)
    prompt = prompts[0]
    fits = (
        isinstance(state, _TurnState)
        and state.drafter() is drafter
        and state.adapters == active_adapters(drafter)
        and cached <= len(state.ids)
        and cached <= len(prompt)
        and torch.equal(state.ids[:cached].to(prompt.device), prompt[:cached])
    )
    if state is None or not fits:
        logger.warning(
            "past_key_values holds %d tokens without the drafter's context for them (it comes from another call, "
            "another drafter, another adapter or another text); the whole prompt is read again, and the cache is filled anew. The result "
            "is the same.",
            cached,
        )
        return None, 0
    # At least one token must be read, for the first logits. From here on this call writes behind what the cache still
    # holds.
    known = min(cached, len(prompt) - 1)
    state.ids = state.ids[:cached]
    forked = Context(_fork(state.context.target, known), _fork(state.context.drafter, known))
    return forked, known


def _fork(store: RowCache, length: int) -> RowCache:
    """Same buffers, own lengths: tokens beyond `length` are scratch, so a failed call loses nothing that was
    committed."""
    fork = RowCache()
    fork.__dict__.update(store.__dict__)
    fork.keys, fork.values, fork.lengths = dict(store.keys), dict(store.values), [length]
    return fork


def _hand_over(cache: DynamicCache, context: Context, drafter: Any, ids: torch.Tensor, drafted: bool) -> None:
    """Fill the caller's cache with views of the row's keys and values: all tokens but the last, as after a plain
    call."""
    length = len(ids)
    store = context.target
    if store.lengths != [length]:
        raise RuntimeError(f"The row's cache holds {store.lengths} tokens, its text {length} before the last; please report this.")
    for index in sorted(store.keys):
        keys, values = store.keys[index][:1, :, :length], store.values[index][:1, :, :length]
        while len(cache.layers) <= index:
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        layer = cache.layers[index]
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length
            keys, values = keys[:, :, -layer.sliding_window + 1 :], values[:, :, -layer.sliding_window + 1 :]
        layer.keys, layer.values = keys, values
    cache._dspark_state = _TurnState(ids.clone(), context, weakref.ref(drafter), active_adapters(drafter)) if drafted else None
