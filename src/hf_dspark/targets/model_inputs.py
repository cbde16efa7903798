"""Small questions to a model: where it takes token ids, which arguments it names."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def input_device(model: Any) -> torch.device:
    """Where the model's embedding takes token ids; for offloaded weights, where accelerate's hook brings them."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type == "meta":
        hook = getattr(embedding, "_hf_hook", None)
        places = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", [hook])]
        return torch.device(next((place for place in places if place is not None), "cpu"))
    return device


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward names this argument."""
    return name in inspect.signature(model.forward).parameters
