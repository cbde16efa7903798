"""Cache reuse over turns: the caller's cache is filled at the end of a call, and the next call goes on from it."""

from __future__ import annotations

import copy
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hf_dspark.adapters.lora import active_adapters
from hf_dspark.cache.kv_cache import RowCache
from hf_dspark.decoding.state import State
from hf_dspark.models.modeling_dspark import DSparkDrafter

logger = logging.getLogger(__name__)


@dataclass
class TurnState:
    """Attached to the caller's cache from one turn to the next: what transformers' cache cannot hold."""

    ids: torch.Tensor
    target_cache: RowCache
    drafter_cache: RowCache
    drafter: weakref.ref[DSparkDrafter]
    adapters: tuple[str, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> TurnState:
        target_cache, drafter_cache = (copy.deepcopy(cache, memo) for cache in (self.target_cache, self.drafter_cache))
        return TurnState(self.ids.clone(), target_cache, drafter_cache, self.drafter, self.adapters)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # A pickled cache comes back without it, and the next call reads the whole prompt.


def resume(cache: Cache | None, drafter: DSparkDrafter, state: State, prompt: torch.Tensor) -> int:
    """Continue a single row where the caller's cache ends, if the drafter's context for it is at hand; otherwise read the whole prompt
    again.

    Args:
        cache (`Cache`, *optional*): the caller's.
        drafter (`DSparkDrafter`): of this call.
        state (`State`): without rows; its caches become those of the turn before.
        prompt (`torch.LongTensor` of shape `(n,)`): the whole text.
    Returns:
        `int`: tokens of the prompt that the state's caches hold.
    """
    cached = cache.get_seq_length() if cache is not None else 0
    if cached == 0:
        return 0
    turn = getattr(cache, "_dspark_state", None)
    fits = (
        isinstance(turn, TurnState)
        and turn.drafter() is drafter
        and turn.adapters == active_adapters(drafter)
        and cached <= len(turn.ids)
        and cached <= len(prompt)
        and torch.equal(turn.ids[:cached].to(prompt.device), prompt[:cached])
    )
    if not isinstance(turn, TurnState) or not fits:
        logger.warning(
            "past_key_values holds %d tokens without the drafter's context for them (it comes from another call, "
            "another drafter, another adapter or another text); the whole prompt is read again, and the cache is filled anew. The result "
            "is the same.",
            cached,
        )
        return 0
    # From here on this call writes behind what the cache still holds.
    turn.ids = turn.ids[:cached]
    # Forks: tokens beyond the cached ones are scratch, so a failed call loses nothing that was committed.
    state.target_cache, state.drafter_cache = turn.target_cache.fork(state.limit), turn.drafter_cache.fork(state.limit)
    return min(cached, len(prompt) - 1)  # At least one token must be read, for the first logits.


def hand_over(cache: DynamicCache, state: State, drafter: DSparkDrafter, ids: torch.Tensor, drafted: bool) -> None:
    """Fill the caller's cache with views of the row's keys and values: all tokens but the last, as after a plain call.

    Args:
        cache (`DynamicCache`): the caller's.
        state (`State`): of which the row has just left.
        drafter (`DSparkDrafter`): of this call.
        ids (`torch.LongTensor` of shape `(n,)`): all tokens but the last.
        drafted (`bool`): whether the drafter's cache was filled along.
    """
    length, store = len(ids), state.target_cache
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
    adapters = active_adapters(drafter)
    turn = TurnState(ids.clone(), store, state.drafter_cache, weakref.ref(drafter), adapters) if drafted else None
    cache._dspark_state = turn
