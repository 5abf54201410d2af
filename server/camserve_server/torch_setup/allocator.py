"""Settings of glibc's memory allocator that keep freed memory in the process.

By default glibc maps a new region for every large buffer and returns it to the kernel when the buffer is freed, so each
layer of each batch pays for new pages. On two cores, EfficientNet-Lite0 runs up to twice as fast without that
(`docs/decisions/0008-allocator.md`).
"""

from __future__ import annotations

import ctypes

# Options of mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def keep_memory() -> bool:
    """Configure glibc to keep freed memory and to use one heap for all threads of this process.

    Call it before the process starts its first thread.

    Returns:
        True if all settings were accepted; False without glibc, where only speed is lost.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = (
        (_M_MMAP_THRESHOLD, 1 << 30),
        (_M_TRIM_THRESHOLD, (1 << 31) - 1),
        (_M_TOP_PAD, 64 << 20),
        (_M_ARENA_MAX, 1),  # the heap of a further thread holds at most 64 MB; glibc would map larger buffers again
    )
    return all(mallopt(option, value) == 1 for option, value in settings)
