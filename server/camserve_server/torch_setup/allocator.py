"""Keeps freed memory in the process, where the network's next batch finds it.

By default glibc maps every large buffer anew and gives it back when it is freed, so each layer of each batch pays for
fresh pages. On two cores, EfficientNet-Lite0 runs up to twice as fast without that
(`docs/decisions/0008-allocator.md`).
"""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def keep_memory() -> bool:
    """Sets glibc's thresholds for this process, and one heap for all of its threads: to be called before there are any.

    False where there is no glibc; nothing is lost but speed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = (
        (_M_MMAP_THRESHOLD, 1 << 30),
        (_M_TRIM_THRESHOLD, (1 << 31) - 1),
        (_M_TOP_PAD, 64 << 20),
        (_M_ARENA_MAX, 1),  # a thread's own heap holds 64 MB; what is larger would be mapped anew after all
    )
    return all(mallopt(option, value) == 1 for option, value in settings)
