"""The target as decoding sees it: token ids in, logits and taps out. Knows the target's modules; knows no drafter and no loop.

A tap is the raw output of a decoder layer, caught by a forward hook: the last entry of `hidden_states` is already normed, and the
numbering of `output_hidden_states` has changed between versions of transformers.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from hf_dspark.cache.kv_cache import RowCache, RowLayout
from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.targets.ragged_attention import PREFIX, RaggedCache, RaggedPass, active_pass, ragged_attention
from hf_dspark.utils.compat import CACHE

# Layers whose state cannot be rolled back, or whose attention pattern the ragged pass does not reproduce.
_REFUSED_LAYERS = ("linear", "conv", "mamba", "recurrent", "chunked", "state_space", "rwkv")
_REFUSED_ROPE = ("dynamic", "longrope")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model.

    Raises:
        UnsupportedTargetError: if they cannot be found.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for owner in (
        decoder,
        getattr(decoder, "decoder", None),
        getattr(model, "transformer", None),
        getattr(model, "model", None),
    ):
        for name in ("layers", "h", "blocks"):
            found = getattr(owner, name, None)
            if isinstance(found, nn.ModuleList):
                return found
    raise UnsupportedTargetError(
        f"{type(model).__name__} has no list of decoder layers where one is expected (`layers`, `h` or `blocks` of its decoder), so its "
        "hidden states cannot be read. Use a decoder-only causal language model."
    )


_TAPS: ContextVar[Taps | None] = ContextVar("hf_dspark_taps", default=None)


class Taps:
    """Hidden states of chosen layers, caught while `open()` is active in this thread.

    Args:
        model (`PreTrainedModel`): the target.
        layer_ids (`list[int]`): i is the output of decoder layer i; -1 is the embeddings, the input of layer 0.
    """

    def __init__(self, model: nn.Module, layer_ids: Sequence[int]) -> None:
        self.layer_ids = list(layer_ids)
        self._layers = decoder_layers(model)
        if self.layer_ids and not -1 <= min(self.layer_ids) <= max(self.layer_ids) < len(self._layers):
            raise UnsupportedTargetError(
                f"Taps {self.layer_ids} lie outside this target's {len(self._layers)} layers; allowed are -1 (embeddings) to "
                f"{len(self._layers) - 1}. The drafter was made for another target."
            )
        self._caught: dict[int, torch.Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hook the layers; the hooks are removed on leaving, whatever happened inside. Other threads pass unseen."""
        with ExitStack() as stack:
            for layer_id in self.layer_ids:
                handle = self._hook(layer_id)
                stack.callback(handle.remove)
            token = _TAPS.set(self)
            stack.callback(_TAPS.reset, token)
            yield

    def _hook(self, layer_id: int) -> Any:
        def keep(hidden: torch.Tensor) -> None:
            if _TAPS.get() is self:
                self._caught[layer_id] = hidden

        if layer_id == -1:

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                keep(args[0] if args else kwargs["hidden_states"])

            return self._layers[0].register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(output[0] if isinstance(output, tuple) else output)

        return self._layers[layer_id].register_forward_hook(after)

    def take(self, device: torch.device | None = None) -> torch.Tensor:
        """Concatenate and forget what the last pass left: `(batch, T, taps * hidden)`, on one device; nothing where nothing is tapped."""
        if not self.layer_ids:
            return torch.empty(1, 0, 0)
        states = [self._caught.pop(i) for i in self.layer_ids]
        device = device or states[0].device
        return torch.cat([s if s.device == device else s.to(device) for s in states], dim=-1)


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
    """Refuse models on which ragged passes would not be exact; the answer is remembered for each model.

    Lists catch what is known (no roll-back, own attention); a two-row self-test against a plain forward catches what no list names.

    Raises:
        UnsupportedTargetError: with the reason and what to do instead.
    """
    config = model.config.get_text_config(decoder=True)
    attention = (getattr(config, "_attn_implementation", None) or "").removeprefix(PREFIX)
    key = (attention, model.dtype, str(model.device), model.training)
    known = _CHECKED.setdefault(model, {})
    if key not in known:
        known[key] = _reason_against(model, config)
    reason, one_row_works = known[key]
    if reason:
        raise UnsupportedTargetError(reason, one_row_works)


def _reason_against(model: Any, config: Any) -> tuple[str, bool]:
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
