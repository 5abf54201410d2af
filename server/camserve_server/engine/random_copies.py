"""Random copies of networks: a limited number at a time, one for each request, in order of arrival."""

from __future__ import annotations

from typing import Any

import torch

from camserve_server.engine.job import Job
from camserve_server.errors import OutOfMemory
from camserve_server.models.randomise import RandomCopy
from camserve_server.plan import Randomise


class RandomCopyPool:
    """Limits the number of random copies and queues the requests that wait for one.

    All methods belong to the engine's thread.

    Args:
        max_copies: Largest number of copies at a time.
    """

    def __init__(self, max_copies: int) -> None:
        self._max_copies = max_copies
        self._holders: set[int] = set()  # ids of the jobs that have a copy
        self._waiting: dict[int, tuple[Job[Any], Randomise]] = {}

    def enqueue_if_full(self, job: Job[Any], query: Randomise) -> bool:
        """Queue the job if it needs a new copy and none is available or other jobs wait already.

        Args:
            job: Job whose plan yielded the query.
            query: Layers to randomise and the seed.

        Returns:
            True if the job has been queued.
        """
        new = bool(query.layers) and job.id not in self._holders
        waits = new and (bool(self._waiting) or len(self._holders) >= self._max_copies)
        if waits:
            self._waiting[job.id] = job, query
        return waits

    def pop_next(self) -> tuple[Job[Any], Randomise] | None:
        """Remove the first waiting job from the queue if a copy is available.

        Returns:
            The job and its query; None if no job waits or no copy is available.
        """
        if not self._waiting or len(self._holders) >= self._max_copies:
            return None
        return self._waiting.pop(next(iter(self._waiting)))

    def randomise(self, job: Job[Any], query: Randomise) -> None:
        """Randomise the layers of the query in the job's copy; for no layers, release the copy.

        Args:
            job: Job whose plan yielded the query; it receives a copy if it has none.
            query: Layers to randomise and the seed.

        Raises:
            OutOfMemory: A copy does not fit into the device's memory.
        """
        if not query.layers:
            self.release(job)
            return
        try:
            job.copy = job.copy or RandomCopy(job.model)
            self._holders.add(job.id)
            job.copy.randomise(query.layers, query.seed)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"a copy of {job.model.name} does not fit into the device's memory; "
                "leave out the randomisation metrics or use a device with more memory"
            ) from error

    def release(self, job: Job[Any]) -> bool:
        """Remove the job's copy and its place in the queue.

        Returns:
            True if the job had a copy.
        """
        self._waiting.pop(job.id, None)
        had, job.copy = job.copy is not None, None
        self._holders.discard(job.id)
        return had
