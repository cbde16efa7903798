"""What decides whether ragged passes are exact on a model: lists of what is known, and a self-test that catches what no list names."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.targets.model_inputs import accepts, input_device
from hf_dspark.targets.ragged_attention import PREFIX, RaggedPass, ragged_attention, ragged_forward
from hf_dspark.targets.uncompiled import uncompiled
from hf_dspark.utils.compat import CACHE

# Layers whose state cannot be rolled back, or whose attention pattern the ragged pass does not reproduce.
_REFUSED_LAYERS = ("linear", "conv", "mamba", "recurrent", "chunked", "state_space", "rwkv")
_REFUSED_ROPE = ("dynamic", "longrope")
# The longest window that the self-test crosses by running past it: more would cost a prompt's time at the first call.
_CROSSED_WINDOW = 64


def check_length(model: Any, max_length: int) -> None:
    """Refuse lengths at which rows would influence each other, or a row's text depends on how it was split into passes.

    Raises:
        UnsupportedTargetError: for dynamic or longrope scaling past the original length, and for a window that only the cache has.
    """
    config = model.config.get_text_config(decoder=True)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for one in rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]:
        original: int = one.get("original_max_position_embeddings") or config.max_position_embeddings
        if one.get("rope_type") in _REFUSED_ROPE and max_length > original:
            raise UnsupportedTargetError(
                f"This target's rotary embedding ({one['rope_type']}) changes with the longest sequence beyond {original} tokens, and "
                f"max_length is {max_length}; ragged rows would influence each other. Lower max_new_tokens, or generate without a drafter."
            )
    longest = _finding(model).longest
    if longest is not None and max_length > longest:
        raise UnsupportedTargetError(
            f"{type(model).__name__} forgets all but the last {longest} tokens by its cache alone, so what a token sees of a longer text "
            f"depends on how the text was split into passes; max_length is {max_length}. Lower max_new_tokens, or generate without a "
            "drafter."
        )


@dataclass(frozen=True)
class _Finding:
    """What was found about a model: why ragged passes are refused (empty where they are exact), and up to which length they are exact."""

    reason: str = ""
    one_row_works: bool = False
    longest: int | None = None


_FOUND: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], _Finding]] = weakref.WeakKeyDictionary()


def check_target(model: Any) -> None:
    """Refuse models on which ragged passes would not be exact; the answer is cached for each model.

    Lists catch what is known (no roll-back, own attention); a two-row self-test against plain passes catches what no list names.

    Raises:
        UnsupportedTargetError: with the reason and what to do instead.
    """
    found = _finding(model)
    if found.reason:
        raise UnsupportedTargetError(found.reason, found.one_row_works)


def _finding(model: Any) -> _Finding:
    config = model.config.get_text_config(decoder=True)
    attention = (getattr(config, "_attn_implementation", None) or "").removeprefix(PREFIX)
    key = (attention, model.dtype, str(model.device), model.training)
    known = _FOUND.setdefault(model, {})
    if key not in known:
        with uncompiled(model):
            known[key] = _examine(model, config)
    return known[key]


def _examine(model: Any, config: Any) -> _Finding:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return _Finding(f"{name} is an encoder-decoder; DSpark needs a decoder-only causal language model.")
    bad = sorted({kind for kind in getattr(config, "layer_types", None) or [] if any(word in kind for word in _REFUSED_LAYERS)})
    if getattr(model, "_is_stateful", False) or bad:
        return _Finding(
            f"{name} has layers that cannot take rejected tokens back ({', '.join(bad) or 'a recurrent state'}); speculative decoding "
            "needs a cache that rolls back. Generate without `assistant_model`."
        )
    if not accepts(model, "position_ids"):
        return _one_row(model, f"{name} takes no position_ids, so rows of different length cannot share one pass.")
    try:
        error, allowed, longest = self_test(model)
    except torch.OutOfMemoryError:
        raise
    except UnsupportedTargetError as refused:
        return _one_row(model, refused.reason)
    except Exception as broke:  # attention of its own meets shapes and caches that it does not expect: anything may be raised
        return _one_row(
            model,
            f"{name} cannot run a ragged pass ({type(broke).__name__}: {broke}); its attention does not follow transformers' attention "
            "interface.",
        )
    if error <= allowed:
        return _Finding(longest=longest)
    return _one_row(
        model,
        f"The self-test of ragged passes failed on {name}: logits differ from plain passes by {error:.2e} of their spread, allowed "
        f"{allowed:.0e}. Please report the model.",
    )


def _one_row(model: Any, reason: str) -> _Finding:
    """Ragged passes are refused for this reason; whether one row works in transformers' own loop: several tokens behind a cache."""
    name, allowed, text = type(model).__name__, _allowed_error(model), _test_ids(model, 9)
    if model.training:
        return _Finding(
            f"{name} is in training mode: its passes may differ from each other (dropout) or keep no cache (gradient checkpointing). Call "
            "target.eval() first."
        )
    try:
        error = _relative_error(_in_passes(model, text, [5, 4]), _in_passes(model, text, [5, 1, 1, 1, 1]))
    except torch.OutOfMemoryError:
        raise
    except Exception as broke:
        return _Finding(
            f"{reason} Nor does it run several tokens behind a cache ({type(broke).__name__}: {broke}), which speculative decoding needs. "
            "Generate without `assistant_model`."
        )
    if not error <= allowed:
        return _Finding(
            f"{reason} Nor do its own passes over several tokens agree with those over one: logits differ by {error:.2e} of their spread, "
            f"allowed {allowed:.0e}. So it is where a pass quantizes its activations by all of its tokens, as torch's dynamic quantization "
            "does. Speculative decoding would change the text: generate without `assistant_model`."
        )
    return _Finding(reason, one_row_works=True)


@torch.no_grad()
def self_test(model: Any) -> tuple[float, float, int | None]:
    """Compare ragged passes over two rows, rolled back in between, with what plain generation does: a prompt, then token by token.

    The longer row crosses every window that the model's config or cache names, up to `_CROSSED_WINDOW` tokens; longer ones are compared by
    what cache, mask and attention were told.

    Returns:
        the root mean square difference of logits over their standard deviation, the largest value allowed for the model's dtype, and the
        longest text for which the model can be exact at all, None where any is.
    """
    told = RaggedPass(RowLayout([0, 0], [2, 1], input_device(model)))
    cache_windows, trims = _cache_windows(model), accepts(model, "logits_to_keep")
    with ragged_attention(model):
        ragged_forward(model, _test_ids(model, 3), told.layout, _two_rows(), False, trims, told)
    longest = min(cache_windows - told.attended_windows, default=None)
    crossed = [w for w in cache_windows | told.attended_windows if w <= _CROSSED_WINDOW]
    length = max([11, *(w + 4 for w in crossed)]) if longest is None else min(11, longest)
    rows, cuts = [_test_ids(model, n) for n in (length, 6)], [length - 4, 2]
    store, pieces = _two_rows(), list[list[torch.Tensor]]([[], []])
    with ragged_attention(model):
        # The second pass is rejected and comes again: what it wrote must not be seen.
        for begin, ends, stays in (([0, 0], cuts, True), (cuts, [length - 1, 5], False), (cuts, [length, 6], True)):
            chunks = [row[b:e] if stays else row[b:e].flip(0) for row, b, e in zip(rows, begin, ends, strict=True)]
            layout = RowLayout(begin, [len(c) for c in chunks], input_device(model))
            logits = ragged_forward(model, torch.cat(chunks), layout, store, False, trims)
            for row, piece in enumerate(logits.split(layout.counts) if stays else ()):
                pieces[row].append(piece.float())
    plain = torch.cat([_in_passes(model, rows[0], [length - 2, 1, 1]), _in_passes(model, rows[1], [6])])
    return _relative_error(torch.cat([torch.cat(p) for p in pieces]), plain), _allowed_error(model), longest


def _two_rows() -> RowCache:
    store = RowCache()
    store.add_rows(2)
    return store


def _test_ids(model: Any, count: int) -> torch.Tensor:
    """Token ids `(count,)` from all over the vocabulary."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(count, device=input_device(model)) * 7919 + 3 * count) % vocab


@torch.no_grad()
def _in_passes(model: Any, ids: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Logits `(n, V)` of plain passes over so many tokens each of `ids` `(n,)`, behind the cache that `generate` would make."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    positions, numbered = torch.arange(len(ids), device=ids.device), accepts(model, "position_ids")
    logits = []
    for piece, places in zip(ids.split(list(counts)), positions.split(list(counts)), strict=True):
        # Left alone, m-rope classes would number positions by what the last `generate` has left on them.
        extra = {"position_ids": places[None]} if numbered else {}
        logits.append(model(input_ids=piece[None], use_cache=True, **{CACHE: cache}, **extra).logits[0].float())
    if cache.get_seq_length() == 0:
        raise RuntimeError("it keeps no cache")
    return torch.cat(logits)


def _cache_windows(model: Any) -> set[int]:
    """Windows of the layers of the cache that `generate` would make."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return {window for layer in layers if (window := getattr(layer, "sliding_window", None))}


def _relative_error(got: torch.Tensor, plain: torch.Tensor) -> float:
    return ((got - plain).square().mean().sqrt() / plain.std()).item()


def _allowed_error(model: Any) -> float:
    exact = model.dtype in (torch.float32, torch.float64) and not getattr(model, "is_quantized", False)
    return 1e-3 if exact else 0.1
