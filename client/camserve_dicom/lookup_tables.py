"""Lookup tables in headers, of grey levels and of palettes: PS3.3 C.11.1.1, C.11.2.1.1, C.7.6.3.1.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset

__all__ = ["Entries", "as_item", "entries", "first_mapped", "looked_up"]

Entries = NDArray[np.unsignedinteger[Any]]


def entries(descriptor: Sequence[int], data: DataElement, *, little_endian: bool) -> Entries:
    """All entries: uint16, or uint8 where two are in a word. Raises ValueError where there are too few."""
    count = int(descriptor[0]) % 65536 or 65536
    if isinstance(data.value, bytes):
        # pydicom leaves words of OW in the order in which they were stored.
        order = "<" if little_endian or data.VR != "OW" else ">"
        words = np.frombuffer(data.value + b"\0" * (len(data.value) % 2), f"{order}u2").astype("<u2")
    else:
        words = (np.asarray(data.value, np.int64).reshape(-1) % 65536).astype("<u2")
    found: Entries = words if len(words) >= count else words.view(np.uint8)
    if len(found) < count:
        raise ValueError("a lookup table has fewer entries than its descriptor says")
    return found[:count]


def first_mapped(descriptor: Sequence[int], *, signed: bool) -> int:
    """The value that gets the first entry. Which VR it has says little: files of implicit VR have none."""
    first = int(descriptor[1]) % 65536
    return first - 65536 if signed and first >= 32768 else first


def looked_up(values: NDArray[Any], first: int, table: NDArray[Any]) -> NDArray[Any]:
    """The entry of each value: those before the first have the first's, those behind the last the last's."""
    found: NDArray[Any] = table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]
    return found


def as_item(first: int, table: Entries, bits: int) -> Dataset:
    """The table as an item of a sequence, to be written in Explicit VR Little Endian. `bits` are 8 or 16."""
    item, count = Dataset(), len(table) % 65536
    if first < 0:
        item.add_new("LUTDescriptor", "SS", [count - 65536 if count >= 32768 else count, first, bits])
    else:
        item.add_new("LUTDescriptor", "US", [count, first, bits])
    data = table.astype("<u2" if bits == 16 else np.uint8).tobytes()
    item.add_new("LUTData", "OW", data + b"\0" * (len(data) % 2))
    return item
