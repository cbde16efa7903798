"""One file of a checkpoint, from a folder, the Hub's cache or the Hub; downloads are checked against the Hub's SHA-256."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.hub import extract_commit_hash

from hf_dspark.errors import CheckpointError, HubError
from hf_dspark.utils.hashing import file_sha256

if TYPE_CHECKING:
    import torch

# What a broken connection raises: the HTTP library behind huggingface_hub has had several names.
TransportError = cast(type[Exception], HfHubHTTPError.__bases__[0])

# Arguments of from_pretrained that say where files are, and nothing about the model.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `HUB_ARGUMENTS` that are given."""
    return {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}


def read_json(source: str, filename: str, **hub: Any) -> dict[str, Any] | None:
    """Read a JSON object from a file of a folder or repository; None where there is no such file."""
    path = cached_path(source, filename, **hub)
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{filename} of {source!r} is not JSON ({error}). Download or save it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{filename} of {source!r} holds a {type(found).__name__}, not an object. Download or save it again.")
    return found


def cached_path(source: str, filename: str, **hub: Any) -> str | None:
    """Path of a checkpoint's file, downloaded where it has to be; None where the checkpoint has no such file.

    Raises:
        CheckpointError: if what was just downloaded is not what the Hub says it is; it is deleted then.
        HubError: if the Hub refuses or cannot be reached, so that nobody knows whether there is such a file.
    """
    if Path(source).is_dir():
        path = Path(source, hub.get("subfolder") or "", filename)
        return str(path) if path.is_file() else None
    known = in_cache(source, filename, **hub)
    if known is _CACHED_NO_EXIST and re.fullmatch("[0-9a-f]{40}", hub.get("revision") or ""):
        return None
    what, otherwise = f"{filename} of {source!r} could not be fetched", "Check the network, and load it again."
    try:
        path = Path(hf_hub_download(source, filename, **hub))
    except LocalEntryNotFoundError as error:
        if known is _CACHED_NO_EXIST or hub.get("local_files_only") or is_offline_mode():
            return None
        raise hub_error(error, what, otherwise) from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError, TransportError) as error:
        raise hub_error(error, what, otherwise, hub.get("revision")) from error
    if not isinstance(known, str):
        _check_download(path, source)
    return str(path)


def hub_error(error: Exception, what: str, otherwise: str, revision: str | None = None) -> HubError:
    """What failed, why, and the next step: `otherwise`, where the Hub's answer does not say more."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        step = "The repository is gated: ask for access on its page, and log in with `hf auth login`."
    elif isinstance(error, RevisionNotFoundError):
        step = f"The repository has no revision {revision!r}: name a branch, tag or commit."
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        step = "There is no such repository, or it is private: check the name, and for a private one log in with `hf auth login`."
    elif status in (409, 412):
        step = "It has changed since this push began: push again."
    elif status in (401, 403):
        step = "Log in with `hf auth login`, or give a token that may write there."
    else:
        step = otherwise
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return HubError(f"{what}: {reason.rstrip('.')}. {step}")


def in_cache(source: str, filename: str, **hub: Any) -> Any:
    """Path of a file in the Hub's cache, `_CACHED_NO_EXIST` where the Hub has said that there is none, else None."""
    if hub.get("force_download"):
        return None
    within = f"{hub['subfolder']}/{filename}" if hub.get("subfolder") else filename
    try:
        return try_to_load_from_cache(source, within, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
    except HFValidationError:
        return None


def commit_of(source: str, **hub: Any) -> str | None:
    """The commit that a revision of a repository stands for; None for a folder, and where there is no config.json."""
    return None if Path(source).is_dir() else extract_commit_hash(cached_path(source, "config.json", **hub), None)


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
            "It was deleted. Load it again."
        )


def check_shapes(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, tuple[int, ...]],
    source: str,
    config_file: str = "config.json",
    mistyped: Sequence[str] = (),
) -> None:
    """Refuse tensors that are not exactly the expected ones, with every missing, unexpected, mis-shaped and mis-typed one in one list."""
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    shared = [name for name in wanted if name in found]
    wrong = {
        "missing": [f"{name} {wanted[name]}" for name in wanted if name not in found],
        "unexpected": [f"{name} {found[name]}" for name in found if name not in wanted],
        "mis-shaped": [f"{name} is {found[name]}, expected {wanted[name]}" for name in shared if wanted[name] != found[name]],
        "mis-typed": mistyped,
    }
    if any(wrong.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in wrong.items())
        raise CheckpointError(
            f"The tensors of {source!r} do not fit its {config_file}: {counts}. Nothing was loaded.\n"
            + "\n".join(f"  {kind}: {name}" for kind, names in wrong.items() for name in names)
            + f"\nDownload it again, or check that {config_file} belongs to these weights."
        )
