"""What `from_pretrained` takes for a name: a bundled model's folder, a folder on the disk, or a Hub id."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_dspark.errors import CheckpointError
from hf_dspark.hub.bundled import DRAFTER_NAME, TARGET_NAME, embedded_drafter_path, embedded_target_path


def resolve_target(name: str | os.PathLike[str]) -> str:
    """Returns what `from_pretrained` takes for a target's name: a folder, or a Hub id as it is.

    Args:
        name: `smollm2` for the embedded target, a folder on the disk, or a Hub id.
    Raises:
        CheckpointError: if the name is neither an embedded name, an existing folder nor a well-formed Hub id; or if the
            embedded target cannot be provided.
    """
    return str(embedded_target_path()) if name == TARGET_NAME else _folder_or_repo(name, "target", DRAFTER_NAME)


def resolve_drafter(name: str | os.PathLike[str]) -> str:
    """Returns what `from_pretrained` takes for a drafter's name: a folder, or a Hub id as it is.

    Args:
        name: `smollm2-dspark` for the embedded drafter, a folder on the disk, or a Hub id.
    Raises:
        CheckpointError: if the name is neither an embedded name, an existing folder nor a well-formed Hub id; or if the
            embedded drafter is missing.
    """
    return str(embedded_drafter_path()) if name == DRAFTER_NAME else _folder_or_repo(name, "drafter", TARGET_NAME)


def _folder_or_repo(name: str | os.PathLike[str], role: str, other_role_name: str) -> str:
    text = os.fspath(name)
    if text == other_role_name:
        raise CheckpointError(f"{text!r} cannot be the {role}: the embedded target is {TARGET_NAME!r}, its drafter {DRAFTER_NAME!r}")
    folder = Path(text).expanduser()
    if folder.is_dir():
        known = ("config.json", "adapter_config.json") if role == "drafter" else ("config.json",)
        if not any((folder / one).is_file() for one in known):
            raise CheckpointError(f"the {role} folder {folder} holds no config.json; name the folder that save_pretrained wrote")
        return str(folder)
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise CheckpointError(
            f"no {role} {text!r}: not an embedded name ({TARGET_NAME}, {DRAFTER_NAME}), not a folder on this disk, "
            "and not a Hub id of the form owner/name"
        ) from error
    return text
