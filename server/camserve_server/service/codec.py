"""Threads that decode images, finish maps and encode responses, so that the event loop and the engine go on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from camserve_server.torch_setup.threads import compute_alone, settled_by

# With more threads than cores, they compete for caches. With one, a large image would hold up all other requests.
LEAST_THREADS, MOST_THREADS = 2, 4

T = TypeVar("T")


class CodecThreads:
    """Threads for the pixels of requests and responses. Call all methods on the event loop."""

    def __init__(self) -> None:
        threads = min(MOST_THREADS, max(LEAST_THREADS, len(os.sched_getaffinity(0))))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="codec", initializer=compute_alone)

    def run(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Call a function in a codec thread and return the future of its result."""
        done, run = self._settled_by(work, *args)
        self._pool.submit(run)
        return done

    def run_after(self, before: Future[Any], work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Call a function in a codec thread when another future is done, and return the future of its result.

        The event loop does nothing between the two.

        Args:
            before: The future to wait for. Its result or exception is ignored.
            work: The function.
            *args: Its arguments.
        """
        done, run = self._settled_by(work, *args)
        before.add_done_callback(lambda _: self._pool.submit(run))
        return done

    def _settled_by(self, work: Callable[..., T], *args: object) -> tuple[asyncio.Future[T], Callable[[], None]]:
        context = copy_context()  # log lines of the thread carry the identifier of the request
        return settled_by(lambda: context.run(work, *args))
