"""Reads drafter checkpoints as files: which format, tensors, config. Knows safetensors and JSON; knows no modules.

Nothing here unpickles. A partial or foreign checkpoint shows no error when it is decoded with, only acceptance near
zero, so everything that does not fit is refused, all of it at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_dspark.errors import CheckpointError
from hf_dspark.hub.files import _in_cache, cached_path

logger = logging.getLogger(__name__)


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

    def read_rows(self, rows_at_once: int = 4096) -> Iterable[tuple[int, torch.Tensor]]:
        """Yield `(first row, rows)` in order, so that a large matrix is never in memory whole."""
        with safe_open(self.path, framework="pt") as file:
            stored = file.get_slice(self.name)
            for first in range(0, self.shape[0], rows_at_once):
                yield first, stored[first : first + rows_at_once]


def list_tensors(name_or_path: str, variant: str | None = None, **hub_arguments: Any) -> dict[str, TensorRecord]:
    """Read the headers of a checkpoint's safetensors files, single or sharded.

    Args:
        name_or_path (`str`): folder or Hub repository.
        variant (`str`, *optional*): as in `from_pretrained`.
        hub_arguments: as in `from_pretrained`.
    Returns:
        `dict[str, TensorRecord]`: by tensor name.
    Raises:
        CheckpointError: if there are no safetensors files, a shard is missing or damaged, or the index names absent
        tensors.
    """
    single, index = (_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    path = cached_path(name_or_path, single, **hub_arguments)
    if path is not None:
        return dict(_read_header(path, name_or_path))
    index_path = cached_path(name_or_path, index, **hub_arguments)
    if index_path is None:
        pickled = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if cached_path(name_or_path, name, **hub_arguments)]
        hint = f" It has {pickled[0]}, a pickle, which is never read: convert it to safetensors." if pickled else ""
        raise CheckpointError(f"{name_or_path!r} holds neither {single} nor {index}.{hint}")
    try:
        weight_map: dict[str, str] = json.loads(Path(index_path).read_text(encoding="utf-8"))["weight_map"]
        strays = sorted({shard for shard in weight_map.values() if Path(shard).name != shard or not shard.endswith(".safetensors")})
        if strays:
            raise CheckpointError(
                f"{index} of {name_or_path!r} names files outside its own folder, or that are no safetensors: {', '.join(strays)[:200]}. "
                "Nothing was read."
            )
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} of {name_or_path!r} is not a safetensors index ({error!r}). Download it again.") from error
    found: dict[str, TensorRecord] = {}
    absent_shards = []
    for shard in sorted(set(weight_map.values())):
        shard_path = cached_path(name_or_path, shard, **hub_arguments)
        if shard_path is None:
            absent_shards.append(shard)
        else:
            found.update(_read_header(shard_path, name_or_path))
    absent = sorted(name for name in weight_map if name not in found)
    if absent:
        shards = f" Missing files: {', '.join(absent_shards)}." if absent_shards else ""
        raise CheckpointError(
            f"{name_or_path!r} is incomplete: its index names {len(absent)} tensors that its files do not "
            f"hold.{shards}\n" + "\n".join(f"  missing: {name}" for name in absent)
        )
    return found


def tensors_of(path: Path) -> dict[str, TensorRecord]:
    """The tensors of one file.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    return dict(_read_header(str(path), str(path.parent)))


def tensor_shapes(name_or_path: str, **hub_arguments: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and safetensors dtype of every tensor; from the Hub only the headers of the files are fetched.

    Raises:
        CheckpointError: if there are no safetensors files, or one is damaged.
    """
    here = isinstance(_in_cache(name_or_path, SAFE_WEIGHTS_NAME, hub_arguments), str)
    if Path(name_or_path).is_dir() or here or is_offline_mode():
        return {name: (record.shape, record.dtype) for name, record in list_tensors(name_or_path, **hub_arguments).items()}
    api, revision, folder = HfApi(token=hub_arguments.get("token")), hub_arguments.get("revision"), hub_arguments.get("subfolder")
    if folder:
        file = f"{folder}/{SAFE_WEIGHTS_NAME}"
        if not api.file_exists(name_or_path, file, revision=revision):
            return {name: (record.shape, record.dtype) for name, record in list_tensors(name_or_path, **hub_arguments).items()}
        try:
            tensors = api.parse_safetensors_file_metadata(name_or_path, file, revision=revision).tensors
        except SafetensorsParsingError as error:
            raise CheckpointError(f"{file} of {name_or_path!r} is no readable safetensors file ({error}).") from error
        return {name: (tuple(info.shape), str(info.dtype)) for name, info in tensors.items()}
    try:
        metadata = api.get_safetensors_metadata(name_or_path, revision=revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(f"{name_or_path!r} holds no readable safetensors files ({error}).") from error
    found = {}
    for one in metadata.files_metadata.values():
        found.update({name: (tuple(info.shape), str(info.dtype)) for name, info in one.tensors.items()})
    return found


def check_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, TensorRecord], source: str) -> None:
    """Refuse a checkpoint whose tensors are not exactly the expected ones.

    Args:
        expected (`Mapping[str, torch.Tensor]`): by name; only shape and kind of dtype count, so meta tensors will do.
        found (`Mapping[str, TensorRecord]`): by name.
        source (`str`): path or repository, for the message.
    Raises:
        CheckpointError: one error that lists every missing, unexpected, mis-shaped and mis-typed tensor.
    """
    missing = [f"  missing: {name} {tuple(expected[name].shape)}" for name in expected if name not in found]
    unexpected = [f"  unexpected: {name} {found[name].shape}" for name in found if name not in expected]
    shaped, typed = [], []
    for name in (name for name in expected if name in found):
        want, got = expected[name], found[name]
        if tuple(want.shape) != got.shape:
            shaped.append(f"  mis-shaped: {name} is {got.shape}, expected {tuple(want.shape)}")
        if got.dtype not in (_FLOATING if want.is_floating_point() else _INTEGER):
            typed.append(f"  mis-typed: {name} is {got.dtype}, expected " + ("floating point" if want.is_floating_point() else "integers"))
    if missing or unexpected or shaped or typed:
        raise CheckpointError(
            f"The tensors of {source!r} do not fit its config: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(shaped)} mis-shaped, {len(typed)} mis-typed. Nothing was loaded.\n"
            + "\n".join((*missing, *unexpected, *shaped, *typed))
            + "\nDownload it again, or check that config.json belongs to these weights."
        )


def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse weights that hold NaN or infinity: drafts from them would be noise, and nobody would be told.

    Raises:
        CheckpointError: listing every such tensor.
    """
    wrong = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(tensor.float().sum().isfinite())
    ]
    if wrong:
        raise CheckpointError(f"Weights of {source!r} are not finite: {', '.join(wrong)}. Download it again, or train it anew.")


def same_weights(stored: TensorRecord, weight: torch.Tensor) -> bool:
    """Compare a stored matrix with one in memory, within one rounding step of the coarser of the two dtypes.

    Args:
        stored (`TensorRecord`): the stored matrix.
        weight (`torch.Tensor` of shape `(rows, columns)`): the one in memory, any floating dtype and device.
    Returns:
        `bool`.
    """
    if stored.shape != tuple(weight.shape):
        return False
    for first, rows in stored.read_rows():
        own = weight[first : first + rows.shape[0]].detach().to("cpu")
        if own.dtype == rows.dtype:
            if not torch.equal(own, rows):
                return False
            continue
        step = max(torch.finfo(own.dtype).eps, torch.finfo(rows.dtype).eps)
        if not torch.allclose(own.float(), rows.float(), rtol=step, atol=1e-6):
            return False
    return True


def _with_variant(filename: str, variant: str | None) -> str:
    stem, _, rest = filename.partition(".")
    return f"{stem}.{rest}" if variant is None else f"{stem}.{rest.replace('safetensors', f'{variant}.safetensors', 1)}"


def _read_header(path: str, source: str) -> list[tuple[str, TensorRecord]]:
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = list(file.keys())
            slices = [file.get_slice(name) for name in names]
            return [
                (name, TensorRecord(path, name, tuple(part.get_shape()), part.get_dtype()))
                for name, part in zip(names, slices, strict=True)
            ]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{Path(path).name} of {source!r} is damaged ({error}). Download it again.") from error
