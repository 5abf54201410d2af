"""Threads that work through a stage of the spool, oldest entry first; what fails for now is tried again later."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path

from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.spool import Spool, Stage, save

__all__ = ["Dead", "Later", "Work", "give_up"]

log = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
# Entries may also be put into a stage by hand.
LOOK_AGAIN_S = 1.0


def wait_s(tried: int) -> float:
    """How long to wait after so many tries that failed: twice as long from try to try, up to a bound."""
    return min(FIRST_WAIT_S * 2.0 ** min(tried, 30), LONGEST_WAIT_S)  # a power of thousands is no float


class Later(Exception):
    """It cannot be done now. `reason` is for the log; without `after_s` the wait doubles from try to try."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = after_s


class Dead(Exception):
    """It can never be done. `reason` is for the log, `details`, which may be out of the header, for reason.json."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.details = details


class Work:
    """`handle` moves an entry on, or raises Later or Dead. Whatever else it raises is Dead, but for OSError.

    While it has an entry that is `suspect` it has no other.
    """

    def __init__(
        self,
        spool: Spool,
        stage: Stage,
        handle: Callable[[Path], None],
        audit: Audit,
        threads: int = 1,
        suspect: Callable[[Path], bool] = lambda entry: False,
    ) -> None:
        self._spool, self._stage, self._handle, self._audit = spool, stage, handle, audit
        self._suspect, self._alone = suspect, False
        self._lock = threading.Lock()
        self._found: deque[Path] = deque()
        self._busy: set[str] = set()
        self._later: dict[str, tuple[float, int]] = {}  # not before, and how often it was tried
        self._arrived, self._over = spool.arrived[stage], threading.Event()
        self.threads = [threading.Thread(target=self._run, name=stage.value, daemon=True) for _ in range(threads)]

    def start(self) -> None:
        """Begins."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Takes no further entry; `join` the threads for those under way."""
        self._over.set()
        self._arrived.set()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                entry = self._next()
            except OSError as error:
                log.error("the spool cannot be read", extra={"said": {"errno": error.errno}})
                entry = None
            if entry is None:
                self._arrived.wait(self._idle_s())
                if not self._over.is_set():  # which the other threads shall see, too
                    self._arrived.clear()
                continue
            try:
                self._try(entry)
            finally:
                with self._lock:
                    self._busy.discard(entry.name)

    def _next(self) -> Path | None:
        with self._lock:
            entry = self._due()
            if entry is None:
                entries = self._spool.entries(self._stage)
                self._found.extend(entries)
                there = {entry.name for entry in entries}
                self._later = {name: when for name, when in self._later.items() if name in there}
                entry = self._due()
            if entry is None:
                return None
            suspect = self._suspect(entry)
            if self._busy and (suspect or self._alone):
                return None  # what was found stays so: nobody overtakes it
            self._alone = suspect
            self._busy.add(entry.name)
            return self._found.popleft()

    def _due(self) -> Path | None:
        """The first that was found and can be done now. Those before it are dropped, to be found again."""
        while self._found:
            entry = self._found[0]
            not_before, _ = self._later.get(entry.name, (0.0, 0))
            if entry.name not in self._busy and not_before <= time.monotonic() and entry.exists():
                return entry
            self._found.popleft()
        return None

    def _idle_s(self) -> float:
        """How long there may be nothing to do."""
        now = time.monotonic()
        with self._lock:
            return min([LOOK_AGAIN_S, *(when - now for when, _ in self._later.values() if when > now)])

    def _try(self, entry: Path) -> None:
        try:
            self._handle(entry)
        except Dead as dead:
            self._give_up(entry, dead.reason, dead.details)
        except Later as later:
            self._put_off(entry, later.reason, later.after_s)
        except OSError as error:
            if entry.exists():  # or it has been moved on meanwhile, by an answer of the PACS
                self._put_off(entry, f"{type(error).__name__} {error.errno or ''}".strip(), None)
        except Exception as error:
            if entry.exists():
                self._give_up(entry, type(error).__name__, traceback.format_exc())
        else:
            with self._lock:
                self._later.pop(entry.name, None)

    def _put_off(self, entry: Path, reason: str, after_s: float | None) -> None:
        with self._lock:
            _, tried = self._later.get(entry.name, (0.0, 0))
            wait = wait_s(tried) if after_s is None else after_s
            # A wait that was asked for is no failure.
            self._later[entry.name] = (time.monotonic() + wait, tried + (after_s is None))
        said = {"object": entry.name, "stage": self._stage.value, "reason": reason, "wait_s": round(wait, 1)}
        log.info("later", extra={"said": said})

    def _give_up(self, entry: Path, reason: str, details: str) -> None:
        try:
            give_up(self._spool, self._audit, entry, reason, details)
        except OSError as error:
            self._put_off(entry, f"{type(error).__name__} {error.errno or ''}".strip(), None)


def give_up(spool: Spool, audit: Audit, entry: Path, reason: str, details: str = "") -> None:
    """Brings an entry to the dead ones, with the reason; moved back to its stage by hand, it is tried again."""
    stage = entry.parent.name
    save(entry / "reason.json", {"stage": stage, "reason": reason, "details": details})
    audit.write("dead", object=entry.name, stage=stage, reason=reason)
    spool.move(entry, Stage.dead)
