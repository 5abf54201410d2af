"""Batch sizes that are measured again after a load on a busy machine.

Measurements beside other processes can give a wrong batch size. The size of a loaded model does not change, because the
bits of its maps depend on it. A better one is used when the model is loaded again.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Mapping
from typing import get_args

import structlog

from camserve_server.config import ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.engine.warmup import measure_steps
from camserve_server.errors import CamserveError
from camserve_server.models.model import LaneKind, Model
from camserve_server.pool_entries import ModelUsers

FIRST_WAIT_S, LAST_WAIT_S = 30.0, 600.0  # until the next attempt to measure on an idle machine

log = structlog.get_logger()


class BatchSizes:
    """The batch sizes that a load does not need to measure. All methods belong to the event loop."""

    def __init__(self) -> None:
        self._measured: dict[tuple[str, str, str], dict[LaneKind, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def known(self, settings: ModelConfig, model: Model) -> Mapping[LaneKind, int]:
        """Return the batch sizes that are configured, or that were measured since an earlier load of these weights."""
        if settings.batch_size:
            return dict.fromkeys(get_args(LaneKind), settings.batch_size)
        return self._measured.get(_key(model), {})

    def measure_later(self, settings: ModelConfig, model: Model, engine: Engine, users: ModelUsers) -> None:
        """Measure the model again when the machine is idle, unless its batch sizes are known.

        Args:
            settings: The configuration of the model.
            model: The model. It can be unloaded in the meantime, which ends the measurement.
            engine: Runs the measurements between the batches of requests.
            users: The requests that use the model; a measurement counts as one of them.
        """
        for each in model.precisions.values():
            if not self.known(settings, each):
                task = asyncio.create_task(self._measure(weakref.ref(each), engine, users))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _measure(self, reference: weakref.ref[Model], engine: Engine, users: ModelUsers) -> None:
        wait_s, idle = FIRST_WAIT_S, False
        while not idle:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LAST_WAIT_S)
            model = reference()
            if model is None:
                return
            if not engine.rows_owed():
                idle = await self._measure_now(model, engine, users)
            del model

    async def _measure_now(self, model: Model, engine: Engine, users: ModelUsers) -> bool:
        """Measure a model. Return True if the machine was idle, so that the result counts."""
        started, sizes = time.monotonic(), dict[LaneKind, int]()
        leave = users.join()
        try:
            await asyncio.wrap_future(engine.run_between_batches(measure_steps(model, {}, sizes)))
        except CamserveError:  # the server shuts down, or the device has failed
            return True
        finally:
            leave()
        if engine.machine_was_busy(started):
            return False
        self._measured[_key(model)] = sizes
        log.info(
            "measured again on an idle machine",
            model=model.name,
            precision=model.precision,
            batch_sizes=model.batch_sizes,
            batch_sizes_of_the_next_load=sizes,
        )
        return True


def _key(model: Model) -> tuple[str, str, str]:
    return model.name, model.digest, model.precision
