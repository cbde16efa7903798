"""Turns names into models: embedded name, folder on the disk or Hub repository. Knows files and the Hub, not what the
models are used for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_dspark.errors import CheckpointError
from hf_dspark.hub.names import resolve_drafter, resolve_target
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.utils.hardware import device_name, has_bf16
from hf_dspark.utils.logging import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

FAST = "fast"
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """Returns the torch dtype of a name such as `bf16`; `"auto"` (the checkpoint's own) and `"fast"` (that, unless the device does not
    compute in it) stay strings.

    Raises:
        ValueError: for a name that is none of these.
    """
    if isinstance(name, torch.dtype) or name in ("auto", FAST):
        return name
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; allowed: auto, {FAST}, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_target(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    **model_options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a target and its tokenizer, ready to generate.

    Args:
        name: embedded name, folder or Hub id (`resolve_target`).
        dtype: a torch dtype, a name such as `bf16`, or `auto` for the checkpoint's own, or `fast` for that, but float32 where it is
            bfloat16 and the device does not compute in it (logged once).
        device: where the model goes; default: where `from_pretrained` leaves it (give `device_map` in `model_options`
            to spread it).
        revision: branch, tag or commit on the Hub.
        model_options: passed to `AutoModelForCausalLM.from_pretrained`.
    Returns:
        the model in evaluation mode and its tokenizer, which pads on the left and has a pad token (the end-of-text token where it brought
        none).
    Raises:
        CheckpointError: if there is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch_dtype = parse_dtype(dtype)
    source = resolve_target(name)
    place = _place(device, model_options)
    hub_options = {"revision": revision} if revision is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=_stored_dtype(torch_dtype), **hub_options, **model_options)
    except OSError as error:
        raise _unreadable("target", name, revision, error) from error
    tokenizer.padding_side = "left"  # A batch is continued at its right end.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = _affordable(model, torch_dtype, place)
    if device is not None:
        model = model.to(device)
    return model.eval(), tokenizer


def load_drafter(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    **model_options: Any,
) -> DSparkDrafter:
    """Loads a drafter, of this project's own format or a foreign one that `DSparkDrafter.from_pretrained` recognises.

    Args:
        name: embedded name, folder or Hub id (`resolve_drafter`).
        dtype: a torch dtype, a name such as `bf16`, or `auto` for the checkpoint's own, or `fast` for that, but float32 where it is
            bfloat16 and the device does not compute in it (logged once).
        device: where the drafter goes; default: where `from_pretrained` leaves it.
        revision: branch, tag or commit on the Hub.
        model_options: passed to `DSparkDrafter.from_pretrained`.
    Returns:
        the drafter in evaluation mode, not yet bound to a target (`generate` binds it).
    Raises:
        CheckpointError: if there is no such checkpoint, or it is partial, foreign or malformed.
    """
    torch_dtype = parse_dtype(dtype)
    source = resolve_drafter(name)
    place = _place(device, model_options)
    hub_options = {"revision": revision} if revision is not None else {}
    try:
        drafter = DSparkDrafter.from_pretrained(source, dtype=_stored_dtype(torch_dtype), **hub_options, **model_options)
    except OSError as error:
        raise _unreadable("drafter", name, revision, error) from error
    drafter = _affordable(drafter, torch_dtype, place)
    if device is not None:
        drafter = drafter.to(device)
    return drafter.eval()


def _stored_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """What `from_pretrained` takes for a dtype of ours."""
    return "auto" if dtype == FAST else dtype


def _place(device: str | torch.device | None, model_options: Mapping[str, Any]) -> torch.device | None:
    """Where a model will be used; None where that is open."""
    if "device_map" in model_options or (device is None and torch.cuda.is_available()):
        return None
    return torch.device(device or "cpu")


def _affordable(model: Any, dtype: torch.dtype | str, device: torch.device | None) -> Any:
    """A model as it is, or in float32 where its own dtype was to be taken, that is bfloat16, and the device does not compute in it."""
    if dtype != FAST or device is None or model.dtype != torch.bfloat16 or getattr(model, "is_quantized", False) or has_bf16(device):
        return model
    warn_once(
        logger,
        f"{device_name(device)} does not compute in bfloat16, the dtype of this checkpoint, so it is loaded in float32, which is several "
        "times faster here. Give dtype=torch.bfloat16 (--dtype bf16) to have it in bfloat16 all the same.",
    )
    return model.float()


def _unreadable(role: str, name: str | os.PathLike[str], revision: str | None, error: OSError) -> CheckpointError:
    where = f"{os.fspath(name)!r}" + (f" at revision {revision!r}" if revision is not None else "")
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return CheckpointError(
        f"cannot load the {role} {where}: {reason} (check the spelling, the network, and for a private or gated repository `hf auth login`)"
    )
