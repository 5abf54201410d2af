"""The engines of a server: one for the models of its own device, and one for each loaded remote model."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from camserve_server.config import Config
from camserve_server.engine.counters import LaneCounters, LaneKey
from camserve_server.engine.engine import Engine
from camserve_server.engine.interruption import Interruptible
from camserve_server.engine.outcomes import shut_down


class Engines:
    """The engines of a server. Any thread may call the methods.

    Args:
        config: The configuration of the server.

    Attributes:
        common: The engine of all models of this device.
        failed: Done when the thread of an engine has failed; it carries the exception.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._remote: list[Engine] = []
        self._ended: dict[LaneKey, LaneCounters] = {}  # the totals of the engines that have been closed
        self._closed = False
        self.failed: Future[None] = Future()
        self.common = self._engine("engine", None)

    def start_remote(self, model: str, remote: Interruptible) -> Engine:
        """Start an engine for a remote model.

        Args:
            model: The name of the model.
            remote: Runs the forward passes.

        Returns:
            The engine; `close_remote` ends it.

        Raises:
            Unavailable: The server shuts down.
        """
        engine = self._engine(f"engine-{model}", remote)
        with self._lock:
            if self._closed:
                raise shut_down()
            self._remote.append(engine)
        engine.start()
        return engine

    def close_remote(self, engine: Engine) -> None:
        """Close an engine of a remote model, and wait for the end of its thread. The common engine stays open.

        Args:
            engine: The engine of a model that is unloaded.
        """
        if engine is self.common:
            return
        engine.close()
        with self._lock:
            if engine in self._remote:
                self._remote.remove(engine)
                _add(self._ended, engine)

    def close(self) -> None:
        """Close all engines, and wait for the ends of their threads."""
        with self._lock:
            self._closed, remote = True, [*self._remote]
        for engine in (self.common, *remote):
            engine.close()

    def rows_owed(self) -> int:
        """Return the rows that the requests of all engines still owe."""
        with self._lock:
            return sum(engine.rows_owed() for engine in (self.common, *self._remote))

    def seconds_owed(self) -> float:
        """Return the seconds that the engines need for the rows that they owe, all engines together."""
        with self._lock:
            return sum(engine.seconds_owed() for engine in (self.common, *self._remote))

    def lanes(self) -> dict[LaneKey, LaneCounters]:
        """Return the totals of the batches of all engines since the start of the server."""
        totals: dict[LaneKey, LaneCounters] = {}
        with self._lock:
            for key, counted in self._ended.items():
                totals.setdefault(key, LaneCounters()).add(counted)
            for engine in (self.common, *self._remote):
                _add(totals, engine)
        return totals

    def _engine(self, name: str, remote: Interruptible | None) -> Engine:
        engine = Engine(
            max_rows_owed=self._config.max_rows_owed,
            batch_invariant=self._config.batch_invariant,
            remote=remote,
            name=name,
        )
        engine.ended.add_done_callback(self._note_end)
        return engine

    def _note_end(self, ended: Future[None]) -> None:
        error = ended.exception()
        with self._lock:
            if error is not None and not self.failed.done():
                self.failed.set_exception(error)


def _add(totals: dict[LaneKey, LaneCounters], engine: Engine) -> None:
    for key, counted in [*engine.counters.lanes.items()]:
        totals.setdefault(key, LaneCounters()).add(counted)
