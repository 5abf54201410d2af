"""The parts of `torch.cuda` that camserve uses, for simulated GPUs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.simulated_gpu import DEVICE, GPUS, tensors
from tests.simulated_gpu.tensors import Recording, index_of, recordings, wait

NAME = "Simulated GPU"

_threads = threading.local()
_pools = itertools.count(1)


def _index(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    return index_of(None if device is None else torch.device(device))


class Properties:
    name = NAME
    total_memory = 80 * 2**30
    major, minor = 9, 0
    multi_processor_count = 132


class Event:
    def __init__(self, **_: object) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        wait(_index(), "wait for an event")


class Stream:
    def __init__(self, device: Any = None, **_: object) -> None:
        self.gpu = _index(device)

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        wait(self.gpu, "wait for a stream")


_defaults = [Stream(gpu) for gpu in range(GPUS)]


def default_stream(device: Any = None) -> Stream:
    return _defaults[_index(device)]


def _current_streams() -> list[Stream]:
    """Return the current stream of each GPU. Each thread has its own."""
    if not hasattr(_threads, "streams"):
        _threads.streams = [*_defaults]
    streams: list[Stream] = _threads.streams
    return streams


def current_stream(device: Any = None) -> Stream:
    return _current_streams()[_index(device)]


def set_stream(stream: Stream) -> None:
    _current_streams()[stream.gpu] = stream
    DEVICE.set_device(stream.gpu)


@contextmanager
def stream_context(stream: Stream) -> Iterator[None]:
    gpu, before = _index(), current_stream(stream.gpu)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)
        DEVICE.set_device(gpu)


@contextmanager
def device_context(device: Any) -> Iterator[None]:
    before = _index()
    DEVICE.set_device(_index(device))
    try:
        yield
    finally:
        DEVICE.set_device(before)


class CUDAGraph:
    def __init__(self) -> None:
        self.recording = Recording()
        self._pool: Any = None

    def begin(self, pool: Any) -> None:
        gpu = _index()
        assert gpu not in recordings, "the GPU records already"
        self._gpu, self._pool = gpu, pool or graph_pool_handle()
        recordings[gpu] = self.recording

    def end(self) -> None:
        recordings.pop(self._gpu).end()

    def replay(self) -> None:
        self.recording.replay()

    def pool(self) -> Any:
        return self._pool


def graph_pool_handle() -> tuple[int, int]:
    return 0, next(_pools)


class graph:  # noqa: N801
    """Recording of the operations inside the context.

    As in torch, a recording that fails at its end does not restore the stream.
    """

    def __init__(self, of: CUDAGraph, pool: Any = None, stream: Stream | None = None, **_: object) -> None:
        self._graph, self._pool, self._stream = of, pool, stream or Stream()

    def __enter__(self) -> None:
        wait(self._stream.gpu, "wait for a GPU")
        self._context = stream_context(self._stream)
        self._context.__enter__()
        self._graph.begin(self._pool)

    def __exit__(self, *_: object) -> None:
        self._graph.end()
        self._context.__exit__(None, None, None)


def install() -> None:
    """Replace parts of `torch.cuda`, which then has `GPUS` devices."""
    generator = torch.Generator()

    def constant(value: object) -> Callable[..., object]:
        return lambda *_: value

    parts = {
        "CUDAGraph": CUDAGraph,
        "Event": Event,
        "Stream": Stream,
        "_lazy_init": constant(None),
        "_sleep": constant(None),
        "current_device": _index,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "device": device_context,
        "device_count": constant(GPUS),
        "empty_cache": constant(None),
        "get_device_name": constant(NAME),
        "get_device_properties": constant(Properties()),
        "get_rng_state": lambda _=None: generator.get_state(),
        "graph": graph,
        "graph_pool_handle": graph_pool_handle,
        "is_available": constant(True),
        "is_initialized": constant(True),
        "memory_allocated": constant(0),
        "memory_reserved": constant(0),
        "set_device": lambda device: DEVICE.set_device(_index(device)),
        "set_stream": set_stream,
        "stream": stream_context,
        "synchronize": lambda device=None: wait(_index(device), "wait for a GPU"),
    }
    for name, part in parts.items():
        setattr(torch.cuda, name, part)
    Tensor.pin_memory = Tensor.clone  # type: ignore[method-assign, assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters cannot change their class
    torch.cuda._library_of_tests = tensors.install()  # type: ignore[attr-defined]
