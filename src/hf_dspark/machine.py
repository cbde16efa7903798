"""What this machine is called. Knows the operating system; knows no model."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        with info.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name() if device.type == "cpu" else str(device)
