"""What a run leaves on disk: event log, TensorBoard scalars, checkpoints and drafters, each written whole or not at all. Does not know
models beyond `save_pretrained`, nor what the numbers mean."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hf_dspark.errors import CheckpointError, OutputError

logger = logging.getLogger(__name__)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what torch, safetensors and the system say when a file cannot be written into one error.

    Raises:
        OutputError: naming the path and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's and safetensors' writers raise errors of their own for what the system said to them.
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        raise OutputError(
            f"cannot write {path}: {' '.join(str(error).split())}. What was written before is whole: make room, and run the same command "
            "again to go on from there."
        ) from error


_KEPT_CHECKPOINTS = 2


class RunFolder:
    """The output folder of one run.

    Args:
        path (`Path`): created when missing.
        writes (`bool`): False in all processes but one, where every write does nothing.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self._scalars: Any = None
        if writes:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints `step-*`."""
        return self.path / "checkpoints"

    def log(self, record: dict[str, Any]) -> None:
        """Append one event to `log.jsonl`."""
        if self.writes:
            with writing(self.path / "log.jsonl"), (self.path / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add TensorBoard scalars under `tensorboard/`, where the package is installed (extra `train`)."""
        if not self.writes:
            return
        if self._scalars is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning("tensorboard is not installed, so no scalars are written; log.jsonl holds them all. pip install tensorboard")
                self._scalars = False
            else:
                self._scalars = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        if self._scalars:
            for name, value in values.items():
                self._scalars.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush what TensorBoard still holds."""
        if self._scalars:
            self._scalars.close()
            self._scalars = None

    def save_drafter(self, drafter: Any, name: str, weights: dict[str, Any] | None = None) -> Path:
        """Write a drafter for `from_pretrained` as the subfolder `name`, replacing the one before; `weights` stand in for its own."""
        if self.writes:
            waiting = self.path / f".tmp-{name}"
            shutil.rmtree(waiting, ignore_errors=True)
            with writing(self.path / name):
                drafter.save_pretrained(waiting, **({} if weights is None else {"state_dict": weights}))
            # The one before is moved aside first: a kill in between leaves it there, whole.
            aside = self.path / f".old-{name}"
            shutil.rmtree(aside, ignore_errors=True)
            if (self.path / name).exists():
                os.replace(self.path / name, aside)
            os.replace(waiting, self.path / name)
            shutil.rmtree(aside, ignore_errors=True)
        return self.path / name

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> Path:
        """Write `checkpoints/step-*`: a temporary folder, flushed to disk, then renamed; the last two are kept."""
        name = f"step-{step:08d}"
        if self.writes:
            self.checkpoints.mkdir(exist_ok=True)
            waiting = self.checkpoints / f".tmp-{name}"
            shutil.rmtree(waiting, ignore_errors=True)
            waiting.mkdir()
            with writing(self.checkpoints / name), (waiting / "state.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(self.checkpoints / name, ignore_errors=True)
            os.replace(waiting, self.checkpoints / name)
            for old in sorted(self.checkpoints.glob("step-*"))[:-_KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        return self.checkpoints / name

    def newest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its path; half-written ones are removed. None where there is none."""
        if self.writes:
            for half_written in self.checkpoints.glob(".tmp-*"):
                shutil.rmtree(half_written)
        return newest_state(self.path)


def newest_state(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run's folder, read; None where there is none.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    found = sorted((run / "checkpoints").glob("step-*/state.pt"))
    if not found:
        return None
    try:
        return found[-1], torch.load(found[-1], map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{found[-1]} cannot be read ({type(error).__name__}: {error}); allowed: a checkpoint as a run writes it. Remove its folder to "
            "resume from the one before."
        ) from error


def flat_metrics(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    """Numbers of a nested record under slash-separated names; lists by position from 1; what is not a number is left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flat_metrics(f"{prefix}/{name}", value)
        elif isinstance(value, list):
            flat |= {f"{prefix}/{name}_{k}": float(v) for k, v in enumerate(value, start=1) if isinstance(v, int | float)}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}/{name}"] = float(value)
    return flat
