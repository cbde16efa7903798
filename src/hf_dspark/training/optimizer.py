"""AdamW, or Muon beside it, on float32 masters of low-precision weights, whole or in shards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_dspark.errors import CheckpointError
from hf_dspark.utils.hardware import device_name, has_bf16
from hf_dspark.utils.logging import warn_once

logger = logging.getLogger(__name__)


class MasterOptimizer:
    """AdamW or Muon on float32 copies of the parameters, which themselves stay in the dtype they compute in.

    Muon orthogonalises the momentum of matrices between hidden states, which the caller names; everything else stays with AdamW. Muon's
    updates are scaled to the size of AdamW's, so that one learning rate serves both. Gradients of the parts of a step are added up in
    float32, and over processes where there are several.

    Source: torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`; a `ValueError` where this torch has none, and on shards of matrices.

    Args:
        parameters: trainable tensors of the drafter, any float dtype.
        kind (`str`): `"adamw"` or `"muon"`.
        matrices: which of the parameters are Muon's.
        weight_decay (`float`): decoupled.
        resting: which of the parameters the loss says nothing of; they do not decay either.
        reduce (`Callable`, *optional*): adds a flat float32 tensor up over processes, in place; None where gradients arrive reduced.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        kind: str = "adamw",
        matrices: Sequence[nn.Parameter] = (),
        weight_decay: float = 0.0,
        resting: Sequence[nn.Parameter] = (),
        reduce: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.masters = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self._reduce = reduce
        chosen = {id(parameter) for parameter in matrices} if kind == "muon" else set()
        # Each optimizer with the indices of its masters.
        self.parts: list[tuple[torch.optim.Optimizer, list[int]]] = []
        for make, muons in ((_adamw, False), (_muon, True)):
            indices = [i for i, parameter in enumerate(self.parameters) if (id(parameter) in chosen) == muons]
            if indices:
                self.parts.append((make([self.masters[i] for i in indices], weight_decay), indices))
        still = {id(parameter) for parameter in resting}
        self._resting = [master for master, parameter in zip(self.masters, self.parameters, strict=True) if id(parameter) in still]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Move the parameters' gradients onto those of the masters."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(torch.float32, copy=True)
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float) -> float:
        """Accumulate, reduce, clip, step, copy back and drop the gradients. Returns their norm before clipping, the same in every process;
        where it is not finite no parameter changes."""
        self.accumulate()
        if self._reduce is not None:
            flat = torch.cat([torch.zeros_like(m).flatten() if m.grad is None else m.grad.flatten() for m in self.masters])
            self._reduce(flat)
            for master, piece in zip(self.masters, flat.split([m.numel() for m in self.masters]), strict=True):
                master.grad = piece.view_as(master)
        norm: Any = nn.utils.clip_grad_norm_(self.masters, clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm):
            for master in self._resting:
                master.grad = None
            for optimizer, _ in self.parts:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
            self._copy_back()
        for optimizer, _ in self.parts:
            optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def _copy_back(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)

    def state_dict(self, keep: bool = True) -> dict[str, Any]:
        """Masters and the optimizers' states, put together from their shards where there are several; all processes must call it. Sharded
        tensors are None where `keep` is False: in processes that will not write them."""
        state = {"masters": self.masters, "optimizers": [optimizer.state_dict() for optimizer, _ in self.parts]}
        return tree_map(lambda value: gathered(value, keep) if torch.is_tensor(value) else value, state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, whatever the number of processes was; a `CheckpointError` where it does not fit."""
        saved = state["masters"]
        if [tuple(t.shape) for t in saved] != [tuple(t.shape) for t in self.masters]:
            raise CheckpointError(
                f"the checkpoint holds {len(saved)} tensors that do not fit this drafter's {len(self.masters)}; allowed: the same "
                "architecture. Start in another output folder."
            )
        if len(state["optimizers"]) != len(self.parts):
            raise CheckpointError("the checkpoint is of another optimizer; allowed: the same. Start in another output folder.")
        with torch.no_grad():
            for master, value in zip(self.masters, saved, strict=True):
                master.copy_(_cut_like(value, master))
        for (optimizer, indices), stored in zip(self.parts, state["optimizers"], strict=True):
            moments = {
                index: {
                    name: _cut_like(value, self.masters[indices[index]]) if torch.is_tensor(value) and value.dim() else value
                    for name, value in of_one.items()
                }
                for index, of_one in stored["state"].items()
            }
            optimizer.load_state_dict({**stored, "state": moments})
        self._copy_back()


def _adamw(masters: list[Tensor], weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(masters, lr=0.0, weight_decay=weight_decay, fused=True)


def _muon(masters: list[Tensor], weight_decay: float) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer is 'muon', which torch {torch.__version__} does not have; allowed: torch 2.9 or newer, or 'adamw'.")
    if any(type(master) is not Tensor for master in masters):
        raise ValueError("optimizer is 'muon', which needs whole matrices, and FSDP shards them; allowed here: 'adamw'.")
    if not has_bf16(masters[0].device):
        warn_once(
            logger,
            f"torch's Muon computes in bfloat16, which {device_name(masters[0].device)} does not: its steps take several times as long as "
            "AdamW's. Consider --optimizer adamw.",
        )
    return torch.optim.Muon(masters, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def gathered(tensor: Tensor, keep: bool) -> Tensor | None:
    """A sharded tensor put together on the host, one at a time so that no accelerator ever holds them all; None where `keep` is False."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else None


def _cut_like(value: Tensor, shards: Any) -> Tensor:
    """A whole tensor cut the way another one is sharded, or as it is where that one is whole."""
    if not hasattr(shards, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(shards.device), shards.device_mesh, shards.placements)
