"""One file of a checkpoint: from a folder, the Hub's cache or the Hub, checked against the Hub's SHA-256."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import _CACHED_NO_EXIST, HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from hf_dspark.errors import CheckpointError
from hf_dspark.utils.hashing import file_sha256

# What a broken connection raises: the HTTP library behind huggingface_hub has had several names.
TransportError = cast(type[Exception], HfHubHTTPError.__bases__[0])


# Arguments of from_pretrained that say where files are, and nothing about the model.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


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
