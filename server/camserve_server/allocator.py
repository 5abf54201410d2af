"""Keeps freed memory in the process, where the network's next batch finds it.

By default glibc maps every large buffer anew and gives it back when it is freed, so each layer of each batch pays for
fresh pages. On two cores, EfficientNet-Lite0 runs up to twice as fast without that
(`docs/decisions/0008-allocator.md`).
"""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> bool:
    """Sets glibc's thresholds for this process. False where there is no glibc; nothing is lost but speed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(option, value) == 1 for option, value in settings)
