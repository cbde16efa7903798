"""Turns names into models: embedded name, folder on the disk or Hub repository. Knows files and the Hub, not what the
models are used for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_dspark.embedded import DRAFTER_NAME, TARGET_NAME, embedded_drafter_path, embedded_target_path
from hf_dspark.errors import CheckpointError
from hf_dspark.machine import device_name, has_bf16
from hf_dspark.notices import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_dspark.modeling_dspark import DSparkDrafter

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


def resolve_target(name: str | os.PathLike[str]) -> str:
    """Returns what `from_pretrained` takes for a target's name: a folder, or a Hub id as it is.

    Args:
        name: `smollm2` for the embedded target, a folder on the disk, or a Hub id.
    Raises:
        CheckpointError: if the name is neither an embedded name, an existing folder nor a well-formed Hub id; or if the
            embedded target cannot be provided.
    """
    return str(embedded_target_path()) if name == TARGET_NAME else _folder_or_repo(name, "target", DRAFTER_NAME)


def resolve_drafter(name: str | os.PathLike[str]) -> str:
    """Returns what `from_pretrained` takes for a drafter's name: a folder, or a Hub id as it is.

    Args:
        name: `smollm2-dspark` for the embedded drafter, a folder on the disk, or a Hub id.
    Raises:
        CheckpointError: if the name is neither an embedded name, an existing folder nor a well-formed Hub id; or if the
            embedded drafter is missing.
    """
    return str(embedded_drafter_path()) if name == DRAFTER_NAME else _folder_or_repo(name, "drafter", TARGET_NAME)


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
    from hf_dspark.modeling_dspark import DSparkDrafter

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


def _folder_or_repo(name: str | os.PathLike[str], role: str, other_role_name: str) -> str:
    text = os.fspath(name)
    if text == other_role_name:
        raise CheckpointError(f"{text!r} cannot be the {role}: the embedded target is {TARGET_NAME!r}, its drafter {DRAFTER_NAME!r}")
    folder = Path(text).expanduser()
    if folder.is_dir():
        known = ("config.json", "adapter_config.json") if role == "drafter" else ("config.json",)
        if not any((folder / one).is_file() for one in known):
            raise CheckpointError(f"the {role} folder {folder} holds no config.json; name the folder that save_pretrained wrote")
        return str(folder)
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise CheckpointError(
            f"no {role} {text!r}: not an embedded name ({TARGET_NAME}, {DRAFTER_NAME}), not a folder on this disk, "
            "and not a Hub id of the form owner/name"
        ) from error
    return text


def _unreadable(role: str, name: str | os.PathLike[str], revision: str | None, error: OSError) -> CheckpointError:
    where = f"{os.fspath(name)!r}" + (f" at revision {revision!r}" if revision is not None else "")
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return CheckpointError(
        f"cannot load the {role} {where}: {reason} (check the spelling, the network, and for a private or gated repository `hf auth login`)"
    )
