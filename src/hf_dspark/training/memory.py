"""Makes the C library reuse freed memory."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc's malloc reuse large blocks instead of returning them to the system at every free.

    A training step on a CPU frees and allocates buffers of tens of megabytes all the time; mapping each one anew can cost a third of the
    step. For programs, not for libraries: it changes the whole process.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no such function
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
