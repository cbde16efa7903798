"""The target as decoding sees it: token ids in, logits and the hidden states of the tapped layers out."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.targets.ragged_attention import PREFIX, RaggedCache, RaggedPass, active_pass, ragged_attention
from hf_dspark.targets.taps import Taps
from hf_dspark.utils.compat import CACHE

# Layers whose state cannot be rolled back, or whose attention pattern the ragged pass does not reproduce.
_REFUSED_LAYERS = ("linear", "conv", "mamba", "recurrent", "chunked", "state_space", "rwkv")
_REFUSED_ROPE = ("dynamic", "longrope")


class Target:
    """One target, open for ragged passes.

    Args:
        model (`PreTrainedModel`): a decoder-only causal language model.
        tap_ids (`list[int]`): layers whose output the drafter reads.
    Raises:
        UnsupportedTargetError: if ragged passes cannot be exact on this model.
    """

    def __init__(self, model: Any, tap_ids: Sequence[int]) -> None:
        self.model = model
        self.taps = Taps(model, tap_ids)
        check_target(model)
        self._trims_logits = _accepts(model, "logits_to_keep")

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.config.get_text_config(decoder=True).vocab_size

    @contextmanager
    def open(self) -> Iterator[Target]:
        """Attention follows rows and taps are caught until this is left."""
        with ragged_attention(self.model), self.taps.open():
            yield self

    def forward(self, ids: torch.Tensor, layout: RowLayout, store: RowCache, only_last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """One flattened pass.

        Args:
            ids (`torch.LongTensor` of shape `(T,)`): tokens of row 0, row 1, ..
            layout (`RowLayout`): where they belong.
            store (`RowCache`): keys and values of the rows; the pass writes the new tokens', committing none.
            only_last (`bool`): logits of each row's last token only.
        Returns:
            logits `(T, V)` or `(R, V)`, and taps `(T, taps * hidden)`.
        """
        logits = _ragged_forward(self.model, ids, layout, store, only_last, self._trims_logits)
        return logits, self.taps.take()[0]


def input_device(model: Any) -> torch.device:
    """Where the model's embedding takes token ids; for offloaded weights, where accelerate's hook brings them."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type == "meta":
        hook = getattr(embedding, "_hf_hook", None)
        places = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", [hook])]
        return torch.device(next((place for place in places if place is not None), "cpu"))
    return device


def _accepts(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _ragged_forward(model: Any, ids: torch.Tensor, layout: RowLayout, store: RowCache, only_last: bool, trims: bool) -> torch.Tensor:
    cache = RaggedCache(store)
    cache.layout = layout
    extra = {"logits_to_keep": layout.last} if only_last and trims else {}
    with active_pass(RaggedPass(layout)) as ragged:
        out = model(input_ids=ids[None], position_ids=layout.positions[None], use_cache=True, **{CACHE: cache}, **extra)
    ragged.check_windows(type(model).__name__)
    if ragged.attended == 0:
        raise UnsupportedTargetError(
            f"{type(model).__name__} does not use transformers' attention interface, so rows of different length cannot share one pass. "
            "Decode it at batch size 1, where transformers' own assisted loop drives the drafter.",
            one_row_works=True,
        )
    logits = out.logits[0]
    return logits[layout.on(logits.device).last] if only_last and not trims else logits


def check_length(model: Any, max_length: int) -> None:
    """Refuse lengths at which the rotary embedding of all rows would depend on the longest one.

    Raises:
        UnsupportedTargetError: for dynamic or longrope scaling past the original length.
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


_CHECKED: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[str, bool]]] = weakref.WeakKeyDictionary()


def check_target(model: Any) -> None:
    """Refuse models on which ragged passes would not be exact; the answer is cached for each model.

    Lists catch what is known (no roll-back, own attention); a two-row self-test against a plain forward catches what no list names.

    Raises:
        UnsupportedTargetError: with the reason and what to do instead.
    """
    config = model.config.get_text_config(decoder=True)
    attention = (getattr(config, "_attn_implementation", None) or "").removeprefix(PREFIX)
    key = (attention, model.dtype, str(model.device), model.training)
    known = _CHECKED.setdefault(model, {})
    if key not in known:
        known[key] = _reason_to_refuse(model, config)
    reason, one_row_works = known[key]
    if reason:
        raise UnsupportedTargetError(reason, one_row_works)


def _reason_to_refuse(model: Any, config: Any) -> tuple[str, bool]:
    """Why ragged passes are not exact on `model` (empty where they are), and whether a single row works without them."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; DSpark needs a decoder-only causal language model.", False
    bad = sorted({kind for kind in getattr(config, "layer_types", None) or [] if any(word in kind for word in _REFUSED_LAYERS)})
    if getattr(model, "_is_stateful", False) or bad:
        return (
            f"{name} has layers that cannot take rejected tokens back ({', '.join(bad) or 'a recurrent state'}); speculative decoding "
            "needs a cache that rolls back. Generate without `assistant_model`."
        ), False
    if not _accepts(model, "position_ids"):
        return (
            f"{name} takes no position_ids, so rows of different length cannot share one pass. Decode it at batch size 1, where "
            "transformers' own assisted loop drives the drafter."
        ), True
    try:
        error, allowed = self_test(model)
    except UnsupportedTargetError as refused:
        return str(refused), True
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as broke:  # attention of its own meets shapes that it does not expect
        return (
            f"{name} cannot run a ragged pass ({type(broke).__name__}: {broke}); its attention does not follow transformers' attention "
            "interface. Decode it at batch size 1, where transformers' own assisted loop drives the drafter."
        ), True
    if not error <= allowed and model.training:
        return f"{name} is in training mode, so its passes differ from each other (dropout). Call target.eval() first.", False
    if not error <= allowed:
        return (
            f"The self-test of ragged passes failed on {name}: logits differ from a plain forward by {error:.2e} of their spread, "
            f"allowed {allowed:.0e}. Decode it at batch size 1, where transformers' own assisted loop drives the drafter, and please "
            "report the model."
        ), True
    return "", True


@torch.no_grad()
def self_test(model: Any) -> tuple[float, float]:
    """Compare ragged passes over two rows with plain forwards of each row alone.

    Returns:
        the root mean square difference of logits over their standard deviation, and the largest value allowed for the model's dtype.
    """
    vocab, device = model.config.get_text_config(decoder=True).vocab_size, input_device(model)
    rows = [(torch.arange(n, device=device) * 7919 + 3 * n) % vocab for n in (11, 6)]
    cuts = [7, 2]
    store = RowCache()
    store.add_rows(2)
    trims = _accepts(model, "logits_to_keep")
    pieces: list[list[torch.Tensor]] = [[], []]
    with ragged_attention(model):
        for begin, ends in (([0, 0], cuts), (cuts, [11, 6])):
            chunks = [row[b:e] for row, b, e in zip(rows, begin, ends, strict=True)]
            layout = RowLayout(begin, [len(c) for c in chunks], device)
            logits = _ragged_forward(model, torch.cat(chunks), layout, store, False, trims)
            for row, piece in enumerate(logits.split(layout.counts)):
                pieces[row].append(piece.float())
    plain = torch.cat([model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows])
    ragged = torch.cat([torch.cat(p) for p in pieces])
    error = (ragged - plain).square().mean().sqrt() / plain.std()
    exact = model.dtype in (torch.float32, torch.float64) and not getattr(model, "is_quantized", False)
    return error.item(), 1e-3 if exact else 0.1
