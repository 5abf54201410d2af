"""Threads that process the entries of a stage, oldest first, and retry temporary failures."""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path

import structlog

from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.spool import Spool, Stage, write_file

__all__ = ["PermanentFailure", "StageWorkers", "TemporaryFailure", "move_to_dead", "retry_delay_s"]

log = structlog.get_logger()

FIRST_RETRY_S, MAX_RETRY_S = 1.0, 300.0
# An operator may move entries into a stage by hand, which sets no event.
POLL_INTERVAL_S = 1.0


def retry_delay_s(failures: int) -> float:
    """Return the delay in seconds after a number of failures. It doubles with each failure, up to MAX_RETRY_S."""
    return min(FIRST_RETRY_S * 2.0 ** min(failures, 30), MAX_RETRY_S)  # 2.0 ** 1024 would raise OverflowError


class TemporaryFailure(Exception):
    """A step that failed now and may succeed later.

    Args:
        reason: The reason for the log. It has no value of a header.
        retry_after_s: Seconds until the next attempt. By default the delay doubles with each attempt.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class PermanentFailure(Exception):
    """A step that cannot succeed.

    Args:
        reason: The reason for the log and reason.json. It has no value of a header.
        details: Text for reason.json only, which may quote the header.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.details = details


class StageWorkers:
    """Threads that process the entries of one stage.

    Args:
        spool: The spool.
        stage: The stage to process.
        handle: Processes an entry and moves it to another stage or removes it. It raises TemporaryFailure or OSError
            to be called again later. After PermanentFailure or any other exception the entry moves to `dead`.
        audit: The audit trail.
        threads: Number of threads.
        isolate: Returns True for an entry that must be processed while no other entry is.

    Attributes:
        threads: The threads, which `start` starts.
    """

    def __init__(
        self,
        spool: Spool,
        stage: Stage,
        handle: Callable[[Path], None],
        audit: Audit,
        threads: int = 1,
        isolate: Callable[[Path], bool] = lambda entry: False,
    ) -> None:
        self._spool, self._stage, self._handle, self._audit = spool, stage, handle, audit
        self._isolate, self._running_isolated = isolate, False
        self._lock = threading.Lock()
        self._waiting: deque[Path] = deque()
        self._running: set[str] = set()
        self._retries: dict[str, tuple[float, int]] = {}  # monotonic time of the next attempt, number of failures
        self._arrived, self._stopped = spool.arrived[stage], threading.Event()
        self.threads = [threading.Thread(target=self._run, name=stage.value, daemon=True) for _ in range(threads)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Begin no further entry. Running entries continue; join the threads to wait for them."""
        self._stopped.set()
        self._arrived.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                entry = self._next_entry()
            except OSError as error:
                log.error("the spool cannot be read", errno=error.errno)
                entry = None
            if entry is None:
                self._arrived.wait(self._idle_s())
                if not self._stopped.is_set():  # after stop, the event must remain set for the other threads
                    self._arrived.clear()
                continue
            try:
                self._process(entry)
            finally:
                with self._lock:
                    self._running.discard(entry.name)

    def _next_entry(self) -> Path | None:
        """Return the next entry to process and mark it as running; None if there is nothing to do now."""
        with self._lock:
            entry = self._first_due_entry()
            if entry is None:
                entries = self._spool.entries(self._stage)
                self._waiting.extend(entries)
                names = {entry.name for entry in entries}
                self._retries = {name: retry for name, retry in self._retries.items() if name in names}
                entry = self._first_due_entry()
            if entry is None:
                return None
            isolated = self._isolate(entry)
            if self._running and (isolated or self._running_isolated):
                return None  # the entry stays first, so that no other entry overtakes it
            self._running_isolated = isolated
            self._running.add(entry.name)
            return self._waiting.popleft()

    def _first_due_entry(self) -> Path | None:
        """Return the first waiting entry that is due. Entries before it are dropped until the next scan."""
        while self._waiting:
            entry = self._waiting[0]
            not_before, _ = self._retries.get(entry.name, (0.0, 0))
            if entry.name not in self._running and not_before <= time.monotonic() and entry.exists():
                return entry
            self._waiting.popleft()
        return None

    def _idle_s(self) -> float:
        """Return the time in seconds until the next retry or scan."""
        now = time.monotonic()
        with self._lock:
            return min([POLL_INTERVAL_S, *(when - now for when, _ in self._retries.values() if when > now)])

    def _process(self, entry: Path) -> None:
        try:
            self._handle(entry)
        except PermanentFailure as failure:
            self._fail(entry, failure.reason, failure.details)
        except TemporaryFailure as failure:
            self._retry(entry, failure.reason, failure.retry_after_s)
        except OSError as error:
            if entry.exists():  # a report of the PACS may have moved the entry at the same time
                self._retry(entry, _os_error_reason(error), None)
        except Exception as error:
            if entry.exists():
                self._fail(entry, type(error).__name__, traceback.format_exc())
        else:
            with self._lock:
                self._retries.pop(entry.name, None)

    def _retry(self, entry: Path, reason: str, retry_after_s: float | None) -> None:
        """Schedule the next attempt."""
        with self._lock:
            _, failures = self._retries.get(entry.name, (0.0, 0))
            delay = retry_delay_s(failures) if retry_after_s is None else retry_after_s
            # A delay that the step requested is not a failure.
            self._retries[entry.name] = (time.monotonic() + delay, failures + (retry_after_s is None))
        log.info(
            "step will be retried", object=entry.name, stage=self._stage.value, reason=reason, wait_s=round(delay, 1)
        )

    def _fail(self, entry: Path, reason: str, details: str) -> None:
        """Move an entry to `dead`, or try it again later if that is not possible."""
        try:
            move_to_dead(self._spool, self._audit, entry, reason, details)
        except OSError as error:
            self._retry(entry, _os_error_reason(error), None)


def move_to_dead(spool: Spool, audit: Audit, entry: Path, reason: str, details: str = "") -> None:
    """Move an entry to `dead` with the reason. An operator can move it back to its stage by hand.

    Args:
        spool: The spool.
        audit: The audit trail.
        entry: The entry.
        reason: The reason for the audit trail and reason.json. It has no value of a header.
        details: Text for reason.json only, which may quote the header.
    """
    stage = entry.parent.name
    write_file(entry / "reason.json", {"stage": stage, "reason": reason, "details": details})
    audit.write("dead", object=entry.name, stage=stage, reason=reason)
    spool.move(entry, Stage.dead)


def _os_error_reason(error: OSError) -> str:
    """Return the type and number of an error. Its message may contain a path."""
    return f"{type(error).__name__} {error.errno or ''}".strip()
