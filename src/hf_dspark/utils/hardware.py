"""What this machine is called, and which dtypes it computes in."""

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


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 by itself. Where it does not, they take several times as long as those of float32.

    On CPUs it is for oneDNN to say, which asks for AVX-512 on x86.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name() if device.type == "cpu" else str(device)
