"""Responses in the memory of this process, the least recently used of which are dropped."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import NamedTuple


class _Entry(NamedTuple):
    value: bytes
    expires: float  # on the clock of `time.monotonic()`


class MemoryStore:
    """A bounded store that drops the least recently used values first. All methods belong to the event loop.

    Args:
        max_bytes: The most bytes that all values may have together. A larger value is not stored.

    Attributes:
        bytes: The bytes of all values.
        evictions: The number of values that were dropped to make room.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.evictions = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the least recently used comes first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, which is then the most recently used one; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires <= time.monotonic():
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Store a value, and drop others to make room.

        Args:
            key: The key.
            value: The value, which replaces an earlier one.
            ttl_s: The seconds after which it expires.
        """
        if key in self._entries:
            self._remove(key)
        if len(value) > self._max_bytes:
            return
        while self.bytes + len(value) > self._max_bytes:
            self._remove(next(iter(self._entries)))
            self.evictions += 1
        self._entries[key] = _Entry(value, time.monotonic() + ttl_s)
        self.bytes += len(value)

    def _remove(self, key: bytes) -> None:
        self.bytes -= len(self._entries.pop(key).value)
