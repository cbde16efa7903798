"""Reads drafter checkpoints as files: which format, tensors, config. Knows safetensors and JSON; knows no modules.

Nothing here unpickles. A partial or foreign checkpoint shows no error when it is decoded with, only acceptance near
zero, so everything that does not fit is refused, all of it at once.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import _CACHED_NO_EXIST, HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from hf_dspark.digests import file_sha256
from hf_dspark.errors import CheckpointError

logger = logging.getLogger(__name__)

# What a broken connection raises: the HTTP library behind huggingface_hub has had several names.
TransportError = cast(type[Exception], HfHubHTTPError.__bases__[0])

EMBEDDING_KEY = "embed_tokens.weight"
LM_HEAD_KEY = "lm_head.weight"

# Arguments of from_pretrained that say where files are, and nothing about the model.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")

_FLOATING = {"F64", "F32", "F16", "BF16"}
_INTEGER = {"I64", "I32", "I16", "I8", "U8"}


def read_config(name_or_path: str, **hub_arguments: Any) -> dict[str, Any] | None:
    """Read `config.json` from a folder or a repository.

    Args:
        name_or_path (`str`): folder or Hub repository.
        hub_arguments: as in `from_pretrained`.
    Returns:
        `dict`, or `None` where there is no such file.
    Raises:
        CheckpointError: if the file is not a JSON object.
    """
    path = cached_path(name_or_path, "config.json", **hub_arguments)
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"config.json of {name_or_path!r} is not JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"config.json of {name_or_path!r} holds a {type(config).__name__}, not an object.")
    return config


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


def cached_path(name_or_path: str, filename: str, **hub_arguments: Any) -> str | None:
    """Path of a checkpoint's file, downloaded where it has to be; None where the checkpoint has no such file.

    Raises:
        CheckpointError: if what was just downloaded is not what the Hub says it is; it is thrown away then.
    """
    was_there = isinstance(_in_cache(name_or_path, filename, hub_arguments), str)
    try:
        path = cached_file(name_or_path, filename, **hub_arguments, _raise_exceptions_for_missing_entries=False)
    except TransportError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"{filename} of {name_or_path!r} could not be fetched ({error}). Check the network, and load it again.") from error
    if path is not None and not was_there:
        _check_download(Path(path), name_or_path)
    if path is None and not Path(name_or_path).is_dir() and not hub_arguments.get("local_files_only") and not is_offline_mode():
        _check_absent(name_or_path, filename, hub_arguments)
    return path


def _check_absent(name_or_path: str, filename: str, hub: Mapping[str, Any]) -> None:
    """A file that could not be fetched is not a file that is not there.

    Raises:
        OSError: if the Hub did not say that the file is absent.
    """
    if _in_cache(name_or_path, filename, hub) is _CACHED_NO_EXIST:
        return
    within = f"{hub['subfolder']}/{filename}" if hub.get("subfolder") else filename
    try:
        found = HfApi(token=hub.get("token")).file_exists(name_or_path, within, revision=hub.get("revision"))
    except Exception as error:
        raise OSError(
            f"{filename} of {name_or_path!r} could not be asked for ({type(error).__name__}). Check the network, and load it again."
        ) from error
    if found:
        raise OSError(f"{filename} of {name_or_path!r} is there but could not be fetched. Load it again.")


def commit_of(name_or_path: str, **hub_arguments: Any) -> str | None:
    """The commit that a revision of a repository stands for; None for a folder, and where there is no config.json."""
    if Path(name_or_path).is_dir():
        return None
    return extract_commit_hash(cached_path(name_or_path, "config.json", **hub_arguments), None)


def _in_cache(name_or_path: str, filename: str, hub: Mapping[str, Any]) -> Any:
    if Path(name_or_path).is_dir() or hub.get("force_download"):
        return None
    filename = f"{hub['subfolder']}/{filename}" if hub.get("subfolder") else filename
    try:
        return try_to_load_from_cache(name_or_path, filename, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
    except HFValidationError:
        return None


def _check_download(path: Path, source: str) -> None:
    """The Hub's cache names a large file by its SHA-256; the download itself only checks its length."""
    blob = path.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    digest = file_sha256(blob)
    if digest != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path.name} of {source!r} arrived damaged: its SHA-256 is {digest[:16]}.., the Hub's is {blob.name[:16]}... "
            "It was thrown away. Load it again."
        )


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
