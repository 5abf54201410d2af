"""Threads for work with torch beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from camserve_server.torch_setup.device import use_device
from camserve_server.torch_setup.spinning import find_libgomp

T = TypeVar("T")


def compute_alone() -> None:
    """Let torch start no OpenMP team on the calling thread, so that it does not compete with the engine's team.

    `torch.set_num_threads` is not enough: it would also apply to the engine.
    """
    torch.get_num_threads()  # torch initialises the setting of a thread at the first use, which must not come later
    if (libgomp := find_libgomp()) is not None:
        libgomp.omp_set_num_threads(1)


def settled_by(work: Callable[[], T]) -> tuple[asyncio.Future[T], Callable[[], None]]:
    """Return a future of the running event loop, and a function for another thread that settles it.

    Args:
        work: The function whose result or exception becomes that of the future.

    Returns:
        The future, and a function that calls `work`, unless the future has been cancelled.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def run() -> None:
        if done.cancelled():
            return
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(settle, result, error)

    return done, run


async def in_own_thread(work: Callable[[], T], device: torch.device) -> T:
    """Call a function in a new thread and return its result.

    The OpenMP team of the thread ends with it: see engine/lanes/dispatch.py. The process does not wait for the thread
    at its end.

    Args:
        work: The function.
        device: The device that it uses. The current GPU of a new thread would be the first one, and code of networks
            may use the current GPU.
    """

    def work_on_device() -> T:
        use_device(device)
        return work()

    done, run = settled_by(work_on_device)
    threading.Thread(target=run, name="load", daemon=True).start()
    return await done
