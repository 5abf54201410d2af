"""Early end of batches that another server runs: at their deadline, or when nobody waits for them any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from camserve_server.engine.job import Job
from camserve_server.engine.outcomes import caller_cancelled, shut_down
from camserve_server.errors import CamserveError


class Interruptible(Protocol):
    """The runner of forward passes that can end before they are complete."""

    def begin(self, deadline: float | None) -> None:
        """Let forward passes fail at the deadline, a time on the clock of `time.monotonic()`; None for no deadline."""
        ...

    def interrupt(self, error: CamserveError) -> None:
        """Let the running forward pass, and those until `end`, raise the error. Any thread may call it."""
        ...

    def end(self) -> None:
        """Undo `begin` and `interrupt`."""
        ...


class Interruption:
    """Interrupts the batches of an engine.

    Args:
        remote: Runs the forward passes of all batches; None if this process runs them, which cannot be interrupted.
    """

    def __init__(self, remote: Interruptible | None) -> None:
        self._remote = remote
        self._lock = threading.Lock()
        self._jobs: Sequence[Job[Any]] = ()
        self._closed = False

    @contextmanager
    def running(self, jobs: Sequence[Job[Any]]) -> Iterator[None]:
        """Run a batch of these jobs in the context.

        The batch ends at the latest of their deadlines, unless one job has none, and when all of them are cancelled.
        """
        if self._remote is None:
            yield
            return
        deadlines = [job.limits.deadline for job in jobs]
        known = [each for each in deadlines if each is not None]
        with self._lock:
            self._jobs = jobs
            self._remote.begin(max(known) if len(known) == len(jobs) else None)
            self._interrupt()  # the jobs may have been cancelled before
        try:
            yield
        finally:
            with self._lock:
                self._jobs = ()
                self._remote.end()

    def cancel(self, job: Job[Any]) -> None:
        """Note that a job is cancelled, and interrupt the batch if all of its jobs are. Any thread may call it."""
        with self._lock:
            job.cancelled = True
            self._interrupt()

    def close(self) -> None:
        """Interrupt the running batch and all later ones with Unavailable. Any thread may call it."""
        with self._lock:
            self._closed = True
            self._interrupt()

    def _interrupt(self) -> None:
        if self._remote is None:
            return
        if self._closed:
            self._remote.interrupt(shut_down())
        elif self._jobs and all(job.cancelled for job in self._jobs):
            self._remote.interrupt(caller_cancelled())
