"""Weights in shards over processes (FSDP2). Knows torch's distributed tensors; knows no losses and no loop."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor


def shard(objective: Any) -> None:
    """Shard a drafter's weights, gradients and so its optimizer's state over all processes (FSDP2), layer by layer.

    Gradients are reduced in float32, as means over processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(objective.device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in objective.drafter.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)


def leave(accelerator: Any) -> None:
    """Leave the process group, and wait for its threads to end, while the interpreter still lives: a thread that lets go of its last tensor
    later aborts the process.

    torch remembers meshes as long as the process lives, and with them a group that was destroyed: so they are made to forget it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for mesh in [one for one in gc.get_objects() if type(one).__name__ in ("DeviceMesh", "FSDPMeshInfo", "HSDPMeshInfo")]:
            for name, value in vars(mesh).items():
                if isinstance(value, torch.distributed.ProcessGroup):
                    setattr(mesh, name, None)
            vars(mesh).get("_pg_registry", {}).clear()
    accelerator.end_training()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (all processes must call it); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensor: Tensor, keep: bool) -> Tensor | None:
    """A sharded tensor put together on the host, one at a time so that no accelerator ever holds them all; None where it is not kept."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else None


def like(value: Tensor, shards: Any) -> Tensor:
    """A whole tensor cut the way another one is sharded, or as it is where that one is whole."""
    if not hasattr(shards, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(shards.device), shards.device_mesh, shards.placements)
