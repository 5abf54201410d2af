"""The size and the order of the values in memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve_server.service.result_cache.memory import MemoryStore
from tests.support import Clock

Operation = tuple[str, int, int]


def key(number: int) -> bytes:
    return bytes([number]) * 32


def test_least_recently_used_value_is_dropped_first() -> None:
    store = MemoryStore(30)
    for number in (1, 2, 3):
        store.put(key(number), bytes(10), 60)
    assert store.get(key(1)) == bytes(10)
    store.put(key(4), bytes(15), 60)
    assert [number for number in (1, 2, 3, 4) if store.get(key(number)) is not None] == [1, 4]
    assert (store.bytes, len(store), store.evictions) == (25, 2, 2)


def test_value_that_does_not_fit_drops_no_other() -> None:
    store = MemoryStore(30)
    store.put(key(1), bytes(30), 60)
    store.put(key(2), bytes(31), 60)
    assert store.get(key(1)) is not None
    assert store.get(key(2)) is None
    assert (store.bytes, store.evictions) == (30, 0)


def test_values_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, store = Clock().install(monkeypatch), MemoryStore(30)
    store.put(key(1), bytes(10), ttl_s=60)
    clock.advance(59)
    assert store.get(key(1)) is not None
    clock.advance(1)
    assert store.get(key(1)) is None
    assert (store.bytes, len(store), store.evictions) == (0, 0, 0)


class Oracle:
    """A list of keys and sizes, the least recently used first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.values: list[tuple[int, int]] = []

    def get(self, number: int) -> int | None:
        for each in self.values:
            if each[0] == number:
                self.values.remove(each)
                self.values.append(each)
                return each[1]
        return None

    def put(self, number: int, size: int) -> None:
        self.values = [each for each in self.values if each[0] != number]
        if size > self.limit:
            return
        while sum(each[1] for each in self.values) + size > self.limit:
            self.values.pop(0)
        self.values.append((number, size))


@given(
    st.integers(0, 40),
    st.lists(st.tuples(st.sampled_from(["get", "put"]), st.integers(0, 5), st.integers(0, 20)), max_size=60),
)
def test_store_agrees_with_a_list(limit: int, operations: list[Operation]) -> None:
    store, oracle = MemoryStore(limit), Oracle(limit)
    for kind, number, size in operations:
        if kind == "get":
            value = store.get(key(number))
            assert (None if value is None else len(value)) == oracle.get(number)
        else:
            store.put(key(number), bytes(size), 60)
            oracle.put(number, size)
        assert store.bytes == sum(each[1] for each in oracle.values) <= limit
        assert len(store) == len(oracle.values)
