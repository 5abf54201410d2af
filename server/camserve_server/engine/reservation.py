"""Rows that the engine keeps for a request while its image is decoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from camserve_server.engine.admission import WEIGHTS, Priority
from camserve_server.engine.job import Event, Job, Limits
from camserve_server.engine.lanes.dispatch import merged_sizes
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import Plan

T = TypeVar("T")


def ignore_event(event: Event) -> None:
    """Do nothing with an event."""


class Reservation:
    """Rows of one request that admission has accepted.

    `Engine.reserve` creates it. The rows count as owed until the reservation ends, or until the end of the job that
    `submit` starts.

    Args:
        request: The identifier of the request in the engine.
        rows: The most rows that the request can take.
        limits: The limits of the request.
        priority: The priority of the request.
        start: Hands a job to the engine's thread.
    """

    def __init__(
        self, request: int, rows: int, limits: Limits, priority: Priority, start: Callable[[Job[Any]], None]
    ) -> None:
        self.job: Job[Any] | None = None
        self._request = request
        self._rows = rows
        self._limits = limits
        self._priority = priority
        self._start = start
        self._ended = False

    def submit(
        self,
        plan: Plan[T],
        model: Model,
        *,
        batch_sizes: Mapping[LaneKind, int] | None = None,
        notify: Callable[[Event], None] = ignore_event,
    ) -> Job[T]:
        """Start the plan of the request. The reserved rows belong to the returned job from then on.

        Args:
            plan: A generator that usually takes at most as many rows as were reserved.
            model: The model that answers the queries of the plan.
            batch_sizes: Batch sizes by kind of lane that replace those of the model (`merged_sizes`).
            notify: Receives the events of the request on the engine's thread; it must not block.

        Returns:
            The job; its future gives the result of the plan.

        Raises:
            Unavailable: The engine has been closed since the reservation.
            RuntimeError: The reservation has ended or already belongs to a job.
        """
        if self._ended or self.job is not None:
            raise RuntimeError("the reservation has ended or already belongs to a job; reserve rows for each request")
        job = Job(
            id=self._request,
            plan=plan,
            model=model,
            future=Future[T](),
            notify=notify,
            rows_owed=self._rows,
            limits=self._limits,
            submitted=time.monotonic(),
            batch_sizes=merged_sizes(model.batch_sizes, batch_sizes or {}),
            weight=WEIGHTS[self._priority],
        )
        self._start(job)
        self.job = job
        return job

    def end(self) -> None:
        """Refuse submissions from now on."""
        self._ended = True
