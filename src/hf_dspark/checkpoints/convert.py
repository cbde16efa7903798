"""Writes a drafter in another project's format."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_dspark.adapters.lora import adapter_names
from hf_dspark.calibration.records import save_calibration
from hf_dspark.checkpoints.formats import WRITTEN
from hf_dspark.errors import CheckpointError
from hf_dspark.utils.files import atomic_folder

logger = logging.getLogger(__name__)

FORMATS = ("hf-dspark", *WRITTEN)


def convert(drafter: PreTrainedModel, destination: str | Path, to: str = "hf-dspark", *, target: PreTrainedModel | None = None) -> Path:
    """Write a drafter in another format, with its calibration; its weights stay bit for bit what they are.

    Args:
        drafter (`DSparkDrafter`): in the dtype of its files; not yet bound.
        destination (`str` or `Path`): a new or empty folder.
        to (`str`): `"hf-dspark"`, `"deepspec"` or `"speculators"`.
        target (`PreTrainedModel`, *optional*): whose embedding or head the format holds a copy of; the drafter is bound to it.
    Raises:
        ValueError: for another format.
        CheckpointError: for an adapter, a folder that is not empty, or what the format cannot hold.
    """
    if to not in FORMATS:
        raise ValueError(f"to is {to!r}; allowed: {', '.join(FORMATS)}.")
    folder = Path(destination).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty. Name a new folder.")
    source = drafter.name_or_path
    if adapter_names(drafter):
        raise CheckpointError(
            f"{source!r} has an adapter. Merge it first: hf_dspark.adapters.merge_adapter(drafter).save_pretrained(FOLDER)."
        )
    carried = dict(drafter._carried)
    if target is not None:
        drafter.bind(target)
    with atomic_folder(folder) as waiting:
        if to == "hf-dspark":
            drafter.save_pretrained(waiting)
            return folder
        if drafter.config.copy_weights is not None:
            logger.warning(
                "%r drafts n-gram copies too, which the format %r cannot say: it goes without them, and without its temperatures, "
                "which hold with copies only. hf-dspark calibrate --copying 0 fits temperatures without.", source, to
            )  # fmt: skip
            drafter.drop_calibration()
        config, tensors = WRITTEN[to](drafter, target, carried)
        (waiting / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, waiting / "model.safetensors", metadata={"format": "pt"})
        save_calibration(waiting, drafter.calibration)
    return folder
