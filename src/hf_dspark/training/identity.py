"""What a checkpoint belongs to, and weights taken over from another run. Knows drafters and checkpoints; knows no loop."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_dspark.adapters.lora import adapter_names
from hf_dspark.errors import CheckpointError
from hf_dspark.training.files import newest_state


def drafter_identity(drafter: Any) -> dict[str, Any]:
    """What makes a drafter another one to train, beside the shapes of its tensors, as JSON takes it."""
    config = drafter.config
    names = ("block_size", "target_layer_ids", "mask_token_id", "markov_rank", "markov_head_type", "num_hidden_layers")
    found: dict[str, Any] = {name: getattr(config, name) for name in names}
    found["target_layer_ids"] = list(found["target_layer_ids"])
    found["dtype"] = str(drafter.dtype).removeprefix("torch.")
    ids = drafter.draft_token_ids
    found["draft_ids"] = None if ids is None else hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
    for name in adapter_names(drafter):
        settings = drafter.peft_config[name]
        found[f"adapter {name}"] = [getattr(settings, key, None) for key in ("r", "lora_alpha", "lora_dropout")]
    return found


def load_weights(drafter: nn.Module, run: Path) -> int:
    """Start `drafter` from the newest checkpoint of another run: its weights, nothing of its optimizer or schedule.

    Args:
        drafter (`DSparkDrafter`): of the same shapes.
        run (`Path`): that run's output folder.
    The draft vocabulary comes along: row j of the head's second matrix belongs to its draft id j.

    Returns:
        `int`: the step of the checkpoint.
    Raises:
        CheckpointError: if there is none, its tensors have other shapes, or block, taps or mask token are others.
    """
    found = newest_state(run)
    if found is None:
        raise CheckpointError(f"{run} holds no checkpoint; expected {run}/checkpoints/step-*/state.pt, as a run writes them.")
    path, state = found
    masters, parameters = state["optimizer"]["masters"], [p for p in drafter.parameters() if p.requires_grad]
    if [m.shape for m in masters] != [p.shape for p in parameters]:
        raise CheckpointError(f"{path} holds tensors of other shapes than this drafter's; use the same layers, rank and vocabulary.")
    there = state["fingerprint"]
    mine = drafter_identity(drafter)
    differing = [name for name in ("block_size", "target_layer_ids", "mask_token_id", "markov_head_type") if there.get(name) != mine[name]]
    if differing:
        listed = ", ".join(f"{name} {there.get(name)!r} there, {mine[name]!r} here" for name in differing)
        raise CheckpointError(f"{path} is of another kind of drafter ({listed}); allowed: the same. Give the options of that run.")
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
        for name, buffer in state["buffers"].items():
            drafter.get_buffer(name).copy_(buffer)
    return state["progress"]["step"]
