"""What `from_pretrained` takes for a name: a bundled model's folder, a folder on the disk, or a Hub id."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_dspark.errors import CheckpointError
from hf_dspark.hub.bundled import DRAFTER_NAME, TARGET_NAME, bundled_drafter_path, bundled_target_path


def resolve_target(name: str | os.PathLike[str]) -> str:
    """The folder or Hub id of a target; `smollm2` is the bundled one."""
    return str(bundled_target_path()) if name == TARGET_NAME else _folder_or_repo(name, "target", DRAFTER_NAME)


def resolve_drafter(name: str | os.PathLike[str]) -> str:
    """The folder or Hub id of a drafter or adapter; `smollm2-dspark` is the bundled one."""
    return str(bundled_drafter_path()) if name == DRAFTER_NAME else _folder_or_repo(name, "drafter", TARGET_NAME)


def _folder_or_repo(name: str | os.PathLike[str], role: str, other_role_name: str) -> str:
    """A name, with a CheckpointError for what is none, and for a folder without a config."""
    text = os.fspath(name)
    if text == other_role_name:
        raise CheckpointError(f"{text!r} cannot be the {role}: the bundled target is {TARGET_NAME!r}, its drafter {DRAFTER_NAME!r}")
    folder = Path(text).expanduser()
    if folder.is_dir():
        files = ("config.json", "adapter_config.json") if role == "drafter" else ("config.json",)
        if not any((folder / file).is_file() for file in files):
            raise CheckpointError(f"the {role} folder {folder} holds no config.json; name the folder that save_pretrained wrote")
        return str(folder)
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise CheckpointError(
            f"no {role} {text!r}: not a bundled name ({TARGET_NAME}, {DRAFTER_NAME}), not a folder on this disk, "
            "and not a Hub id of the form owner/name"
        ) from error
    return text
