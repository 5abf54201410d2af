"""Memory that one front end shares with the engine process, for the images of its requests.

The memory is an anonymous file (memfd_create), which has no name: the kernel frees it when both processes have ended,
however they end. Unlike `multiprocessing.shared_memory`, it is not limited by the size of /dev/shm, which is 64 MB in
most containers.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from camserve_server.errors import QueueFull

CAPACITY = 64 << 30  # address space in bytes, not memory
Shape = tuple[int, int, int]
KEPT = 64 << 20  # bytes of free slots that keep their memory; new pages cost time
_MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE is new in Python 3.13
_NEVER_RESIZED = 0x2 | 0x4  # F_SEAL_SHRINK | F_SEAL_GROW of <linux/fcntl.h>


def create() -> int:
    """Create the memory of one front end. Return its file descriptor, which child processes can inherit.

    Raises:
        OSError: The system does not provide the memory.
    """
    file = os.memfd_create("camserve front end", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, CAPACITY)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, _NEVER_RESIZED)  # access beyond the end of a file would end the process
    return file


class SharedMemory:
    """The shared memory, mapped into this process as long as an array of it exists.

    Args:
        file: The file descriptor; the object does not close it.
    """

    def __init__(self, file: int) -> None:
        self._map = mmap.mmap(file, CAPACITY, flags=mmap.MAP_SHARED | _MAP_NORESERVE)

    def image(self, offset: int, shape: Shape) -> NDArray[np.float32]:
        """Return the array [H, W, C] of one image, which shares its memory with the other process.

        Args:
            offset: The position of its slot in bytes.
            shape: (H, W, C).
        """
        return np.frombuffer(self._map, np.float32, math.prod(shape), offset).reshape(shape)

    def forget(self, offset: int, size: int) -> None:
        """Return the memory of a slot to the system. Its bytes become zeros."""
        self._map.madvise(mmap.MADV_REMOVE, offset, size)


class Slots:
    """Divides shared memory into slots for one image each. All methods belong to the event loop of the front end.

    Args:
        memory: The shared memory.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # size → offsets, those with memory last
        self._kept: dict[int, int] = {}  # offset → size of the free slots that keep their memory
        self._end = 0

    def take(self, shape: Shape) -> int:
        """Reserve a slot for an image of this shape and return its offset.

        Raises:
            QueueFull: The address space is used up.
        """
        size = slot_size(shape)
        if self._free[size]:
            offset = self._free[size].pop()
            self._kept.pop(offset, None)
            return offset
        if self._end + size > CAPACITY:
            raise QueueFull("too many requests run; try again", retry_after_s=1.0)
        self._end += size
        return self._end - size

    def release(self, offset: int, shape: Shape) -> None:
        """Make a slot free."""
        size = slot_size(shape)
        if sum(self._kept.values()) + size <= KEPT:
            self._kept[offset] = size
            self._free[size].append(offset)
        else:
            self._memory.forget(offset, size)
            self._free[size].insert(0, offset)


def slot_size(shape: Shape) -> int:
    """Return the bytes of the slot of an image [H, W, C]: whole pages."""
    return -(-4 * math.prod(shape) // mmap.PAGESIZE) * mmap.PAGESIZE
