"""Small tables on a device, made once: a copy from the host can be neither captured in a graph nor is it free."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def constant(values: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """`values` of a configuration, numbers or equally long tuples of them, as float32 on `device`; kept, and not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32).to(device)
