"""Files and folders that appear whole or not at all, with the permissions that the umask gives; the cache folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "HF_DSPARK_CACHE"


def cache_dir() -> Path:
    """The folder for converted models, cost profiles and what was measured of this machine: `$HF_DSPARK_CACHE`, else `~/.cache/hf_dspark`.

    Raises:
        RuntimeError: if neither is there, for want of a home folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hf_dspark"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a free path beside `path`; the file or folder written there replaces `path` when the block ends without an error.

    Args:
        path (`str` or `Path`): its parent folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield waiting
        follow_umask(*(file for file in waiting.rglob("*") if file.is_file()) if waiting.is_dir() else (waiting,))
        if path.is_dir():  # a folder that is not empty cannot be replaced in one step; killed in between, it lies beside, whole
            aside = waiting.with_suffix(".old")
            os.replace(path, aside)
            os.replace(waiting, path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(waiting, path)
    finally:
        if waiting.is_dir():
            shutil.rmtree(waiting, ignore_errors=True)
        else:
            waiting.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which it replaces, with all that was in it, when the block ends without an error."""
    with atomic_path(folder) as waiting:
        waiting.mkdir()
        yield waiting


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_path(path) as waiting:
        waiting.write_text(text, encoding="utf-8")


def atomic_write_json(path: str | os.PathLike[str], record: Any, indent: int | None = 2, **options: Any) -> None:
    """Write a JSON file, whole or not at all; `options` as in `json.dumps`."""
    atomic_write_text(path, json.dumps(record, indent=indent, ensure_ascii=False, **options) + "\n")


def follow_umask(*files: Path) -> None:
    """Give files the permissions of any new file; safetensors makes its own readable by their owner only."""
    if not files:
        return
    probe = files[0].with_name(f".{uuid.uuid4().hex}.tmp")
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in files:
        file.chmod(mode)
