"""Tensors of checkpoints as files: their headers, all checked before any tensor is read, and their values.

Nothing here unpickles. A partial or foreign checkpoint drafts without an error, with acceptance near zero, so everything that does not fit
is refused, all of it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_dspark.errors import CheckpointError
from hf_dspark.hub.files import cached_path, check_shapes, in_cache, read_json

EMBEDDING_KEY = "embed_tokens.weight"
LM_HEAD_KEY = "lm_head.weight"
_FLOATING = {"F64", "F32", "F16", "BF16"}
_INTEGER = {"I64", "I32", "I16", "I8", "U8"}


@dataclass(frozen=True)
class TensorRecord:
    """Where one stored tensor lies, and its shape and safetensors dtype name; reading happens later."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorRecord:
        """Record of a tensor that is in memory already: only its shape and kind of dtype matter to `check_tensors`."""
        return cls("", name, tuple(tensor.shape), "F32" if tensor.is_floating_point() else "I64")

    def read(self) -> torch.Tensor:
        """Read the whole tensor to the CPU, bit for bit."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def list_tensors(source: str, variant: str | None = None, *, headers_only: bool = False, **hub: Any) -> dict[str, TensorRecord]:
    """Read the headers of a checkpoint's safetensors files, single or sharded; what it returns is by tensor name.

    With `headers_only` no more than the headers is fetched from the Hub, and the records cannot be read.

    Raises:
        CheckpointError: if there are no safetensors files, a shard is missing or damaged, or the index names absent tensors.
    """
    single, index = (_add_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    found = tensors_of(source, single, headers_only, **hub)
    if found is not None:
        return found
    listed = read_json(source, index, **hub)
    if listed is None:
        pickled = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if cached_path(source, name, **hub)]
        hint = f" It has {pickled[0]}, a pickle, which is never read: convert it to safetensors." if pickled else ""
        raise CheckpointError(f"{source!r} holds neither {single} nor {index}.{hint}")
    weight_map = listed.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} of {source!r} is not a safetensors index. Download it again.")
    strays = sorted({shard for shard in weight_map.values() if Path(shard).name != shard or not shard.endswith(".safetensors")})
    if strays:
        raise CheckpointError(
            f"{index} of {source!r} names files outside its own folder, or that are no safetensors: {', '.join(strays)[:200]}. "
            "Nothing was read."
        )
    shards = {shard: tensors_of(source, shard, headers_only, **hub) for shard in sorted(set(weight_map.values()))}
    found = {name: record for tensors in shards.values() for name, record in (tensors or {}).items()}
    absent = sorted(name for name in weight_map if name not in found)
    if absent:
        missing = [shard for shard, tensors in shards.items() if tensors is None]
        hint = f" Missing files: {', '.join(missing)}." if missing else ""
        raise CheckpointError(
            f"{source!r} is incomplete: its index names {len(absent)} tensors that its files do not hold.{hint}\n"
            + "\n".join(f"  missing: {name}" for name in absent)
        )
    return found


def tensors_of(source: str, file: str, headers_only: bool = False, **hub: Any) -> dict[str, TensorRecord] | None:
    """The tensors of one file; None where the checkpoint has no such file."""
    if headers_only and not (Path(source).is_dir() or isinstance(in_cache(source, file, **hub), str) or is_offline_mode()):
        within = f"{hub['subfolder']}/{file}" if hub.get("subfolder") else file
        try:
            remote = HfApi(token=hub.get("token")).parse_safetensors_file_metadata(source, within, revision=hub.get("revision")).tensors
        except EntryNotFoundError:
            return None
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{file} of {source!r} is no readable safetensors file ({error}).") from error
        return {name: TensorRecord("", name, tuple(info.shape), str(info.dtype)) for name, info in remote.items()}
    path = cached_path(source, file, **hub)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return {name: TensorRecord(path, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} of {source!r} is damaged ({error}). Download it again.") from error


def check_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, TensorRecord], source: str) -> None:
    """Refuse a checkpoint whose tensors are not exactly the expected ones (meta tensors will do), listing all that is wrong."""
    mistyped = [
        f"{name} is {found[name].dtype}, expected {'floating point' if want.is_floating_point() else 'integers'}"
        for name, want in expected.items()
        if name in found and found[name].dtype not in (_FLOATING if want.is_floating_point() else _INTEGER)
    ]
    check_shapes(expected, {name: record.shape for name, record in found.items()}, source, mistyped=mistyped)


def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse weights that hold NaN or infinity, listing every such tensor: they would draft noise without an error."""
    wrong = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(tensor.float().sum().isfinite())
    ]
    if wrong:
        raise CheckpointError(f"Weights of {source!r} are not finite: {', '.join(wrong)}. Download it again, or train it anew.")


def same_weights(stored: TensorRecord, weight: torch.Tensor) -> bool:
    """Compare a stored matrix with one in memory, within one rounding step of the coarser dtype, some rows at once."""
    if stored.shape != tuple(weight.shape):
        return False
    with safe_open(stored.path, framework="pt") as file:
        matrix = file.get_slice(stored.name)
        for first in range(0, stored.shape[0], 4096):
            rows, own = matrix[first : first + 4096], weight[first : first + 4096].detach().to("cpu")
            if own.dtype == rows.dtype:
                same = torch.equal(own, rows)
            else:
                step = max(torch.finfo(own.dtype).eps, torch.finfo(rows.dtype).eps)
                same = torch.allclose(own.float(), rows.float(), rtol=step, atol=1e-6)
            if not same:
                return False
    return True
