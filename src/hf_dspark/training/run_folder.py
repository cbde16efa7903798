"""What a run leaves on disk: event log, TensorBoard scalars, checkpoints and drafters, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hf_dspark.adapters.lora import adapter_names
from hf_dspark.errors import CheckpointError, OutputError
from hf_dspark.models.modeling_dspark import DSparkDrafter
from hf_dspark.utils.files import atomic_folder
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)

_CHECKPOINTS = 2  # the newest ones stay


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what torch, safetensors and the system raise when a file cannot be written into one `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's and safetensors' writers raise errors of their own for a full disk.
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        raise OutputError(
            f"cannot write {path}: {' '.join(str(error).split())}. What was written before is whole: make room, and run the same command "
            "again to go on from there."
        ) from error


class RunFolder:
    """The output folder of one run, created when missing; without `writes` (in all processes but one) every write does nothing."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.writes = writes
        self._scalars: Any = None
        if writes:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)

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
                warn_once(logger, "tensorboard is not installed, so no scalars are written; log.jsonl holds them. pip install tensorboard")
                return
            self._scalars = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        for name, value in values.items():
            self._scalars.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard's scalars."""
        if self._scalars is not None:
            self._scalars.close()
            self._scalars = None

    def save_drafter(self, drafter: DSparkDrafter, name: str, weights: dict[str, Any] | None = None) -> None:
        """Write a drafter for `from_pretrained` as the subfolder `name`, replacing the one before; `weights` stand in for its own."""
        if self.writes:
            with writing(self.path / name), atomic_folder(self.path / name) as folder:
                drafter.save_pretrained(folder, state_dict=weights)

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> Path:
        """Write `checkpoints/step-*`, flushed to disk; the newest two stay."""
        path = self.checkpoints / f"step-{step:08d}"
        if self.writes:
            with writing(path), atomic_folder(path) as folder, (folder / "state.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            for old in sorted(self.checkpoints.glob("step-*"))[:-_CHECKPOINTS]:
                shutil.rmtree(old)
        return path

    def newest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """As `newest_state`; what a kill left half-written is removed."""
        if self.writes:
            for half_written in [*self.path.glob(".*.tmp"), *self.path.glob("checkpoints/.*.tmp")]:
                shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
        return newest_state(self.path)


def newest_state(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run's folder and its path, None where there is none; a `CheckpointError` if it cannot be read."""
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


def drafter_identity(drafter: DSparkDrafter) -> dict[str, Any]:
    """What makes a drafter another one to train, beside the shapes of its tensors, as JSON takes it."""
    config = drafter.config
    names = ("block_size", "target_layer_ids", "mask_token_id", "markov_rank", "markov_head_type", "num_hidden_layers")
    found: dict[str, Any] = {name: getattr(config, name) for name in names}
    found["target_layer_ids"] = list(config.target_layer_ids)
    found["dtype"] = str(drafter.dtype).removeprefix("torch.")
    ids = drafter.draft_token_ids
    found["draft_ids"] = None if ids is None else hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
    for name in adapter_names(drafter):
        settings = drafter.peft_config[name]
        found[f"adapter {name}"] = [getattr(settings, key, None) for key in ("r", "lora_alpha", "lora_dropout")]
    return found


def load_weights(drafter: DSparkDrafter, run: Path) -> int:
    """Start a drafter from the newest checkpoint of another run: its weights and, since row j of the head's second matrix belongs to draft
    id j, its draft vocabulary; nothing of its optimizer or schedule. Returns its step; a `CheckpointError` says what does not fit."""
    found = newest_state(run)
    if found is None:
        raise CheckpointError(f"{run} holds no checkpoint; expected {run}/checkpoints/step-*/state.pt, as a run writes them.")
    path, state = found
    masters, parameters = state["optimizer"]["masters"], [p for p in drafter.parameters() if p.requires_grad]
    if [m.shape for m in masters] != [p.shape for p in parameters]:
        raise CheckpointError(f"{path} holds tensors of other shapes than this drafter's; use the same layers, rank and vocabulary.")
    kind = ("block_size", "target_layer_ids", "mask_token_id", "markov_head_type")
    if listed := differences(state["fingerprint"], drafter_identity(drafter), kind):
        raise CheckpointError(f"{path} is of another kind of drafter ({listed}); allowed: the same. Give the options of that run.")
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
        for name, buffer in state["buffers"].items():
            drafter.get_buffer(name).copy_(buffer)
    return state["progress"]["step"]


def differences(there: dict[str, Any], here: dict[str, Any], names: Iterable[str]) -> str:
    """What differs between the identities of two runs, for messages."""
    differing = (name for name in names if there.get(name) != here.get(name))
    return ", ".join(f"{name} {there.get(name)!r} there, {here.get(name)!r} here" for name in differing)


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
