"""Adapters as files: PEFT's two, and a third that says which drafter they were trained on.

An adapter on another base drafts without an error, with acceptance near zero. So the base is fingerprinted when an adapter is saved, and
compared when it is loaded.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_dspark.adapters.lora import (
    active_adapters,
    adapter_names,
    check_adapter_name,
    check_not_merged,
    inject,
    plain_drafter,
    refuse_wrapper,
    warn_of_calibration,
)
from hf_dspark.errors import CheckpointError, UnsupportedOptionError
from hf_dspark.hub.bundled import DRAFTER_NAME, bundled_drafter_path
from hf_dspark.hub.files import cached_path, check_shapes, hub_arguments, read_json
from hf_dspark.utils.files import follow_umask
from hf_dspark.version import __version__

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIDECAR_FILE = "dspark_adapter.json"
_PREFIX = "base_model.model."  # PEFT's, before every tensor's name
_LAYOUT = 1

# What gives the tensors their meaning. Not: block_size and temperatures, which may be chosen anew for the same weights, names, dtype.
_ESSENTIALS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("rms_norm_eps", "vocab_size", "draft_vocab_size", "num_target_layers", "target_layer_ids", "mask_token_id", "markov_rank"),
    *("markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
)

Drafter = TypeVar("Drafter", bound=PreTrainedModel)


def fingerprint(drafter: PreTrainedModel) -> str:
    """SHA-256 (64 hexadecimal digits) of a drafter's own weights, without adapters, and of the config fields that give them their meaning.

    Weights are hashed as bfloat16, so a checkpoint has one fingerprint whether it is loaded in float32 or in bfloat16. In float16 it has
    another: small weights do not survive that dtype. Changes too small for bfloat16 are not noticed.

    Raises:
        RuntimeError: if an adapter is merged in place with its layers still there.
    """
    drafter = plain_drafter(drafter)
    check_not_merged(drafter)
    config = drafter.config
    rope = config.rope_parameters or {}
    essentials = {name: getattr(config, name) for name in _ESSENTIALS}
    if not config.markov_rank and config.draft_vocab_size is None:
        essentials["vocab_size"] = 0  # no weight depends on it, and some formats do not say it
    essentials["rope"] = {name: rope.get(name) for name in ("rope_type", "rope_theta", "factor")}
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    own = type(drafter).expected_tensors(config)
    found = {name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor for name, tensor in drafter.state_dict().items()}
    for name in sorted(own):
        tensor = found[name].detach().to("cpu")
        tensor = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def check_fitted_to(calibration: Mapping[str, Any], drafter: PreTrainedModel, source: str) -> None:
    """Refuse a calibration that says that it was fitted to other weights. One that does not say passes, and so do weights in float16."""
    stated = calibration.get("drafter_fingerprint")
    if stated is None or drafter.dtype == torch.float16:
        return
    found = fingerprint(drafter)
    if stated != found:
        raise CheckpointError(
            f"The calibration of {source} was fitted to a drafter with fingerprint {str(stated)[:16]}, this one's is {found[:16]}. "
            "Temperatures of other weights say nothing: calibrate this drafter, or load the one that they belong to."
        )


def save_adapter(
    drafter: PreTrainedModel,
    folder: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write one adapter alone: `adapter_config.json` and `adapter_model.safetensors` as PEFT reads them, and `dspark_adapter.json`.

    Args:
        drafter (`DSparkDrafter` or a PEFT wrapper of one): holds the adapter.
        folder (`str` or `Path`): made where it is missing; other files in it stay.
        adapter_name (`str`, *optional*): by default the active adapter.
        state_dict (`dict[str, torch.Tensor]`, *optional*): stands in for the drafter's own, where that one is sharded.
    Raises:
        ValueError: for a name that is not loaded; RuntimeError: if no adapter is active, or several are, and none is named.
    """
    from peft import get_peft_model_state_dict

    drafter = plain_drafter(drafter)
    loaded, active = adapter_names(drafter), active_adapters(drafter)
    if adapter_name is None and len(active) != 1:
        raise RuntimeError(
            f"One adapter is saved at a time; active: {', '.join(active) or 'none'}, loaded: {', '.join(loaded) or 'none'}. Name one."
        )
    name = adapter_name or active[0]
    if name not in loaded:
        raise UnsupportedOptionError(f"The drafter holds no adapter {name!r}; loaded: {', '.join(loaded) or 'none'}. Name one of these.")
    tensors = get_peft_model_state_dict(drafter, state_dict=state_dict, adapter_name=name, save_embedding_layers=False)
    tensors = {_PREFIX + key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    config = copy.deepcopy(drafter.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path = _base_name(drafter)
    sidecar = {
        "layout": _LAYOUT,
        "base": config.base_model_name_or_path,
        "base_fingerprint": fingerprint(drafter),
        "target": drafter.config.target_name,
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "hf_dspark": __version__,
    }
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-adapter-", dir=folder) as made:  # all are whole before the first is in its place
        config.save_pretrained(made)
        save_file(tensors, Path(made, WEIGHTS_FILE), metadata={"format": "pt"})
        Path(made, SIDECAR_FILE).write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
        files = [Path(made, file) for file in (WEIGHTS_FILE, CONFIG_FILE, SIDECAR_FILE)]
        follow_umask(*files)
        for file in files:
            os.replace(file, folder / file.name)
    return folder


def _base_name(drafter: PreTrainedModel) -> str | None:
    """How another machine finds the base: a Hub id, a folder, or the bundled drafter's name."""
    name = drafter.name_or_path or None
    try:
        bundled = name is not None and Path(name).is_dir() and Path(name).samefile(bundled_drafter_path())
    except CheckpointError:
        bundled = False
    return DRAFTER_NAME if bundled else name


def load_adapter(
    drafter: Drafter,
    source: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    check_base: bool = True,
    **hub: Any,
) -> Drafter:
    """Load an adapter onto the drafter that it was trained on, and make it the active one.

    Args:
        drafter (`DSparkDrafter`): changed in place; may hold other adapters.
        source (`str` or `Path`): folder or Hub repository, written by `save_adapter` or by PEFT. What PEFT wrote has no fingerprint:
            it is loaded with a warning.
        trainable (`bool`): whether its weights get gradients; all others are frozen.
        check_base (`bool`): False loads it onto another base of the same shapes, on purpose.
        hub: `revision`, `token`, `cache_dir`, .. as in `from_pretrained`.
    Raises:
        CheckpointError: for an adapter of another base; for missing, unexpected or mis-shaped tensors, all in one list; for files that
            cannot be read. Nothing has changed.
        ValueError: for a name that is taken or cannot be.
    """
    refuse_wrapper(drafter, "load_adapter")
    from peft import PeftConfig

    check_not_merged(drafter)
    where, hub = os.fspath(source), hub_arguments(hub)
    paths = {file: cached_path(where, file, **hub) or "" for file in (CONFIG_FILE, WEIGHTS_FILE)}
    absent = " and ".join(file for file, path in paths.items() if not path)
    if absent:
        raise CheckpointError(f"{where!r} holds no {absent}; an adapter is a folder or repository as save_adapter or PEFT writes it.")
    _check_base(drafter, where, read_json(where, SIDECAR_FILE, **hub), check_base)
    try:
        config = PeftConfig.from_pretrained(str(Path(paths[CONFIG_FILE]).parent))
        tensors = load_file(paths[WEIGHTS_FILE])
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"The adapter {where!r} cannot be read ({type(error).__name__}: {error}). Download it again.") from error
    return install_adapter(drafter, config, tensors, adapter_name, trainable=trainable, source=where)


def install_adapter(
    drafter: Drafter,
    config: Any,
    tensors: dict[str, torch.Tensor],
    adapter_name: str,
    *,
    trainable: bool = False,
    source: str = "adapter_state_dict",
) -> Drafter:
    """Put an adapter (a `peft.PeftConfig` or `dict`, and tensors by PEFT's names) into a drafter, strictly, and make it the active one.

    Not through transformers' `load_adapter`, which (seen in 5.24) takes weights of the base and of other adapters for missing where the
    adapter's name is part of theirs. Where it raises, nothing has changed.
    """
    from peft import get_peft_config, set_peft_model_state_dict

    check_adapter_name(drafter, adapter_name)
    config = get_peft_config(config) if isinstance(config, dict) else copy.deepcopy(config)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    _check_tensors(drafter, source, config, tensors)
    config.inference_mode = not trainable
    inject(drafter, config, adapter_name)
    result = set_peft_model_state_dict(drafter, tensors, adapter_name)
    if result.unexpected_keys:
        drafter.delete_adapter(adapter_name)
        raise CheckpointError(f"PEFT found no place for {sorted(result.unexpected_keys)} of {source!r}; nothing was loaded. Update peft.")
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(trainable and adapter_name in name.split("."))
    warn_of_calibration(drafter)
    return drafter


def adapter_base(source: str, hub: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether a folder or repository holds an adapter, and the name of the drafter under it; None where that lies beside it."""
    config = read_json(source, CONFIG_FILE, **hub)
    if config is None or cached_path(source, "config.json", **hub) is not None:
        return config is not None, None
    base = (read_json(source, SIDECAR_FILE, **hub) or {}).get("base") or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{source!r} is an adapter that does not say where its drafter lies. Load the drafter with DSparkDrafter.from_pretrained, then "
            f"call drafter.load_adapter({source!r})."
        )
    return True, str(bundled_drafter_path()) if base == DRAFTER_NAME else str(base)


def _check_base(drafter: PreTrainedModel, where: str, sidecar: dict[str, Any] | None, check: bool) -> None:
    if sidecar is None:
        logger.warning("%s was not saved by hf_dspark: it does not tell which drafter it was trained on, so that is not checked.", where)
        return
    theirs, own = sidecar.get("base_fingerprint"), fingerprint(drafter)
    if theirs == own:
        return
    message = (
        f"The adapter {where!r} was trained on the drafter {sidecar.get('base') or '(unnamed)'} with fingerprint {theirs}; this drafter "
        f"({drafter.name_or_path or 'unnamed'}) has {own}."
    )
    if not check:
        logger.warning("%s It is loaded because of check_base=False.", message)
        return
    hint = " Fingerprints are of bfloat16 or float32 weights: load the drafter in one of these, and call drafter.half() afterwards."
    raise CheckpointError(
        f"{message} On other weights it drafts noise. Load the drafter it was trained on, or train one for this one (hf-dspark finetune)."
        + (hint if drafter.dtype == torch.float16 else "")
    )


def _check_tensors(drafter: PreTrainedModel, source: str, config: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Compare an adapter's tensors with those that its configuration needs on this drafter, without touching the drafter."""
    from peft import get_peft_model_state_dict, inject_adapter_in_model

    try:
        with torch.device("meta"):
            twin = inject_adapter_in_model(copy.deepcopy(config), type(drafter)(copy.deepcopy(drafter.config)), low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The adapter {source!r} does not fit this drafter: {error} Load the drafter it was made for.") from error
    expected = get_peft_model_state_dict(twin, save_embedding_layers=False)
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source, CONFIG_FILE)
