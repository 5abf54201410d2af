"""Lookup tables of DICOM headers: modality LUTs, VOI LUTs and palettes (PS3.3 C.11.1.1, C.11.2.1.1, C.7.6.3.1.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset

__all__ = ["Entries", "apply_table", "first_mapped_value", "table_entries", "table_item"]

Entries = NDArray[np.unsignedinteger[Any]]


def table_entries(descriptor: Sequence[int], data: DataElement, *, little_endian: bool) -> Entries:
    """Return all entries of a lookup table.

    Args:
        descriptor: LUT Descriptor: number of entries (0 means 65536), first mapped value, bits per entry.
        data: LUT Data, with VR OW, US or OB.
        little_endian: Byte order of the transfer syntax, which applies to data with VR OW.

    Returns:
        The entries as uint16 [entries], or as uint8 [entries] where each 16-bit word holds two entries.

    Raises:
        ValueError: If there are fewer entries than the descriptor says.
    """
    count = int(descriptor[0]) % 65536 or 65536
    if isinstance(data.value, bytes):
        # pydicom does not swap the bytes of OW elements.
        order = "<" if little_endian or data.VR != "OW" else ">"
        words = np.frombuffer(data.value + b"\0" * (len(data.value) % 2), f"{order}u2").astype("<u2")
    else:
        words = (np.asarray(data.value, np.int64).reshape(-1) % 65536).astype("<u2")
    entries: Entries = words if len(words) >= count else words.view(np.uint8)
    if len(entries) < count:
        raise ValueError(f"the lookup table has {len(entries)} entries; its descriptor announces {count}")
    return entries[:count]


def first_mapped_value(descriptor: Sequence[int], *, signed: bool) -> int:
    """Return the pixel value that is mapped to the first entry.

    The VR of the descriptor (US or SS) cannot tell whether the value is signed, because files in implicit VR do not
    contain it.

    Args:
        descriptor: LUT Descriptor: number of entries, first mapped value, bits per entry.
        signed: True if the values to map may be negative.
    """
    first = int(descriptor[1]) % 65536
    return first - 65536 if signed and first >= 32768 else first


def apply_table(values: NDArray[Any], first: int, table: NDArray[Any]) -> NDArray[Any]:
    """Return the table entry of each value.

    Args:
        values: Values of any shape. Fractions are rounded.
        first: The value that is mapped to the first entry. Lower values are mapped to it, too.
        table: Entries [entries]. Values above the mapped range are mapped to the last entry.

    Returns:
        Entries in the shape of `values`.
    """
    mapped: NDArray[Any] = table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]
    return mapped


def table_item(first: int, table: Entries, bits: int) -> Dataset:
    """Return a lookup table as a sequence item in Explicit VR Little Endian.

    Args:
        first: The value that is mapped to the first entry.
        table: Entries [entries], at most 65536.
        bits: Bits per entry, 8 or 16.
    """
    item, count = Dataset(), len(table) % 65536
    if first < 0:
        item.add_new("LUTDescriptor", "SS", [count - 65536 if count >= 32768 else count, first, bits])
    else:
        item.add_new("LUTDescriptor", "US", [count, first, bits])
    data = table.astype("<u2" if bits == 16 else np.uint8).tobytes()
    item.add_new("LUTData", "OW", data + b"\0" * (len(data) % 2))
    return item
