"""How many bytes of tensors are live at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the tensors that are made while it is open; small ones are left out, so that it costs little.

    Attributes:
        peak (`int`): the most bytes that were live at once.
    """

    def __init__(self, smallest: int = 1 << 14) -> None:
        super().__init__()
        self.peak, self.smallest = 0, smallest
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.nbytes() >= self.smallest and storage._cdata not in inputs:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out
