"""The graphs of a target and a drafter, which stay with the target from call to call, and what makes them out of date."""

from __future__ import annotations

import logging
import operator
from collections.abc import Hashable
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.utils.graphs import Graphs
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

_MOST_KEPT = 4  # pairs of a target with a drafter and a config, whose graphs stay


class _Kept:
    """Graphs that stay with a target from call to call; not copied and not saved with it."""

    def __init__(self) -> None:
        self.by_use: dict[Hashable, tuple[list[Any], Any, Graphs]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Kept, ()


def compiled_graphs(
    target: PreTrainedModel, drafter: DSparkDrafter, how: bool | CompileConfig, device: torch.device, longest: int
) -> Graphs | None:
    """The graphs of a target and a drafter, as they are now: of earlier calls if nothing that a graph depends on has changed since.

    Args:
        target (`PreTrainedModel`), drafter (`DSparkDrafter`): bound.
        how (`bool` or `CompileConfig`): `Options.compile`.
        device (`torch.device`): the target's.
        longest (`int`): tokens of the longest row that will come.
    Returns:
        `Graphs`; None where nothing is to be compiled, or the target cannot be, which is logged once.
    Raises:
        RuntimeError: if it cannot be, with `CompileConfig(fullgraph=True)`.
    """
    if how is False:
        return None
    config = None if how is True else how
    if (why := _obstacle(target, device) or _obstacle(drafter, device)) is not None:
        if config is not None and config.fullgraph:
            raise RuntimeError(f"{type(target).__name__} cannot be compiled: {why}. Leave compile_config.fullgraph out to run eagerly.")
        warn_once(logger, f"{type(target).__name__} is not compiled, and decodes eagerly: {why}.")
        return None
    positions = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None) or longest
    if (device.type == "cuda" or (config is not None and config.dynamic is False)) and longest > positions:
        warn_once(
            logger, f"A call decodes eagerly: padding of its {longest} tokens and a block would pass the target's {positions} positions."
        )
        return None
    kept = target.__dict__.setdefault("_dspark_graphs", _Kept()).by_use
    switches = tuple(_switches(model) for model in (target, drafter))
    use = (id(drafter), None if config is None else repr(sorted(config.to_dict().items())), switches)
    weights: list[Any] = [weight for model in (target, drafter) for weight in (*model.parameters(), *model.buffers())]
    frozen = config is not None and bool((config.options or {}).get("freezing"))  # their values are in the graphs then
    state = (
        [(weight.data_ptr(), weight.dtype, _version(weight) if frozen else 0) for weight in weights],
        None if drafter.draft_token_ids is None else _version(drafter.d2t),
        (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type), torch.get_num_threads()),
    )
    weights.append(drafter.target_rows)
    if use in kept:
        old_weights, old_state, graphs = kept[use]
        if old_state == state and all(map(operator.is_, old_weights, weights)):
            return graphs
        del kept[use]
    while len(kept) >= _MOST_KEPT:
        del kept[next(iter(kept))]
    graphs = Graphs(device, config)
    kept[use] = (weights, state, graphs)
    return graphs


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _switches(model: Any) -> tuple[Hashable, ...]:
    """Whatever Python reads in a forward and may change: configurations, adapters, modes."""
    adapters = tuple(
        (str(m.active_adapter), bool(m.disable_adapters), tuple(m.merged_adapters), repr(getattr(m, "scaling", None)))
        for m in model.modules()
        if hasattr(m, "merged_adapters")
    )
    return model.config.to_json_string(), model.training, adapters


def _obstacle(model: Any, device: torch.device) -> str | None:
    """Why a target or a drafter cannot be compiled; None where nothing speaks against it."""
    if getattr(model, "hf_quantizer", None) is not None and not model.hf_quantizer.is_compileable:
        return "its quantization cannot be compiled"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "its weights are offloaded or spread by hooks"
    hooks = (hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    if not all(getattr(hook, "is_dspark_tap", False) for hook in hooks):  # those of another thread's call
        return "forward hooks are registered on it, which a graph would not run"
    if (devices := {p.device for p in model.parameters()}) != {device}:
        return f"its weights lie on {', '.join(sorted(map(str, devices)))}"
    return None
