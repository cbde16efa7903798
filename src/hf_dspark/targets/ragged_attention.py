"""Ragged target passes: rows of different length flattened into one sequence, exactly, at the cost of their sum.

Linear layers see `(1, T)` tokens, T = sum of the rows' new tokens; only attention is told that they belong to different rows. It reads
a `RaggedPass` from a context variable, because many models do not pass keyword arguments down. While no pass is active the registered
attention and mask functions do what the model's own implementation does, so other threads that use the same target are not disturbed.

Source of the layout: paper section 5.2 (verification of sum(1 + l_r) tokens).
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.cache.layout import RowLayout
from hf_dspark.errors import UnsupportedTargetError
from hf_dspark.utils.compat import CACHE, CACHE_NAMES
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

PREFIX = "dspark_ragged_"
# Above this many new tokens in a row, rows attend one by one: no padding, and no mask at the start of a prompt.
ROW_BY_ROW_TOKENS = 32
# New tokens of a row that attend together under a mask: 16 MiB of it at 32,768 tokens of context, 64 MiB as SDPA adds it to scores.
MASKED_TOKENS = 512
# Keyword arguments of attention functions that change nothing here.
_HARMLESS = {
    "dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    *CACHE_NAMES, "past_key_value", "position_embeddings", "head_mask", "layer_idx", "output_router_logits",
    "logits_to_keep", "return_dict", "token_type_ids", "num_items_in_batch",
}  # fmt: skip


class RaggedCache(Cache):
    """A `Cache` over a `RowCache`: `update` puts each row's tokens into that row and returns views of all rows."""

    def __init__(self, store: RowCache) -> None:
        super().__init__(layers=[])
        self.store = store
        self.layout: RowLayout | None = None
        self.written: set[int] = set()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of shape `(1, heads, T, head_dim)` in, views of shape `(R, heads, longest, head_dim)` out."""
        layout = self.layout
        if layout is None or key_states.shape[0] != 1 or key_states.shape[2] != layout.total:
            raise UnsupportedTargetError(
                f"A ragged pass of {layout.total if layout else 'no'} tokens got key states of shape {tuple(key_states.shape)}; this "
                "target does not treat its input as one flat sequence.",
                one_row_works=True,
            )
        self.store.write(layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1), layout.on(key_states.device))
        self.written.add(layer_idx)
        return self.store.view(layer_idx, layout)

    # The mask builders ask for sizes; the mask is not used in a ragged pass.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.layout is None else max(self.layout.starts, default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.store.keys)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * max(len(self.store.keys), 1)


class RaggedPass:
    """What attention reads during one flattened pass: the layout, and masks shared by all layers."""

    def __init__(self, layout: RowLayout) -> None:
        self.layout = layout
        self.attended = 0
        # Windows that the model's masks would have had, and windows that its attention was told: a window in the mask alone is lost here.
        self.masked_windows: set[int] = set()
        self.attended_windows: set[int] = set()
        self._masks: dict[tuple[int | None, int, torch.device, torch.dtype], torch.Tensor | None] = {}

    def folded_mask(self, window: int | None, groups: int, device: torch.device, dtype: torch.dtype = torch.bool) -> torch.Tensor | None:
        """Mask of shape `(R, 1, groups * max_count, max_end - first_key)` for queries whose head groups lie along the query axis.

        True where a query may look; of a floating `dtype`, what is added to its scores, which is what a call of attention would make of
        it, layer after layer.
        """
        key = (window, groups, device, dtype)
        if key not in self._masks:
            layout = self.layout.on(device)
            if layout.num_rows == 1 and layout.total == 1 and (window is None or layout.max_end - layout.first_key(window) <= window):
                self._masks[key] = None
            else:
                mask = layout.causal_mask(window).repeat(1, groups, 1)[:, None]
                if dtype != torch.bool:
                    mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
                self._masks[key] = mask
        return self._masks[key]

    def check_windows(self, name: str) -> None:
        """Refuse a model that limits attention by its mask alone, which a ragged pass does not see."""
        lost = sorted(self.masked_windows - self.attended_windows)
        if lost:
            raise UnsupportedTargetError(
                f"{name} limits attention to {lost} tokens by its mask and does not tell its attention function; a ragged pass would see "
                "too much.",
                one_row_works=True,
            )


_ACTIVE: ContextVar[RaggedPass | None] = ContextVar("hf_dspark_ragged_pass", default=None)


@contextmanager
def active_pass(ragged: RaggedPass) -> Iterator[RaggedPass]:
    """Make `ragged` the pass that attention in this thread works on."""
    token = _ACTIVE.set(ragged)
    try:
        yield ragged
    finally:
        _ACTIVE.reset(token)


def _fold(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`(R, H, L, D)` to `(R, H_kv, G * L, D)`: a head group becomes more queries, so that keys are never repeated."""
    rows, heads, length, dim = query.shape
    return query.reshape(rows, kv_heads, heads // kv_heads * length, dim)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of folded queries `(R, H_kv, G * L, D)` under a mask `(R, 1, G * L, S)`, in the model's own arithmetic."""
    if softcap is None and sinks is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is None:
        weights = scores.float().softmax(-1).to(query.dtype)
    else:
        kv_heads, groups = key.shape[1], sinks.numel() // key.shape[1]
        per_query = sinks.view(1, kv_heads, groups, 1).expand(-1, -1, -1, query.shape[2] // groups)
        column = per_query.reshape(1, kv_heads, -1, 1).expand(query.shape[0], -1, -1, -1).to(scores.dtype)
        weights = torch.cat([scores, column], dim=-1).float().softmax(-1)[..., :-1].to(query.dtype)
    return torch.matmul(weights, value)


def _attend_padded(
    ragged: RaggedPass, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, **how: Any
) -> torch.Tensor:
    """All rows in one call, short rows padded to the longest; queries `(1, H, T, D)`, result `(1, T, H, D)`."""
    layout = ragged.layout.on(query.device)
    rows, length = layout.num_rows, layout.max_count
    heads, dim = query.shape[1], query.shape[3]
    if rows == 1:
        padded = query
    elif layout.equal_counts:
        padded = query[0].view(heads, rows, length, dim).transpose(0, 1)
    else:
        padded = query[0][:, layout.padded_index].transpose(0, 1)
    kv_heads, low = key.shape[1], layout.first_key(window)
    key, value = key[:, :, low:], value[:, :, low:]
    # On a CPU a mask that is already what attention adds to its scores saves making it so in every layer.
    added = query.device.type == "cpu" and how["softcap"] is None and how["sinks"] is None
    mask = ragged.folded_mask(window, heads // kv_heads, query.device, query.dtype if added else torch.bool)
    out = _attend(_fold(padded, kv_heads), key, value, mask, **how)
    out = out.reshape(rows, heads, length, -1).transpose(1, 2).reshape(rows * length, heads, -1)
    # Contiguous, as transformers' own attention functions leave it: some models go on with `.view`.
    return (out.contiguous() if layout.equal_counts else out[layout.flat_index])[None]


def _attend_row_by_row(
    ragged: RaggedPass, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, **how: Any
) -> torch.Tensor:
    """Row after row, as suits long pieces of prompts; same shapes as `_attend_padded`."""
    layout = ragged.layout
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    simple = how["softcap"] is None and how["sinks"] is None
    outs = []
    for row, start, count, first in _pieces(layout, window, simple):
        q, end = query[0, :, first : first + count], start + count
        low = 0 if window is None else max(start - window + 1, 0)
        k, v = key[row, :, low:end], value[row, :, low:end]
        causal = start == 0 and (window is None or end <= window)
        mask = None if causal and simple else RowLayout([start], [count], query.device).causal_mask(window)
        if simple:
            # Every head of a group looks at the same keys: a view of them, never a copy.
            k, v = (x[:, None].expand(-1, groups, -1, -1) for x in (k, v))
            q = q.unflatten(0, (kv_heads, groups))
            # Two dimensions of mask: with three, SDPA falls back to writing all scores down.
            mask = None if mask is None else mask[0]
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and count > 1, scale=how["scaling"]
            )
            out = out.flatten(0, 1)
        else:
            folded = None if mask is None else mask.repeat(1, groups, 1)[:, None]
            out = _attend(_fold(q[None], kv_heads), k[None], v[None], folded, **how).reshape(query.shape[1], count, -1)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)[None]


def _pieces(layout: RowLayout, window: int | None, simple: bool) -> Iterator[tuple[int, int, int, int]]:
    """Row, start, tokens, and place in the pass of what attends together: few tokens where they need a mask, for it spans the context."""
    for row, (start, count, first) in enumerate(zip(layout.starts, layout.counts, layout.firsts, strict=True)):
        whole = simple and start == 0 and (window is None or count <= window)
        some = count if whole else MASKED_TOKENS
        for place in range(0, count, some):
            yield row, start + place, min(some, count - place), first + place


def _ragged_attention(
    ragged: RaggedPass,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS and not isinstance(given, bool))
    if unknown:
        raise UnsupportedTargetError(
            f"{type(module).__name__} passes {unknown} to its attention function, which ragged verification does not support; allowed are "
            "scaling, sliding_window, softcap and s_aux.",
            one_row_works=True,
        )
    if query.shape[0] != 1 or query.shape[2] != ragged.layout.total or key.shape[0] != ragged.layout.num_rows:
        raise UnsupportedTargetError(
            f"{type(module).__name__} called attention with queries {tuple(query.shape)} and keys {tuple(key.shape)}; a ragged pass of "
            f"{ragged.layout.num_rows} rows needs (1, heads, {ragged.layout.total}, dim) and one key row each.",
            one_row_works=True,
        )
    ragged.attended += 1
    if sliding_window is not None:
        ragged.attended_windows.add(sliding_window)
    short = not ragged.layout.starts or ragged.layout.max_count <= ROW_BY_ROW_TOKENS  # a `TensorLayout` has no starts
    attend = _attend_padded if short else _attend_row_by_row
    return attend(ragged, query, key, value, sliding_window, scaling=scaling, softcap=softcap, sinks=s_aux), None


def _register(base: str) -> str:
    """Register the ragged twin of attention implementation `base` once; returns its name."""
    name = PREFIX + base
    if name in ALL_ATTENTION_FUNCTIONS._global_mapping:
        return name

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        ragged = _ACTIVE.get()
        if ragged is not None:
            return _ragged_attention(ragged, module, query, key, value, **kwargs)
        # Another thread, or a plain call between two passes: what the model would have done without us.
        own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        plain: Any = own if base == "eager" else ALL_ATTENTION_FUNCTIONS.get_interface(base, own)
        return plain(module, query, key, value, attention_mask, *args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        ragged = _ACTIVE.get()
        if ragged is None:
            return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)
        if kwargs.get("local_size") is not None:
            ragged.masked_windows.add(kwargs["local_size"])
        return None

    AttentionInterface.register(name, attention)
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, mask)
    return name


def _tell_of_kernels(base: str) -> None:
    if base not in ("eager", "sdpa"):
        warn_once(
            logger,
            f"This target was loaded with attn_implementation={base!r}. With a drafter it attends by PyTorch's SDPA, all rows in one call; "
            "plain calls keep their own kernels.",
        )


_LOCK = threading.Lock()
_USERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _attention_configs(model: nn.Module) -> list[Any]:
    """Every configuration object below `model` that names an attention implementation, each once."""
    configs = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "_attn_implementation", None)}
    return list(configs.values())


@contextmanager
def ragged_attention(model: nn.Module) -> Iterator[None]:
    """While open, `model`'s attention follows an active `RaggedPass`; without one it computes what it always did.

    May be entered from several threads: the first flips the implementation, the last flips it back.
    """
    counted = False
    try:
        with _LOCK:
            _USERS[model] = _USERS.get(model, 0) + 1
            counted = True
            for config in _attention_configs(model):
                if not config._attn_implementation.startswith(PREFIX):
                    _tell_of_kernels(config._attn_implementation)
                    config._attn_implementation_internal = _register(config._attn_implementation)
        yield
    finally:
        with _LOCK:
            if counted:
                _USERS[model] -= 1
            if _USERS.get(model, 0) == 0:
                for config in _attention_configs(model):
                    config._attn_implementation_internal = config._attn_implementation.removeprefix(PREFIX)


def ragged_forward(
    model: Any, ids: torch.Tensor, layout: RowLayout, store: RowCache, only_last: bool, trims: bool, ragged: RaggedPass | None = None
) -> torch.Tensor:
    """Logits of one flattened pass, `(T, V)`, or of each row's last token, `(R, V)`; arguments as in `Target.forward`.

    Args:
        trims (`bool`): the model's forward takes `logits_to_keep`.
        ragged (`RaggedPass`, *optional*): notes what attention is told; a new one where None.
    """
    cache = RaggedCache(store)
    cache.layout = layout
    extra = {"logits_to_keep": layout.last} if only_last and trims else {}
    with active_pass(ragged or RaggedPass(layout)) as ragged:
        out = model(input_ids=ids[None], position_ids=layout.positions[None], use_cache=True, **{CACHE: cache}, **extra)
    ragged.check_windows(type(model).__name__)
    if ragged.attended == 0:
        raise UnsupportedTargetError(
            f"{type(model).__name__} does not use transformers' attention interface, so rows of different length cannot share one pass.",
            one_row_works=True,
        )
    logits = out.logits[0]
    return logits[layout.on(logits.device).last] if only_last and not trims else logits
