"""The engine of a device or of a remote model: it admits requests and runs their plans on its thread.

Other threads submit plans and receive events and results through callbacks on the engine's thread. These callbacks must
not block.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog
import torch

from camserve_server.engine.admission import Admission, Caller, Claim, Priority
from camserve_server.engine.batch_loop import BatchLoop
from camserve_server.engine.interruption import Interruptible, Interruption
from camserve_server.engine.job import NO_LIMITS, Event, Job, Limits
from camserve_server.engine.reservation import Reservation, ignore_event
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import Plan
from camserve_server.torch_setup.device import CPU, check_device
from camserve_server.torch_setup.spinning import no_control, spin_control
from camserve_server.torch_setup.threads import compute_alone

UNNAMED = Caller()
_IDS = itertools.count(1)  # of requests; engines that share an admission need different ones
T = TypeVar("T")


class Engine:
    """Runs plans on one device, or on one remote model.

    Args:
        max_rows_owed: The limit of the rows that may wait; see Admission.
        admission: Admits the requests of several engines with one limit; None for an admission of this engine alone.
        batch_invariant: Pad each batch to the size of its lane, so that a result does not depend on other requests.
        max_copies: The most random copies of networks at a time. Each request has at most one; further requests wait.
        remote: Runs the forward passes of all batches on another server; None if this process runs them.
        name: The name of the thread.
        device: The name of the device if the server has several.

    Attributes:
        device: The name of the device; empty if the server has only one.
        counters: The totals of all batches.
        ended: Done when the engine's thread has ended; it carries an exception if the thread failed.
    """

    def __init__(
        self,
        *,
        max_rows_owed: int = 200_000,
        admission: Admission | None = None,
        batch_invariant: bool = True,
        max_copies: int = 2,
        remote: Interruptible | None = None,
        name: str = "engine",
        device: str = "",
    ) -> None:
        self.device = device
        self._admission = Admission(max_rows_owed) if admission is None else admission
        self._remote = remote is not None
        self._interruption = Interruption(remote)
        self._loop = BatchLoop(
            self._admission, self._interruption, batch_invariant=batch_invariant, max_copies=max_copies
        )
        self._torch_device = CPU
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.counters = self._loop.counters
        self.ended: Future[None] = Future()

    @property
    def working(self) -> bool:
        """False if the engine has been closed or its thread has failed."""
        return not self._loop.closed

    def start(self, device: torch.device = CPU) -> None:
        """Start the engine's thread. Set the number of threads of torch before.

        Args:
            device: The device of the models.
        """
        self._torch_device = device
        self._loop.spinning = no_control() if self._remote else spin_control(device)
        self._thread.start()

    def machine_was_busy(self, since: float) -> bool:
        """Return True if other processes slowed batches down after `since`, on the clock of `time.monotonic()`."""
        return self._loop.spinning.was_busy(since)

    def machine_was_idle(self, since: float) -> bool:
        """Return True if no other process slowed batches down after `since`, as far as that can be found out.

        On a GPU it cannot, so the answer is True. On a CPU, the answer is False if the batches are not observed.
        """
        observed = self._torch_device.type != "cpu" or self._loop.spinning.observes
        return observed and not self.machine_was_busy(since)

    @contextmanager
    def reserve(
        self, rows: int, limits: Limits = NO_LIMITS, caller: Caller = UNNAMED, priority: Priority = "normal"
    ) -> Iterator[Reservation]:
        """Admit a request and reserve its rows for the duration of the context.

        The reserved rows count as owed. If the context submits a plan, the rows belong to that job and end with it.
        Otherwise, the end of the context releases them, also after an error or a cancellation.

        Args:
            rows: The most rows that the request can take.
            limits: The limits of the request.
            caller: The sender of the request.
            priority: The priority that the scheduler applies.

        Yields:
            The reservation, under which a plan can be submitted once.

        Raises:
            Unavailable: The engine is closed.
            QueueFull: Too many rows run before this request, or its caller already owes too many.
            Expired: The rows cannot run before the deadline.
        """
        request = next(_IDS)
        claim = Claim(limits.within_budget(rows), limits.least, limits.rows_per_s, limits.deadline, caller, priority)
        self._admission.admit(request, claim, self._loop.rows_per_s, self.device)
        reservation = Reservation(request, rows, limits, priority, self._loop.submit)
        try:
            yield reservation
        finally:
            reservation.end()
            if reservation.job is None:
                self._admission.release(request)

    def submit(
        self,
        plan: Plan[T],
        model: Model,
        *,
        rows: int,
        limits: Limits = NO_LIMITS,
        batch_sizes: Mapping[LaneKind, int] | None = None,
        caller: Caller = UNNAMED,
        priority: Priority = "normal",
        notify: Callable[[Event], None] = ignore_event,
    ) -> Job[T]:
        """Reserve rows and submit a plan in one step.

        The arguments and errors are those of `reserve` and `Reservation.submit`.
        """
        with self.reserve(rows, limits, caller, priority) as reservation:
            return reservation.submit(plan, model, batch_sizes=batch_sizes, notify=notify)

    def cancel(self, job: Job[Any]) -> None:
        """Cancel a job before the next batch, or during a batch of a remote model that only cancelled jobs wait for.

        Its future then raises Cancelled.
        """
        self._interruption.cancel(job)
        self._loop.cancel(job)

    def run_between_batches(self, steps: Iterator[None]) -> Future[None]:
        """Run the steps of an iterator on the engine's thread, with batches of requests between them.

        Args:
            steps: An iterator; the engine runs other work after each item.

        Returns:
            A future that is done after the last step. It raises the exception of a step, or Unavailable if the engine
            closes first.
        """
        return self._loop.run_between_batches(steps)

    def check(self) -> Future[None]:
        """Check the device between batches. The engine ends if the device has failed.

        Call it after an unexpected error of another thread that uses the device: the engine's thread meets the error of
        a device only when it runs a batch.
        """
        return self.run_between_batches(self._checking())

    def close(self) -> None:
        """Refuse new requests, fail the running ones with Unavailable, and end the thread."""
        self._admission.close(self.device)
        self._loop.stop()
        self._interruption.close()
        if self._thread.is_alive():
            self._thread.join()

    def rows_owed(self) -> int:
        """Return the rows that all reserved and running requests still owe."""
        return self._admission.rows_owed(self.device)

    def seconds_owed(self) -> float:
        """Return the seconds that the engine needs for the rows that it owes."""
        return self._admission.seconds_owed(self._loop.rows_per_s, self.device)

    def _checking(self) -> Iterator[None]:
        check_device(self._torch_device)
        yield

    def _run(self) -> None:
        if self._remote:
            compute_alone()
        if self.device:
            structlog.contextvars.bind_contextvars(device=self.device)  # for log lines of this thread
        try:
            self._loop.run(self._torch_device)
        except BaseException as error:
            self._admission.close(self.device)
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)
