"""Host memory of a training process."""

from __future__ import annotations

import ctypes

# From malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next tensors; returns whether it can (glibc does).

    By default it returns every large tensor to the system at once, which clears its pages for the next one:
    of a training step on a CPU, a tenth of the time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
