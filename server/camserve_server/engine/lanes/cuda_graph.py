"""Recording of kernels as a CUDA graph, which launches all of them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
WARM_UP_CALLS = 3

_recording = threading.Lock()  # torch permits one recording at a time, and each GPU has a thread of its own
_streams: dict[int, torch.cuda.Stream] = {}  # of each GPU; graphs share memory only if their stream is the same


def record(function: Callable[[], T], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record the kernels of a function on a GPU.

    The function is called a few times before, because a recording must not contain the allocations that only the first
    calls make. Replays use the memory of the tensors that the function used during the recording.

    Args:
        function: Function without arguments that reads no value of a tensor on the host.
        device: The GPU.
        pool: Memory of other graphs (`CUDAGraph.pool`) to use for temporary tensors. Graphs with the same memory must
            not run at the same time.

    Returns:
        The graph, and what the function returned during the recording. Each replay overwrites its tensors.

    Raises:
        torch.OutOfMemoryError: Memory ran out, also if the end of the recording has raised another error since.
        Exception: Another error of the function or of its recording.
    """
    with _recording, torch.cuda.device(device):
        gpu, before = torch.cuda.current_device(), torch.cuda.current_stream()
        if gpu not in _streams:
            _streams[gpu] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside = _streams[gpu]
        aside.wait_stream(before)
        try:
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP_CALLS):
                    function()
        finally:
            before.wait_stream(aside)  # also after an error, because kernels of earlier calls may still run
        graph = torch.cuda.CUDAGraph()
        pool = pool or torch.cuda.graph_pool_handle()
        try:
            # "thread_local", because other threads may copy images to the device during the recording.
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                result = function()
        except BaseException as error:
            _end_allocations(gpu, pool)
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
        finally:
            torch.cuda.set_stream(before)  # a recording that fails at its end does not restore the stream
    return graph, result


def empty_cache() -> None:
    """Return the memory that torch keeps for later tensors to the GPUs, while nothing is recorded on any of them."""
    with _recording:
        torch.cuda.empty_cache()


def _end_allocations(gpu: int, pool: Any) -> None:
    """Tell torch's allocator that a recording has failed.

    If the end of a recording fails, torch goes on as if it were underway, and cannot free cached memory any more.
    """
    try:
        torch._C._cuda_endAllocateToPool(gpu, pool)
    except (AttributeError, RuntimeError):  # the recording has ended, or torch is too old
        return
    torch._C._cuda_releasePool(gpu, pool)
