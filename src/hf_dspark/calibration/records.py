"""`calibration.json`: temperatures with what they were fitted on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dspark.calibration.temperature_scaling import FORMAT
from hf_dspark.configuration_dspark import check_ngram_copying, check_temperatures
from hf_dspark.errors import CheckpointError
from hf_dspark.hub.files import cached_path
from hf_dspark.utils.files import atomic_write_json

FILE_NAME = "calibration.json"


def check_calibration(record: Any, block_size: int | None, source: str) -> dict[str, Any]:
    """A calibration record for blocks of `block_size` tokens (any where None), checked; `source` is where it comes from, for the message.

    SGLang's `{temperatures, dataset, ..}` and TensorRT-LLM's `sts_temperatures`, which name no format, become records of this package.

    Raises:
        CheckpointError: for anything else.
    """
    if isinstance(record, Mapping) and "format" not in record:
        record = {"format": FORMAT, **{"temperatures" if key == "sts_temperatures" else key: value for key, value in record.items()}}
    if not isinstance(record, Mapping) or record.get("format") != FORMAT or not isinstance(record.get("temperatures"), list):
        raise CheckpointError(
            f"The calibration of {source!r} is not one that this version reads (format {FORMAT}, with a list `temperatures`). "
            "Calibrate again."
        )
    temperatures = record["temperatures"]
    if not all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in temperatures):
        raise CheckpointError(f"The calibration of {source!r} holds temperatures that are not numbers: {temperatures}. Calibrate again.")
    try:
        check_temperatures(temperatures, len(temperatures) if block_size is None else block_size)
        copying_of(record)
    except ValueError as error:
        raise CheckpointError(f"The calibration of {source!r} does not fit this drafter: {error}") from error
    return dict(record)


def copying_of(record: Mapping[str, Any]) -> tuple[Any, Any]:
    """`copy_weights` and `copy_confidence` that a record's temperatures hold with, as floats; None and None without n-gram copying.

    Raises:
        ValueError: for a `copying` that is something else.
    """
    copying = record.get("copying")
    if copying is None:
        return None, None
    if not isinstance(copying, Mapping):
        raise ValueError(f"`copying` must be an object with `weights` and `confidence`; got {copying!r}")
    weights, table = copying.get("weights"), copying.get("confidence")
    check_ngram_copying(weights, table)
    weights = None if weights is None else [float(weight) for weight in weights]
    return weights, None if table is None else [[float(number) for number in row] for row in table]


def note_calibration(config: dict[str, Any], record: Mapping[str, Any], foreign: bool) -> None:
    """Write a checked record's numbers into the `config.json` beside it.

    Other formats (`foreign`) have no key for n-gram copying, and temperatures that hold only with it must not be read there: both stay in
    the record.
    """
    weights, table = copying_of(record)
    config["confidence_temperatures"] = [float(t) for t in record["temperatures"]]
    if not foreign:
        config["copy_weights"], config["copy_confidence"] = weights, table
    elif weights is not None:
        del config["confidence_temperatures"]


def for_sglang(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that SGLang's reader looks for beside `temperatures`, from a record of this package."""
    return {
        "dataset": ", ".join(one["file"] for one in record["data"]),
        "num_samples": sum(one["rounds_fitted"] for one in record["data"]),
        "ece_before": [one["ece"] for one in record["before"]["positions"]],
        "ece_after": [one["ece"] for one in record["after"]["positions"]],
    }


def read_calibration(source: str, **hub_arguments: Any) -> dict[str, Any] | None:
    """The calibration in a folder or Hub repository, None where there is none; `hub_arguments` as in `from_pretrained`.

    Raises:
        CheckpointError: for a file that cannot be used.
    """
    path = cached_path(source, FILE_NAME, **hub_arguments)
    if path is None:
        return None
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{FILE_NAME} of {source!r} cannot be read ({error}). Remove the file, and calibrate again with --replace."
        ) from error
    return check_calibration(record, None, source)


def find_calibration(source: str, **hub_arguments: Any) -> dict[str, Any]:
    """`read_calibration`; raises a CheckpointError where there is none, too."""
    record = read_calibration(source, **hub_arguments)
    if record is None:
        raise CheckpointError(f"{source!r} holds no {FILE_NAME}. Name a folder or repository that one was written to.")
    return record


def write_calibration(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write `calibration.json` into a folder, whole or not at all."""
    path = Path(folder) / FILE_NAME
    atomic_write_json(path, dict(record), allow_nan=False)
    return path


def save_calibration(folder: str | Path, record: Mapping[str, Any] | None) -> None:
    """Write a drafter's calibration, or, where it has none, remove the one that earlier weights left in the folder."""
    if record is not None:
        write_calibration(folder, record)
    else:
        (Path(folder) / FILE_NAME).unlink(missing_ok=True)
