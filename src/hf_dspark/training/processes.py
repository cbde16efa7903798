"""What the processes of one run agree on, add up, and hold in shards (FSDP2)."""

from __future__ import annotations

import gc
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from hf_dspark.training.losses import BlockObjective


class Processes:
    """The launched processes, or one that is alone; a `ValueError` where the drafter's device is not the process's own, among several."""

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.leads: bool = accelerator.is_main_process
        own = accelerator.device
        if self.count > 1 and (device.type != own.type or (device.index or 0) != (own.index or 0)):
            raise ValueError(
                f"the drafter is on {device}, its process's own device is {own}; allowed: the same. Leave --device at auto under "
                "accelerate launch."
            )

    def agree(self, value: Any) -> Any:
        """The first process's value in all processes: their clocks differ."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the host."""
        return values if self.count == 1 else self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum").cpu()

    def leave(self) -> None:
        """Leave the process group, and wait for its threads to end, while the interpreter still lives: a thread that frees its last tensor
        later aborts the process.

        torch remembers meshes as long as the process lives, and with them a group that was destroyed: so they are made to forget it.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for mesh in [one for one in gc.get_objects() if type(one).__name__ in ("DeviceMesh", "FSDPMeshInfo", "HSDPMeshInfo")]:
                for name, value in vars(mesh).items():
                    if isinstance(value, torch.distributed.ProcessGroup):
                        setattr(mesh, name, None)
                vars(mesh).get("_pg_registry", {}).clear()
        self.accelerator.end_training()


def shard(objective: BlockObjective) -> None:
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
