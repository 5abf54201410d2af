"""Threads that call the functions of `OnHost` queries while the engine's thread runs batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from camserve_server.engine.job import Job
from camserve_server.plan import Answer
from camserve_server.torch_setup.threads import compute_alone

T = TypeVar("T")


class HostThreads:
    """Calls functions of plans on other threads and resumes the plans on the engine's thread.

    All methods belong to the engine's thread.

    Args:
        put: Adds a command to the inbox of the engine.
        resume: Resumes the plan of a job with the answer to its query.
    """

    def __init__(
        self, put: Callable[[Callable[[], None]], None], resume: Callable[[Job[Any], Answer[Any]], None]
    ) -> None:
        self._put, self._resume = put, resume
        cores = len(os.sched_getaffinity(0))  # half of them remain for the batches
        self._threads = ThreadPoolExecutor(max(1, cores // 2), thread_name_prefix="host", initializer=compute_alone)
        self._calls: dict[int, Future[Any]] = {}  # by id of the job

    def call(self, job: Job[Any], function: Callable[[], Any]) -> None:
        """Call the function of a query. The plan of the job is resumed when the function has ended.

        Args:
            job: Job whose plan yielded the query.
            function: Function of the query.
        """
        context = job.context.copy()  # two threads cannot use one context at a time
        call = self._calls[job.id] = self._threads.submit(context.run, _call_without_grad, function)
        call.add_done_callback(lambda call: self._put(partial(self._end, job, call)))

    def abandon(self, job: Job[Any]) -> None:
        """Ignore the result of a job's function if there is one. A function that has not begun is not called."""
        call = self._calls.pop(job.id, None)
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """End the threads when the functions that they are calling have ended."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _end(self, job: Job[Any], call: Future[Any]) -> None:
        if self._calls.get(job.id) is call:  # not abandoned
            del self._calls[job.id]
            self._resume(job, call.result)


def _call_without_grad(function: Callable[[], T]) -> T:
    with torch.no_grad():  # as on the engine's thread
        return function()
