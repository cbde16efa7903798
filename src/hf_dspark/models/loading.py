"""Turns names into models: a bundled name, a folder or a Hub repository."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hf_dspark.errors import CheckpointError
from hf_dspark.hub.names import resolve_drafter, resolve_target
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.utils.hardware import bf16_gain, device_name, has_bf16
from hf_dspark.utils.logging import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FAST = "fast"
DTYPES = {
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """Returns the torch dtype of a name such as `bf16`; `"auto"` (the checkpoint's own) and `"fast"` (that, unless the device is slower
    in it) stay strings.

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
    """Load a target, in evaluation mode, and its tokenizer, which pads on the left and has a pad token.

    Args:
        name (`str` or `Path`): bundled name, folder or Hub id.
        dtype (`str` or `torch.dtype`): a torch dtype, a name such as `bf16`, `auto` for the checkpoint's own, or `fast` for that, but
            float32 where it is bfloat16 and the device is slower in it (logged once).
        device (*optional*): where the model goes; where `from_pretrained` leaves it by default (`device_map` spreads it).
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        model_options: passed to `AutoModelForCausalLM.from_pretrained`.
    Raises:
        CheckpointError: if there is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_target(name)
    model = _load(AutoModelForCausalLM, "target", name, source, dtype, device, revision, model_options)
    with _clear_errors("target", name, revision):
        tokenizer = AutoTokenizer.from_pretrained(source, **({} if revision is None else {"revision": revision}))
    tokenizer.padding_side = "left"  # A batch is continued at its right end.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_drafter(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    **model_options: Any,
) -> DSparkDrafter:
    """Load a drafter, in any format that `DSparkDrafter.from_pretrained` reads, in evaluation mode and not yet bound to a target.

    Args:
        name, dtype, device, revision: as in `load_target`.
        model_options: passed to `DSparkDrafter.from_pretrained`.
    Raises:
        CheckpointError: if there is no such checkpoint, or it is partial, foreign or malformed.
    """
    return _load(DSparkDrafter, "drafter", name, resolve_drafter(name), dtype, device, revision, model_options)


def _load(
    model_class: Any,
    role: str,
    name: str | os.PathLike[str],
    source: str,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    revision: str | None,
    options: dict[str, Any],
) -> Any:
    """A model in the chosen dtype, on its device, in evaluation mode."""
    chosen = parse_dtype(dtype)
    where = {} if revision is None else {"revision": revision}
    with _clear_errors(role, name, revision):
        model = model_class.from_pretrained(source, dtype="auto" if chosen == FAST else chosen, **where, **options)
    known = "device_map" not in options and (device is not None or not torch.cuda.is_available())
    if chosen == FAST and known and model.dtype == torch.bfloat16 and not getattr(model, "is_quantized", False):
        place = torch.device(device or "cpu")
        if not has_bf16(place):
            warn_once(
                logger,
                f"{device_name(place)} computes faster in float32 than in bfloat16, the dtype of this checkpoint{_measured(place)}, so it "
                "is loaded in float32. Give dtype=torch.bfloat16 (--dtype bf16) to have it in bfloat16 all the same.",
            )
            model = model.float()
    return (model if device is None else model.to(device)).eval()


def _measured(place: torch.device) -> str:
    if place.type != "cpu":
        return ""
    return f" ({bf16_gain(8):.1f} times as fast in bfloat16 as in float32 at 8 tokens, {bf16_gain(32):.1f} at 32)"


@contextmanager
def _clear_errors(role: str, name: str | os.PathLike[str], revision: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{os.fspath(name)!r}" + (f" at revision {revision!r}" if revision is not None else "")
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"cannot load the {role} {where}: {reason} (check the spelling, the network, and for a private or gated repository "
            "`hf auth login`)"
        ) from error
