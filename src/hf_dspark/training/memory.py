"""Tells the C library to keep freed memory. Knows glibc; knows no tensors."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let malloc reuse large blocks instead of giving them back to the system at every free.

    A training step on a CPU frees and asks again for buffers of tens of megabytes all the time. By default glibc maps
    each one anew, and the kernel clears its pages one fault at a time; that can cost a third of the step. Costs memory
    that stays with the process. Meant for programs, not for libraries: it changes the whole process.

    Returns:
        `bool`: whether the C library took it; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has no such function
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
