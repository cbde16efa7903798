"""What a data folder says about itself: which target wrote the responses, and how. Knows JSON, hashes and a model's weights by value; knows
no rows."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from hf_dspark.errors import DataError

FORMAT = "hf-dspark responses"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_CONFIG_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
)  # fmt: skip
_SAMPLES = 4  # values of each parameter that go into the fingerprint
_SMALL = 1e-4  # float16 holds smaller values less precisely than bfloat16


def target_fingerprint(model: Any) -> str:
    """A short text that tells targets apart: architecture, vocabulary, and a few values of every weight.

    The dtype that the model is loaded in does not matter. Weights that are not in memory (offloaded ones) are not looked at; a fingerprint
    without weights ends with a dash and fits every one of the same architecture.

    Args:
        model (`PreTrainedModel`): the target.
    Returns:
        `str`: two hexadecimal digests.
    """
    config = model.config.get_text_config(decoder=True)
    fields = {name: getattr(config, name, None) for name in _CONFIG_FIELDS}
    shape = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if parameter.device.type == "meta":
            return f"{shape}-"
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        flat = parameter.detach().reshape(-1)
        last = flat.numel() - 1
        values = flat[[last * k // (_SAMPLES - 1) for k in range(_SAMPLES)]].float().cpu()
        values = torch.where(values.abs() < _SMALL, 0.0, values).to(torch.bfloat16)
        digest.update(repr((last, values.tolist())).encode())
    return f"{shape}-{digest.hexdigest()[:16]}"


def same_target(one: str, other: str) -> bool:
    """Whether two fingerprints are of one target, as far as both say."""
    return one == other or (one.split("-")[0] == other.split("-")[0] and (one.endswith("-") or other.endswith("-")))


def check_target(manifest: dict[str, Any], folder: Path, fingerprint: str | None) -> None:
    """Refuse a folder whose responses another target wrote.

    Raises:
        DataError: naming both.
    """
    theirs = manifest["target"]
    if fingerprint is not None and not same_target(theirs["fingerprint"], fingerprint):
        raise DataError(
            f"{folder}: the responses are those of the target {theirs['name']!r} (fingerprint {theirs['fingerprint']}), not of this one "
            f"(fingerprint {fingerprint}). A drafter learns from its own target's responses: generate them with `hf-dspark data`, or name "
            "the right --target."
        )


def text_digest(text: str) -> str:
    """A short digest of a text, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where it has none.

    Raises:
        DataError: if it is not whole, or of a format that this version does not know.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Restore it, or write to a new folder.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != FORMAT_VERSION:
        found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{path} is of format {found}; allowed: {(FORMAT, FORMAT_VERSION)}. Use the version of hf-dspark that wrote it.")
    missing = [name for name in ("target", "held_out") if name not in manifest]
    if missing:
        raise DataError(f"{path} lacks {missing}. Restore it, or write to a new folder.")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest, whole or not at all."""
    waiting = folder / f".{MANIFEST}.tmp"
    waiting.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(waiting, folder / MANIFEST)


def shards(folder: Path) -> list[Path]:
    """The files of rows of a folder, in order. Where a compaction was interrupted, a Parquet file stands for its JSONL file."""
    whole = sorted(folder.glob("responses-*.parquet"))
    done = {path.stem for path in whole}
    return sorted([*whole, *(path for path in folder.glob("responses-*.jsonl") if path.stem not in done)])
