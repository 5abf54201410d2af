"""Shared memory of a front end and the engine process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from camserve_server.errors import QueueFull
from camserve_server.service.frontends import shared_memory
from camserve_server.service.frontends.shared_memory import SharedMemory, Slots, slot_size

SHAPE = (8, 6, 3)


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = shared_memory.create()
    yield descriptor
    os.close(descriptor)


def test_both_sides_see_the_same_values(file: int) -> None:
    ours, theirs = SharedMemory(file), SharedMemory(file)
    image = ours.image(slot_size(SHAPE), SHAPE)
    assert image.shape == SHAPE
    image[:] = 1.0
    assert (theirs.image(slot_size(SHAPE), SHAPE) == 1).all()
    assert not theirs.image(0, SHAPE).any()


def test_arrays_outlive_the_memory_and_its_file() -> None:
    """A cancelled request may still be in a batch when its front end has ended."""
    descriptor = shared_memory.create()
    image = SharedMemory(descriptor).image(0, SHAPE)
    os.close(descriptor)
    image[:] = 3.0
    assert image.sum() == 3 * image.size


def test_the_file_cannot_be_resized(file: int) -> None:
    """Otherwise a fault of one process could end the other one."""
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)


def test_free_slots_are_used_again(file: int) -> None:
    slots = Slots(SharedMemory(file))
    first, second = slots.take(SHAPE), slots.take(SHAPE)
    assert abs(first - second) >= slot_size(SHAPE)
    slots.release(first, SHAPE)
    assert slots.take((900, 900, 1)) not in (first, second), "a slot of another size"
    assert slots.take(SHAPE) == first


def test_slots_begin_on_pages_of_their_own(file: int) -> None:
    slots = Slots(SharedMemory(file))
    assert {slots.take((h, 7, 1)) % mmap.PAGESIZE for h in range(1, 9)} == {0}


def test_memory_of_free_slots_is_bounded(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "KEPT", 2 * slot_size(SHAPE))
    memory = SharedMemory(file)
    slots = Slots(memory)
    taken = [slots.take(SHAPE) for _ in range(5)]
    for offset in taken:
        memory.image(offset, SHAPE)[:] = 1.0
    for offset in taken:
        slots.release(offset, SHAPE)
    held = os.fstat(file).st_blocks * 512
    assert held <= 2 * slot_size(SHAPE)
    assert sorted(slots.take(SHAPE) for _ in range(5)) == sorted(taken)
    assert np.count_nonzero([memory.image(offset, SHAPE).any() for offset in taken]) == 2


def test_full_address_space_refuses_a_request(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "CAPACITY", slot_size(SHAPE))
    slots = Slots(SharedMemory(file))
    offset = slots.take(SHAPE)
    with pytest.raises(QueueFull) as caught:
        slots.take(SHAPE)
    assert caught.value.retry_after_s
    slots.release(offset, SHAPE)
    assert slots.take(SHAPE) == offset
