"""Who may have a random copy of a network: as many as fit, one a request, the first come first."""

from __future__ import annotations

from typing import Any

import torch

from camserve_server.engine.job import Job
from camserve_server.errors import OutOfMemory
from camserve_server.models.randomise import RandomCopy
from camserve_server.plan import Randomise


class Copies:
    """At most `most` at a time. Belongs to the engine's thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: set[int] = set()  # by these jobs
        self._waiting: dict[int, tuple[Job[Any], Randomise]] = {}

    def must_wait(self, job: Job[Any], query: Randomise) -> bool:
        """Whether it would be one copy too many, or others came first; then the job is in the line."""
        new = bool(query.layers) and job.id not in self._held
        waits = new and (bool(self._waiting) or len(self._held) >= self._most)
        if waits:
            self._waiting[job.id] = job, query
        return waits

    def next(self) -> tuple[Job[Any], Randomise] | None:
        """Who has waited longest, if there may be another copy; it is in the line no longer."""
        if not self._waiting or len(self._held) >= self._most:
            return None
        return self._waiting.pop(next(iter(self._waiting)))

    def randomise(self, job: Job[Any], query: Randomise) -> None:
        """What the query asks for, in the job's own copy; for no layers the copy goes.

        Raises OutOfMemory if there is no room for one.
        """
        if not query.layers:
            self.free(job)
            return
        try:
            job.copy = job.copy or RandomCopy(job.model)
            self._held.add(job.id)
            job.copy.randomise(query.layers, query.seed)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"a copy of {job.model.name} does not fit into the device's memory") from error

    def free(self, job: Job[Any]) -> bool:
        """The job has no copy from here on, and waits for none. Says whether it had one."""
        self._waiting.pop(job.id, None)
        had, job.copy = job.copy is not None, None
        self._held.discard(job.id)
        return had
