"""The gateway as a process: start, shutdown and cleanup."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector

from camserve.client import Client
from camserve.errors import InvalidArgument
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config, ConfigError, ServerConfig
from camserve_dicom.gateway.intake import Intake
from camserve_dicom.gateway.logs import log_to_stderr
from camserve_dicom.gateway.monitor import AssociationCollector, Monitor, SpoolCollector
from camserve_dicom.gateway.notifications import NotificationStep
from camserve_dicom.gateway.pacs import DimsePacs, Pacs, StowPacs
from camserve_dicom.gateway.performer import Performer
from camserve_dicom.gateway.receiver import Receiver
from camserve_dicom.gateway.spool import Spool, Stage
from camserve_dicom.gateway.steps import CommitmentStep, ExplanationStep, StorageStep, was_interrupted
from camserve_dicom.gateway.studies import Studies, StudyReporter
from camserve_dicom.gateway.workers import StageWorkers, move_to_dead

__all__ = ["Gateway", "run"]

log = structlog.get_logger()

CLEANUP_INTERVAL_S = 600.0


def run(config: Config, ready: Callable[[str], None]) -> None:
    """Run the gateway until SIGTERM or SIGINT. A second signal ends the process immediately.

    Args:
        config: The configuration.
        ready: Called with the addresses when the gateway accepts objects.

    Raises:
        ConfigError: If the configuration is invalid, or an address or the spool is not available.
    """
    log_to_stderr(config.log_level)
    config.check_files()
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():  # the second signal
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stopped.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stop)
    gateway = Gateway(config)
    try:
        ready(gateway.open())
        while not stopped.wait(CLEANUP_INTERVAL_S):
            gateway.clean_up()
    finally:
        gateway.close()


class Gateway:
    """The parts of the gateway, which run between `open` and `close`.

    Args:
        config: The configuration.

    Raises:
        ConfigError: If the spool or a file of the configuration cannot be used.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._registry = CollectorRegistry()
        self._spool = Spool(config.spool)
        self._audit = Audit(config.spool / "audit.jsonl", self._registry)
        self._client = _connect(config.server)
        commitment = CommitmentStep(config, self._spool, self._audit)
        self._studies = Studies(config, self._spool)
        intake = Intake(config, self._spool, self._audit, self._studies)
        self._receiver = Receiver(config, self._audit, intake, commitment.handle_report)
        pacs: Pacs
        if config.pacs.stow_url is None:
            pacs = commitment.pacs = DimsePacs(config, self._receiver.commitment_report)
        else:
            pacs = StowPacs(config.pacs)
        explanation = ExplanationStep(config, self._spool, self._audit, self._client, self._studies)
        self._reporter = StudyReporter(config, self._spool, self._audit, self._studies)
        self._performer: Performer | None = None
        if config.worklist is not None:
            self._performer = Performer(config, config.worklist, self._spool, self._audit, intake)
        storage = StorageStep(config, self._spool, self._audit, pacs)
        self._workers = [
            StageWorkers(self._spool, Stage.inbox, explanation, self._audit, config.workers, was_interrupted),
            StageWorkers(self._spool, Stage.outbox, storage, self._audit),
            StageWorkers(self._spool, Stage.notify, NotificationStep(config, self._spool, self._audit), self._audit),
        ]
        if config.pacs.requests_commitment:
            self._workers.append(StageWorkers(self._spool, Stage.stored, commitment, self._audit))
        self._monitor: Monitor | None = None
        associations = AssociationCollector(lambda: self._receiver.listener)
        for collector in (SpoolCollector(self._spool), associations, ProcessCollector(registry=None)):
            self._registry.register(collector)

    def open(self) -> str:
        """Start to listen and to process the spool.

        Returns:
            The addresses of the listeners and the AE title, as text.

        Raises:
            ConfigError: If an address is not available.
        """
        self.clean_up()
        addresses = [f"{self._receiver.open()} as {self._config.ae_title}"]
        if self._config.monitor_listen is not None:
            self._monitor = Monitor(self._config.monitor_listen, self._registry, self._problems)
            addresses.append(f"monitored on {self._monitor.address}")
        for workers in self._workers:
            workers.start()
        self._reporter.start()
        if self._performer is not None:
            self._performer.start()
        return ", ".join(addresses)

    def close(self) -> None:
        """Stop listening, and wait up to grace_s for running steps. The next start repeats unfinished steps."""
        self._receiver.close()
        for workers in self._workers:
            workers.stop()
        self._reporter.stop()
        if self._performer is not None:
            self._performer.stop()
        deadline = time.monotonic() + self._config.grace_s
        for thread in self._threads():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._client.close()  # cancels explanations that still run
        if self._monitor is not None:
            self._monitor.close()
        self._spool.close()

    def clean_up(self) -> None:
        """Move entries older than retention_h to `dead`, and delete studies and entries in `dead` of this age."""
        retention_s = self._config.retention_h * 3600
        oldest = time.time() - retention_s
        try:
            self._studies.clean_up(oldest)
        except OSError as error:
            log.info("studies not cleaned up", errno=error.errno)
        for stage in Stage:
            try:
                entries = [*self._spool.entries_with_times(stage)]
            except OSError as error:  # such as too many open files, which must not end the gateway
                log.error("the spool cannot be read", errno=error.errno)
                continue
            for entry, changed in entries:
                # Images of a workitem move first. The workitem is then canceled, which may take a while.
                if changed > (oldest - retention_s if stage is Stage.worklist else oldest):
                    continue
                try:
                    if stage is Stage.dead:
                        self._audit.write_once("deleted", object=entry.name)
                        self._spool.remove(entry)
                    else:
                        move_to_dead(self._spool, self._audit, entry, "the entry is older than retention_h")
                except OSError as error:  # a step moved the entry at the same time
                    log.info("entry not cleaned up", object=entry.name, errno=error.errno)

    def _threads(self) -> list[threading.Thread]:
        """Return the threads that were started."""
        threads = [thread for workers in self._workers for thread in workers.threads]
        if self._performer is not None:
            threads.append(self._performer.thread)
        return [thread for thread in (*threads, self._reporter.thread) if thread.ident]

    def _problems(self) -> list[str]:
        """Return a text for each condition that keeps the gateway from working."""
        problems = []
        if self._spool.free_bytes() < self._config.min_free_bytes:
            problems.append("the spool's disk has less free space than min_free_bytes")
        if self._spool.count(Stage.inbox) >= self._config.max_waiting:
            problems.append("too many objects wait")
        if self._receiver.listener is not None and self._receiver.listener.is_saturated:
            problems.append("max_associations associations are open")
        if not all(thread.is_alive() for thread in self._threads()):
            problems.append("a thread has ended")
        return problems


def _connect(server: ServerConfig) -> Client:
    """Return a client of the camserve server; raise ConfigError if its configuration is invalid."""
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
