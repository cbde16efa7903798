"""Opens a stored drafter: config with the caller's overrides, and every tensor accounted for before any is read. Knows files and
DSparkConfig; knows no modules and no target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import is_offline_mode

from hf_dspark.calibration_files import check_calibration, read_calibration
from hf_dspark.configuration_dspark import DSparkConfig
from hf_dspark.conversion import (
    EMBEDDING_KEY,
    HUB_ARGUMENTS,
    LM_HEAD_KEY,
    TensorRecord,
    check_own_config,
    check_tensors,
    commit_of,
    deepspec_config,
    list_tensors,
    read_config,
    recognise_format,
)
from hf_dspark.errors import CheckpointError


@dataclasses.dataclass
class StoredDrafter:
    """A checkpoint that was found complete: its format, its config, where its tensors lie.

    `carried` are a DeepSpec file's copies of the target's embedding and head, which are no tensors of the drafter.
    """

    kind: Literal["dspark", "deepspec"]
    config: DSparkConfig
    tensors: dict[str, TensorRecord]
    carried: dict[str, TensorRecord]
    calibration: dict[str, Any] | None = None


def open_drafter(
    source: str, arguments: dict[str, Any], expected_tensors: Callable[[DSparkConfig], dict[str, torch.Tensor]]
) -> StoredDrafter:
    """Read a checkpoint's config and the headers of its files, and check that they agree.

    Args:
        source (`str`): folder or Hub repository.
        arguments (`dict`): those of `from_pretrained`; `config` and fields of `DSparkConfig` are taken out of it.
        expected_tensors (`Callable`): from a config to every tensor that the drafter itself needs; meta tensors will do.
    Returns:
        `StoredDrafter`.
    Raises:
        CheckpointError: for an unknown format, or tensors that do not fit the config.
        ValueError: for a block longer than the checkpoint's.
    """
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    commit = commit_of(source, **hub)
    if commit is not None:  # all files from one commit, whatever is pushed meanwhile
        hub["revision"] = arguments["revision"] = commit
    kind, config, own_block = _config(source, arguments, hub)
    found = list_tensors(source, arguments.get("variant"), **hub)
    expected = expected_tensors(config)
    carried_keys = (EMBEDDING_KEY, LM_HEAD_KEY) if kind == "deepspec" else ()
    matrix = torch.empty(config.vocab_size, config.hidden_size, device="meta")
    check_tensors({**expected, **dict.fromkeys(carried_keys, matrix)}, found, source)
    calibration = _calibration(source, config, own_block, hub)
    return StoredDrafter(kind, config, found, {key: found.pop(key) for key in carried_keys}, calibration)


def _calibration(source: str, config: DSparkConfig, own_block: int | None, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The calibration that lies beside the checkpoint; its temperatures go into the config where that has none.

    Args:
        own_block (`int`, *optional*): the block size that the checkpoint itself states; None where the caller gave temperatures, which win.
    Raises:
        CheckpointError: if the file cannot be used, or says something else than the config.
    """
    if own_block is None:
        return None
    record = read_calibration(source, **hub)
    if record is None:
        return None
    check_calibration(record, own_block, source)
    temperatures = [float(t) for t in record["temperatures"][: config.block_size]]
    if config.confidence_temperatures is None:
        config.confidence_temperatures = temperatures
    elif list(config.confidence_temperatures) != temperatures:
        raise CheckpointError(
            f"{source!r}: calibration.json says temperatures {temperatures}, config.json {config.confidence_temperatures}; a confidence is "
            "calibrated once. Remove calibration.json, and calibrate again with --replace."
        )
    return {**record, "temperatures": temperatures}


def _config(source: str, arguments: dict[str, Any], hub: dict[str, Any]) -> tuple[Literal["dspark", "deepspec"], DSparkConfig, int | None]:
    """The format, the config, and the checkpoint's own block size; None for that where the caller brings temperatures or a config."""
    raw = read_config(source, **hub)
    if raw is None:
        where = (
            ""
            if Path(source).is_dir() or not is_offline_mode()
            else ", as far as the cache knows (the Hub is offline: HF_HUB_OFFLINE is set)"
        )
        raise CheckpointError(
            f"{source!r} holds no config.json{where}. Give the folder or repository of a drafter; adapters are loaded "
            "onto one with drafter.load_adapter(adapter)."
        )
    kind = recognise_format(raw, source)
    if kind == "dspark":
        check_own_config(raw, source)

    fields = {f.name for f in dataclasses.fields(DSparkConfig)} - {"dtype"}
    overrides = {key: arguments.pop(key) for key in list(arguments) if key in fields}
    longest = raw.get("block_size")
    if isinstance(longest, int) and overrides.get("block_size", longest) > longest:
        raise ValueError(
            f"{source!r} was trained for blocks of {longest} tokens; got block_size={overrides['block_size']}. "
            f"Acceptance collapses beyond what was trained: use 1..{longest}."
        )
    own_block = None if "confidence_temperatures" in overrides else longest
    shorter = overrides.get("block_size")
    if shorter is not None and "confidence_temperatures" not in overrides and raw.get("confidence_temperatures"):
        overrides["confidence_temperatures"] = raw["confidence_temperatures"][:shorter]  # positions do not change by what follows them
    config = arguments.pop("config", None)
    if isinstance(config, DSparkConfig):
        return kind, config, None
    if kind == "deepspec":
        return kind, deepspec_config(raw, source, **overrides), own_block
    return kind, DSparkConfig.from_pretrained(config or source, **hub, **overrides), own_block
