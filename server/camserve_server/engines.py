"""The engines of a server: one for each of its own devices, and one for each loaded remote model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import structlog
import torch

from camserve_server.config import Config
from camserve_server.engine.admission import Admission
from camserve_server.engine.counters import LaneCounters, LaneKey
from camserve_server.engine.engine import Engine
from camserve_server.engine.interruption import Interruptible
from camserve_server.engine.outcomes import shut_down
from camserve_server.torch_setup.device import pick_devices

log = structlog.get_logger()


class Engines:
    """The engines of a server. Any thread may call the methods.

    Args:
        config: The configuration of the server.

    Attributes:
        devices: The devices of this machine that hold models, by name.
        local: Their engines in the same order, which share an admission control.
        failed: Done when the server cannot go on: no engine of `local` works any more, or that of a remote model has
            failed. It carries the exception of the thread.
        on_device_failure: Is called with the name of a device whose engine has failed while others still work.

    Raises:
        ConfigError: The configuration names a device that does not exist.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._remote: list[Engine] = []
        self._ended: dict[LaneKey, LaneCounters] = {}  # the totals of the engines that have been closed
        self._closed = False
        self.failed: Future[None] = Future()
        self.on_device_failure: Callable[[str], None] = lambda name: None
        self.devices = pick_devices(config.device)
        admission = Admission(config.max_rows_owed)
        self.local = tuple(self._local_engine(name, admission) for name in self.devices)

    @property
    def several_devices(self) -> bool:
        """True if the server has more than one device of its own."""
        return len(self.devices) > 1

    def start(self) -> None:
        """Set the number of threads of torch, and start the engines of the devices."""
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        elif self.local[0].device and self._config.device.startswith("cpu"):  # several engines share the cores
            torch.set_num_threads(max(1, torch.get_num_threads() // len(self.local)))
        for engine, device in zip(self.local, self.devices.values(), strict=True):
            engine.start(device)

    def working(self) -> dict[Engine, torch.device]:
        """Return the engines of the devices that work, each with its device, in the configured order."""
        pairs = zip(self.local, self.devices.values(), strict=True)
        return {engine: device for engine, device in pairs if engine.working}

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
        engine = Engine(
            max_rows_owed=self._config.max_rows_owed,
            batch_invariant=self._config.batch_invariant,
            remote=remote,
            name=f"engine-{model}",
        )
        engine.ended.add_done_callback(self._note_end)
        with self._lock:
            if self._closed:
                raise shut_down()
            self._remote.append(engine)
        engine.start()
        return engine

    def close_remote(self, engine: Engine) -> None:
        """Close an engine of a remote model, and wait for the end of its thread. Engines of devices stay open.

        Args:
            engine: The engine of a model that is unloaded.
        """
        if engine in self.local:
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
        for engine in (*self.local, *remote):
            engine.close()

    @property
    def max_rows_owed(self) -> int:
        """The limit of the admission."""
        return self._config.max_rows_owed

    def rows_owed(self) -> int:
        """Return the rows that the requests of all engines still owe."""
        with self._lock:
            return sum(engine.rows_owed() for engine in (*self.local, *self._remote))

    def seconds_owed(self) -> float:
        """Return the seconds that the engines need for the rows that they owe.

        This is the mean of the devices that work, because they share the requests, plus the sum of the engines of
        remote models.
        """
        local = sum(engine.seconds_owed() for engine in self.local) / max(1, len(self.working()))
        with self._lock:
            return local + sum(engine.seconds_owed() for engine in self._remote)

    def lanes(self) -> dict[LaneKey, LaneCounters]:
        """Return the totals of the batches of all engines since the start of the server."""
        totals: dict[LaneKey, LaneCounters] = {}
        with self._lock:
            for key, counted in self._ended.items():
                totals.setdefault(key, LaneCounters()).add(counted)
            for engine in (*self.local, *self._remote):
                _add(totals, engine)
        return totals

    def _local_engine(self, name: str, admission: Admission) -> Engine:
        several = self.several_devices
        engine = Engine(
            admission=admission,
            batch_invariant=self._config.batch_invariant,
            name=f"engine-{name}" if several else "engine",
            device=name if several else "",
        )
        engine.ended.add_done_callback(partial(self._note_end, name=name))
        return engine

    def _note_end(self, ended: Future[None], name: str = "") -> None:
        """Note the end of an engine. `name` is the name of its device; empty for a remote model."""
        error = ended.exception()
        if error is None:
            return
        if name and (others := self.working()):
            log.error("a device failed; the others go on", device=name, others=[each.device for each in others])
            self.on_device_failure(name)
            return
        with self._lock:
            if not self.failed.done():
                self.failed.set_exception(error)


def _add(totals: dict[LaneKey, LaneCounters], engine: Engine) -> None:
    for key, counted in [*engine.counters.lanes.items()]:
        totals.setdefault(key, LaneCounters()).add(counted)
