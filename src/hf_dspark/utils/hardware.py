"""What this machine is called, and which dtypes it computes in."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from pathlib import Path

import torch

from hf_dspark.utils.files import CACHE_VARIABLE, atomic_write_json, cache_dir

_GAIN_TOKENS = (1, 8, 32)


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
    """Whether rounds compute faster in bfloat16 than in float32 on a device; on a CPU it is measured, for what its flags say is not enough.

    An x86 processor with AVX-512 but neither AVX512_BF16 nor AMX reads half as much for one token, and takes three times as long for 32.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8
    return device.type != "cpu" or bf16_gain(8) * bf16_gain(32) >= 1


def bf16_gain(tokens: int) -> float:
    """How many times as fast this CPU multiplies 1, 8 or 32 tokens with a weight in bfloat16 as in float32.

    Takes tens of ms the first time; kept in the cache folder by processor, threads and version of torch.
    """
    return _bf16_gains(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}", os.environ.get(CACHE_VARIABLE))[
        tokens
    ]


def plain_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which of bfloat16 and float32 a device decodes token by token: a model's own `dtype`, unless the other is clearly faster."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return dtype
    gain = bf16_gain(1)
    return torch.bfloat16 if gain > 1.1 else torch.float32 if gain < 1 / 1.1 else dtype


@functools.cache
def _bf16_gains(key: str, cache: str | None) -> dict[int, float]:
    known: dict[str, dict[str, float]] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, RuntimeError):  # TypeError: not a mapping; RuntimeError: no home folder
        known = dict(json.loads((cache_dir() / "bf16.json").read_text(encoding="utf-8")))
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return {tokens: float(known[key][str(tokens)]) for tokens in _GAIN_TOKENS}
    gains = {tokens: _measured_gain(tokens) for tokens in _GAIN_TOKENS}
    with contextlib.suppress(OSError, RuntimeError):
        atomic_write_json(cache_dir() / "bf16.json", known | {key: gains})
    return gains


@torch.inference_mode()
@torch.autocast("cpu", enabled=False)
def _measured_gain(tokens: int, width: int = 2048) -> float:
    """Seconds in float32 over seconds in bfloat16, the least of a few of each in turns: a busy moment is not the processor."""
    weight, states = torch.ones(width, width, device="cpu"), torch.ones(tokens, width, device="cpu")
    pairs = [(weight.to(dtype), states.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    least = [float("inf"), float("inf")]
    for turn in range(6):
        for which, (w, x) in enumerate(pairs):
            began = time.perf_counter()
            torch.nn.functional.linear(x, w)
            if turn:
                least[which] = min(least[which], time.perf_counter() - began)
    return least[0] / least[1]


def device_name(device: torch.device) -> str:
    """The name of an accelerator, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name() if device.type == "cpu" else str(device)
