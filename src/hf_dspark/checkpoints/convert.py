"""Converts a checkpoint from any readable format to one that can be written. Knows files and the drafter; knows no decoding."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from hf_dspark.adapters.lora import adapter_names
from hf_dspark.calibration.records import save_calibration
from hf_dspark.checkpoints.formats.writing import WRITTEN, fresh_folder, to_deepspec, to_speculators
from hf_dspark.errors import CheckpointError
from hf_dspark.models.loading import load_drafter, load_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def convert(
    source: str,
    destination: str | Path,
    to: str = "hf-dspark",
    *,
    target: PreTrainedModel | str | None = None,
    revision: str | None = None,
) -> Path:
    """Write a drafter in another format, with its calibration; its weights stay bit for bit what they are.

    Args:
        source (`str`): embedded name, folder or Hub id, in any readable format.
        destination (`str` or `Path`): a new or empty folder.
        to (`str`): `"hf-dspark"`, `"deepspec"` or `"speculators"`.
        target (`PreTrainedModel` or `str`, *optional*): whose embedding or head the format holds a copy of; also checked to fit. A name is
            loaded in the drafter's dtype.
        revision (`str`, *optional*): of the source on the Hub.
    Returns:
        `Path`: the folder.
    Raises:
        ValueError: for another format.
        CheckpointError: for a source that cannot be read, a folder that is not empty, or what the format cannot hold.
    """
    if to not in WRITTEN:
        raise ValueError(f"to is {to!r}; allowed: {', '.join(WRITTEN)}.")
    folder = fresh_folder(destination)
    drafter = load_drafter(source, revision=revision)
    if adapter_names(drafter):
        raise CheckpointError(
            f"{source!r} is an adapter, not a drafter. Merge it first: hf_dspark.adapters.merge_adapter(drafter).save_pretrained(FOLDER)."
        )
    carried = dict(drafter._carried)
    if isinstance(target, str):
        target = load_target(target, dtype=drafter.dtype)[0]
    if target is not None:
        drafter.bind(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if to == "hf-dspark":
            drafter.save_pretrained(waiting)
        else:
            if drafter.config.copy_weights is not None:
                logger.warning(
                    "%r drafts copies of the text too, which the format %r cannot say: it goes without them, and without the confidence "
                    "temperatures, which hold with copies only. hf-dspark calibrate --copying 0 fits temperatures without.", source, to
                )  # fmt: skip
                drafter.drop_calibration()
            config, tensors = (to_deepspec if to == "deepspec" else to_speculators)(drafter, target, carried)
            _write(waiting, config, tensors)
            save_calibration(waiting, drafter.calibration)
        if folder.is_dir():
            folder.rmdir()
        waiting.chmod(0o755)
        waiting.replace(folder)
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    return folder


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
