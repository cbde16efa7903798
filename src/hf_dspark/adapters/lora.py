"""LoRA adapters inside a drafter: adding, naming, switching for one call, merging.

PEFT is imported when it is first needed, so that a drafter without adapters does not wait for it.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from packaging.version import parse
from torch import nn
from transformers import PreTrainedModel

from hf_dspark.errors import UnsupportedOptionError
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

Drafter = TypeVar("Drafter", bound=PreTrainedModel)

BASE = "base"
"""In place of an adapter's name: the drafter without any adapter."""

# Regular expressions of module names inside a drafter, whole names: the MLP's gate and the gated head's are both called gate_proj.
_MODULES = {
    **{name: rf"layers\.\d+\.self_attn\.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: rf"layers\.\d+\.mlp\.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    "fc": r"fc",
    "markov_w1": r"markov_head\.markov_w1",
    "markov_w2": r"markov_head\.markov_w2",
    "head_gate": r"markov_head\.gate_proj",
    "joint_proj": r"markov_head\.joint_proj",
    "confidence_proj": r"confidence_head\.proj",
}
TARGET_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "head": ("markov_w1", "markov_w2", "head_gate", "joint_proj"),
    "confidence": ("confidence_proj",),
}
"""Names for several modules at once; a member that a drafter's kind of head does not have is left out."""

DEFAULT_TARGETS = ("attention", "mlp", "fc", "head", "confidence")


def plain_drafter(drafter: Any) -> Any:
    """The drafter itself, out of a PEFT wrapper or as it is; a budget set on the wrapper becomes the drafter's.

    Raises:
        UnsupportedOptionError: for prompt learning, which works in the wrapper's forward, and for what holds no drafter.
    """
    if _is_drafter(drafter):
        return drafter
    configs = getattr(drafter, "peft_config", None) or {}
    learned = [name for name, config in configs.items() if getattr(config, "is_prompt_learning", False)]
    if learned:
        raise UnsupportedOptionError(
            f"Adapter {learned[0]!r} is of type {configs[learned[0]].peft_type.value}: it adds virtual tokens in its wrapper's "
            "forward, which drafting does not call. Use an adapter inside the layers, such as LoRA (hf_dspark.adapters.add_lora)."
        )
    inner: Any = getattr(getattr(drafter, "base_model", None), "model", None)
    if not _is_drafter(inner):
        raise UnsupportedOptionError(f"A DSparkDrafter, or a PEFT wrapper of one, is needed; got {type(drafter).__name__}.")
    if "budget" in vars(drafter):
        inner.budget = vars(drafter).pop("budget")
    return inner


def _is_drafter(model: Any) -> bool:
    return hasattr(type(model), "is_dspark_drafter")  # of the type: PEFT's wrappers forward attributes of instances


def refuse_wrapper(drafter: Any, method: str) -> None:
    """Refuse everything but a drafter itself, naming the wrapper's own method."""
    if not _is_drafter(drafter):
        raise ValueError(f"This function takes a DSparkDrafter; got {type(drafter).__name__}. Call the wrapper's own {method} instead.")


def adapter_names(drafter: Any) -> list[str]:
    """Names of the adapters that a drafter holds, in the order in which they came; empty for a plain drafter."""
    return list(getattr(plain_drafter(drafter), "peft_config", None) or {})


def active_adapters(drafter: Any) -> tuple[str, ...]:
    """Names of the adapters that draft as things stand; empty for a plain drafter and while adapters are disabled."""
    layers, _ = _peft_modules(plain_drafter(drafter))
    if not layers or all(layer.disable_adapters for layer in layers):
        return ()
    return tuple(layers[0].active_adapters)


def _peft_modules(drafter: nn.Module) -> tuple[list[Any], list[Any]]:
    """PEFT's layers that hold adapters of single modules, and its copies of whole modules (`modules_to_save`)."""
    if "peft" not in sys.modules:
        return [], []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = list(drafter.modules())
    return [m for m in modules if isinstance(m, BaseTunerLayer)], [m for m in modules if isinstance(m, AuxiliaryTrainingWrapper)]


def check_not_merged(drafter: nn.Module) -> None:
    """Refuse, with a RuntimeError, a drafter whose adapters are merged in place, with the adapter still there."""
    if any(layer.merged for layer in _peft_modules(drafter)[0]):
        raise RuntimeError(
            "This drafter's base weights hold a merged adapter, which is still loaded too; they must be apart for this. Call "
            "unmerge_adapter() on the PEFT wrapper, or merge for good with hf_dspark.adapters.merge_adapter(drafter)."
        )


def check_adapter_name(drafter: nn.Module, name: str) -> None:
    """Refuse, with a ValueError, a name that cannot be an adapter's, or is one's already."""
    loaded = adapter_names(drafter)
    wrong = ""
    if not name.replace("-", "_").isidentifier() or name.startswith("lora"):
        wrong = "it is part of tensors' names"
    elif name in (BASE, "__base__"):
        wrong = "it means the drafter without adapters"
    elif name in loaded:
        wrong = f"it is loaded already (loaded: {', '.join(loaded)})"
    elif any(name in module.split(".") for module, _ in drafter.named_modules()):
        wrong = "a module of the drafter is called so"
    if wrong:
        raise ValueError(
            f"An adapter cannot be called {name!r}: {wrong}. Allowed: letters, digits, '_' and '-', not yet in use. Choose another "
            "adapter_name."
        )


def warn_of_calibration(drafter: PreTrainedModel) -> None:
    """Warn once that the confidence temperatures are those of the drafter without the adapter."""
    if drafter.config.confidence_temperatures is not None:
        warn_once(
            logger,
            "The drafter's confidence temperatures were measured without an adapter, which changes confidences: calibrate again, with the "
            "adapter active, before using a budget that reads them.",
        )


def target_pattern(drafter: Any, targets: Sequence[str] = DEFAULT_TARGETS) -> str:
    """The regular expression of the module names that an adapter shall change, for `peft.LoraConfig(target_modules=...)`.

    Args:
        targets (`Sequence[str]`): groups (`attention`, `mlp`, `head`, `confidence`) and single names (`q_proj`, `k_proj`, `v_proj`,
            `o_proj`, `gate_proj`, `up_proj`, `down_proj`, `fc`, `markov_w1`, `markov_w2`, `head_gate`, `joint_proj`, `confidence_proj`).
    Raises:
        ValueError: for an unknown name, a single name that this drafter does not have, or when nothing is left.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    unknown = [name for name in targets if name not in TARGET_GROUPS and name not in _MODULES]
    if unknown:
        raise ValueError(f"Unknown adapter targets {unknown}; allowed: {', '.join((*TARGET_GROUPS, *_MODULES))}.")
    modules = [name.replace(".base_layer", "") for name, _ in plain_drafter(drafter).named_modules()]
    present = {name for name, pattern in _MODULES.items() if any(re.fullmatch(pattern, module) for module in modules)}
    absent = [name for name in targets if name in _MODULES and name not in present]
    wanted = [name for target in targets for name in TARGET_GROUPS.get(target, (target,))]
    found = [name for name in _MODULES if name in wanted and name in present]
    if absent or not found:
        raise ValueError(
            f"This drafter has no module for the adapter targets {absent or list(targets)}; it has {', '.join(sorted(present))}. Name "
            f"some of these, or groups: {', '.join(TARGET_GROUPS)}."
        )
    return "|".join(_MODULES[name] for name in found)


def add_lora(
    drafter: Drafter,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    dropout: float = 0.0,
    adapter_name: str = "default",
) -> Drafter:
    """Put a fresh LoRA adapter into a drafter, active and alone trainable; until it is trained, drafts are unchanged.

    Each targeted weight W becomes W + (alpha / rank) B A; the confidence head's bias stays the base's.

    Source: Hu et al., 2021 (arXiv 2106.09685), through PEFT.

    Args:
        drafter (`DSparkDrafter`): gets the adapter in place; every weight of its own is frozen.
        alpha (`float`, *optional*): scale; `2 * rank` by default.
        targets (`Sequence[str]`): see `target_pattern`.
        dropout (`float`): in [0, 1), on the adapter's inputs while training; PEFT does not apply it to an embedding.
    Returns:
        `DSparkDrafter`: the same drafter.
    Raises:
        ValueError: for a rank, scale, dropout, target or name that cannot be.
        RuntimeError: for a drafter with an adapter merged in place, and a peft that is too old for the installed transformers.
    """
    from peft import LoraConfig

    refuse_wrapper(drafter, "add_adapter")
    alpha = 2 * rank if alpha is None else alpha
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ValueError(f"Got rank={rank}, alpha={alpha}, dropout={dropout}; allowed: rank 1 or more, alpha above 0, dropout in [0, 1).")
    check_adapter_name(drafter, adapter_name)
    check_not_merged(drafter)
    inject(
        drafter, LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_pattern(drafter, targets), lora_dropout=dropout), adapter_name
    )
    warn_of_calibration(drafter)
    return drafter


def check_peft() -> None:
    """Refuse adapters where the installed transformers asks for a newer peft than is installed.

    Raises:
        RuntimeError: with both versions.
    """
    from transformers.integrations.peft import MIN_PEFT_VERSION

    have = version("peft")
    if parse(have) < parse(MIN_PEFT_VERSION):
        raise RuntimeError(
            f"Adapters on transformers {version('transformers')} need peft {MIN_PEFT_VERSION} or newer; got peft {have}. Upgrade peft, or, "
            "as long as it is not released, install 'transformers<5.24'. Everything else works as it is."
        )


def inject(drafter: PreTrainedModel, config: Any, adapter_name: str) -> None:
    """Put an adapter's layers into a drafter and make it the active one; training mode stays as it is."""
    check_peft()
    training = drafter.training
    with warnings.catch_warnings():
        # PEFT warns of every adapter after the first; several are meant here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        drafter.add_adapter(config, adapter_name)
    drafter.train(training)


_GUARD = threading.Lock()
_CALLS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def check_choice(drafter: Any, name: str | None) -> None:
    """Refuse the name of an adapter that is not loaded, and any where adapters are merged in place; `"base"` and None pass."""
    if name is None:
        return
    drafter = plain_drafter(drafter)
    loaded = adapter_names(drafter)
    if name != BASE and name not in loaded:
        raise UnsupportedOptionError(
            f"The drafter holds no adapter {name!r}; loaded: {', '.join(loaded) or 'none'}. Load it with drafter.load_adapter(folder, "
            f"adapter_name={name!r}), or say adapter={BASE!r} for none."
        )
    check_not_merged(drafter)


@contextmanager
def adapter_for_call(drafter: PreTrainedModel, name: str | None) -> Iterator[None]:
    """While open, the drafter drafts with this adapter (`"base"`: none; None: what is active); afterwards it is as it was.

    Calls with a drafter that holds adapters wait for one another across threads, so that none changes what another drafts with.
    """
    check_choice(drafter, name)
    layers, wrapped = _peft_modules(drafter)
    if not layers and not wrapped:
        yield
        return
    with _GUARD:
        lock = _CALLS.setdefault(drafter, threading.RLock())
    with lock:
        if name is None:
            yield
            return
        before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in (*layers, *wrapped)]
        trainable = [(parameter, parameter.requires_grad) for parameter in drafter.parameters()]
        try:
            for layer, active, _ in before:
                _choose(layer, active if name == BASE else [name], disabled=name == BASE)
            yield
        finally:
            for layer, active, disabled in before:
                _choose(layer, active, disabled)
            for parameter, wanted in trainable:
                parameter.requires_grad_(wanted)


def _choose(layer: Any, names: list[str], disabled: bool) -> None:
    if hasattr(layer, "modules_to_save"):
        names = [name for name in names if name in layer.modules_to_save]
    layer.set_adapter(names)
    layer.enable_adapters(not disabled)


@torch.no_grad()
def merge_adapter(drafter: Drafter, adapter_name: str | None = None) -> Drafter:
    """Bake an adapter into the weights: W + (alpha / rank) B A, in W's dtype. Other adapters and the calibration are dropped.

    What is left is a plain drafter, all of it trainable, with a fingerprint of its own: adapters of the base no longer fit it. In bfloat16
    the sum is rounded once more, which may change a draft, never the text.

    Args:
        drafter (`DSparkDrafter`): changed in place.
        adapter_name (`str`, *optional*): by default the active adapter, or all active ones.
    Returns:
        `DSparkDrafter`: the same drafter.
    Raises:
        ValueError: for a name that is not loaded, a PEFT wrapper, or an adapter with numbers that are not finite; nothing has changed.
        RuntimeError: if no adapter is active.
    """
    refuse_wrapper(drafter, "merge_and_unload")
    check_choice(drafter, adapter_name)
    loaded = adapter_names(drafter)
    chosen = active_adapters(drafter) if adapter_name is None else (adapter_name,)
    if not chosen or BASE in chosen:
        raise RuntimeError(
            f"There is no active adapter to merge; loaded: {', '.join(loaded) or 'none'}. Name one, or load one with "
            "drafter.load_adapter(folder)."
        )
    check_not_merged(drafter)
    broken = [name for name, p in drafter.named_parameters() if set(chosen) & set(name.split(".")) and not torch.isfinite(p).all()]
    if broken:
        raise ValueError(
            f"Adapter {', '.join(chosen)} is not finite, in {broken[0]}; allowed: numbers. Nothing was merged: train it again."
        )
    dropped = [name for name in loaded if name not in chosen]
    if dropped:
        logger.warning("Merging %s; the drafter loses its other adapters: %s.", ", ".join(chosen), ", ".join(dropped))
    unload(drafter, list(chosen))
    if drafter.config.confidence_temperatures is not None:
        logger.warning(
            "The confidence temperatures were those of the drafter without the adapter; they are dropped. Calibrate the merged one."
        )
        drafter.drop_calibration()
    return drafter


@torch.no_grad()
def unload(drafter: PreTrainedModel, merged: Sequence[str] = ()) -> None:
    """Take PEFT's layers out of a drafter, after adding these adapters to the weights; all of it is trainable then."""
    names = {module: name for name, module in drafter.named_modules()}
    layers, wrapped = _peft_modules(drafter)
    for module in wrapped:
        _choose(module, list(merged), disabled=False)
        own = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=list(merged))
        drafter.set_submodule(names[module], own)
    for layer in layers:
        if merged:
            layer.merge(adapter_names=list(merged))
        drafter.set_submodule(names[layer], layer.get_base_layer())
    if hasattr(drafter, "peft_config"):
        del drafter.peft_config
    drafter._hf_peft_config_loaded = False
    drafter.requires_grad_(True)
