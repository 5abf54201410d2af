"""The gateway as a process: its parts, from start to end."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from prometheus_client import CollectorRegistry, ProcessCollector

from camserve.client import Client
from camserve.errors import InvalidArgument
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config, ConfigError, ServerConfig
from camserve_dicom.gateway.logs import log_to_stderr
from camserve_dicom.gateway.monitor import Gauges, Monitor
from camserve_dicom.gateway.pacs import Dimse, Pacs, Stow
from camserve_dicom.gateway.receiver import Receiver
from camserve_dicom.gateway.spool import Spool, Stage
from camserve_dicom.gateway.steps import Commitment, Delivery, Explaining, suspect
from camserve_dicom.gateway.workers import Work, give_up

__all__ = ["Gateway", "run"]

log = logging.getLogger(__name__)

TIDY_EVERY_S = 600.0


def run(config: Config, ready: Callable[[str], None]) -> None:
    """Works until SIGTERM or SIGINT; calls `ready` with what it listens on. Raises ConfigError."""
    log_to_stderr(config.log_level)
    config.check_files()
    over = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if over.is_set():  # the second one
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        over.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)
    gateway = Gateway(config)
    try:
        ready(gateway.open())
        while not over.wait(TIDY_EVERY_S):
            gateway.tidy()
    finally:
        gateway.close()


class Gateway:
    """Listens and works from `open` to `close`. Raises ConfigError."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._registry = CollectorRegistry()
        self._spool = Spool(config.spool)
        self._audit = Audit(config.spool / "audit.jsonl", self._registry)
        self._client = _client(config.server)
        commitment = Commitment(config, self._spool, self._audit)
        self._receiver = Receiver(config, self._spool, self._audit, commitment.answered)
        pacs: Pacs
        if config.pacs.stow_url is None:
            pacs = commitment.pacs = Dimse(config, self._receiver.answered)
        else:
            pacs = Stow(config.pacs)
        explaining = Explaining(config, self._spool, self._audit, self._client)
        delivery = Delivery(config, self._spool, self._audit, pacs)
        self._works = [
            Work(self._spool, Stage.inbox, explaining, self._audit, config.workers, suspect),
            Work(self._spool, Stage.outbox, delivery, self._audit),
            *[Work(self._spool, Stage.stored, commitment, self._audit)] * config.pacs.commits,
        ]
        self._monitor: Monitor | None = None
        for collector in (Gauges(self._spool), ProcessCollector(registry=None)):
            self._registry.register(collector)

    def open(self) -> str:
        """Begins; says where it listens."""
        self.tidy()
        where = [f"{self._receiver.open()} as {self._config.ae_title}"]
        if self._config.monitor_listen is not None:
            self._monitor = Monitor(self._config.monitor_listen, self._registry, self._wrong)
            where.append(f"monitored on {self._monitor.address}")
        for work in self._works:
            work.start()
        return ", ".join(where)

    def close(self) -> None:
        """Takes nothing more, finishes what runs within the grace period, and leaves the rest to the next start."""
        self._receiver.close()
        for work in self._works:
            work.stop()
        until = time.monotonic() + self._config.grace_s
        for thread in [thread for work in self._works for thread in work.threads if thread.ident]:
            thread.join(max(0.0, until - time.monotonic()))
        self._client.close()  # what still runs is cancelled, and begun anew by the next start
        if self._monitor is not None:
            self._monitor.close()
        self._spool.close()

    def tidy(self) -> None:
        """Gives up what has waited too long, and deletes what was given up so long ago."""
        oldest = time.time() - self._config.retention_h * 3600
        for stage in Stage:
            for entry, since in self._spool.changed(stage):
                if since > oldest:
                    continue
                try:
                    if stage is Stage.dead:
                        self._audit.write_once("deleted", object=entry.name)
                        self._spool.remove(entry)
                    else:
                        give_up(self._spool, self._audit, entry, "it has waited for too long")
                except OSError as error:  # its step was done meanwhile
                    log.info("not tidied", extra={"said": {"object": entry.name, "errno": error.errno}})

    def _wrong(self) -> list[str]:
        wrong = []
        if self._spool.free_bytes() < self._config.min_free_bytes:
            wrong.append("the spool's disk is full")
        if self._spool.count(Stage.inbox) >= self._config.max_waiting:
            wrong.append("too many objects wait")
        if not all(thread.is_alive() for work in self._works for thread in work.threads):
            wrong.append("a thread has ended")
        return wrong


def _client(server: ServerConfig) -> Client:
    """Raises ConfigError."""
    try:
        token = server.token_file.read_text().strip() if server.token_file else None
        return Client(
            server.address,
            timeout=server.timeout_s,
            tls=server.tls,
            ca=server.ca,
            certificate=server.certificate,
            key=server.key,
            token=token,
        )
    except InvalidArgument as error:
        key = "token_file" if error.field == "token" else error.field
        raise ConfigError(f"server.{key}: {error.message}") from error
    except OSError as error:
        raise ConfigError(f"server: {error}") from error
