"""Performer of workitems (IHE AI Workflow for Imaging): claims, retrieves images, and reports results.

A workitem is an entry in worklist/, see `claimed`. Its phases are claim, read and work, until it has an outcome. The
entry is written before the workitem is claimed. Each phase may be repeated, because the process may be killed.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import structlog
from pydicom import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from camserve_dicom.gateway import workers
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.claimed import Images, image_states, record_results, results_of
from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.intake import IN_PROGRESS, Intake, SpoolFull
from camserve_dicom.gateway.performed import Reason, canceled, completed, now, progress
from camserve_dicom.gateway.spool import WORKITEM_FILE, Spool, Stage, read_json, write_file
from camserve_dicom.gateway.workers import PermanentFailure, TemporaryFailure, move_to_dead
from camserve_dicom.gateway.workitems import ImageReference, Unreadable, Worklist, input_images
from camserve_dicom.gateway.worklist_config import WorklistConfig

__all__ = ["CALLER", "Performer"]

log = structlog.get_logger()

CALLER = "WORKLIST"
"""The sender of images of workitems in rules and in the audit trail."""
# Seconds until the gateway tries again to claim a workitem whose claim the worklist has refused.
REFUSED_S = 300.0


class Performer:
    """Thread that searches for workitems and performs them.

    Args:
        config: The configuration.
        worklist: Its `[worklist]` table.
        spool: The spool.
        audit: The audit trail.
        intake: Takes the images of workitems.

    Attributes:
        thread: The thread, which `start` starts.
    """

    def __init__(self, config: Config, worklist: WorklistConfig, spool: Spool, audit: Audit, intake: Intake) -> None:
        self._config, self._table, self._spool, self._audit, self._intake = config, worklist, spool, audit, intake
        self._worklist = Worklist(worklist, config.max_object_bytes)
        self._retries: dict[str, tuple[float, int]] = {}  # monotonic time of the next attempt, number of failures
        self._refused: dict[str, float] = {}  # monotonic time until which a workitem is not claimed
        self._reported: dict[str, int] = {}  # finished images that were reported
        self._next_search, self._failed_searches = 0.0, 0
        self._arrived, self._stopped = spool.arrived[Stage.worklist], threading.Event()
        self.thread = threading.Thread(target=self._run, name="worklist", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def stop(self) -> None:
        """Begin no further step. A running step continues; join the thread to wait for it."""
        self._stopped.set()
        self._arrived.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            has_news = self._arrived.is_set()
            self._arrived.clear()
            try:
                for entry in self._spool.entries(Stage.worklist):
                    if not self._stopped.is_set():
                        self._try_step(entry, has_news)
                if time.monotonic() >= self._next_search and not self._stopped.is_set():
                    self._search()
            except OSError as error:
                log.error("the spool cannot be read", errno=error.errno)
            if not self._stopped.is_set():
                self._arrived.wait(min(self._table.poll_s, workers.POLL_INTERVAL_S))

    def _search(self) -> None:
        """Search for workitems, and add an entry for each that is claimed next."""
        try:
            free = self._table.max_claimed - self._spool.count(Stage.worklist)
            for uid in self._worklist.search() if free > 0 else ():
                if free <= 0 or self._stopped.is_set():
                    break
                free -= self._add(uid)
        except (TemporaryFailure, PermanentFailure) as failure:
            requested_s = failure.retry_after_s if isinstance(failure, TemporaryFailure) else None
            delay = max(self._table.poll_s, requested_s or workers.retry_delay_s(self._failed_searches))
            self._failed_searches += 1
            log.warning("the worklist cannot be searched", reason=failure.reason, wait_s=round(delay, 1))
        except OSError:
            raise
        except Exception as error:  # an unexpected workitem can raise any exception in pydicom
            delay = max(self._table.poll_s, REFUSED_S)
            log.error("the worklist cannot be searched", reason=type(error).__name__, wait_s=delay)
        else:
            delay, self._failed_searches = self._table.poll_s, 0
        self._next_search = time.monotonic() + delay

    def _add(self, uid: str) -> bool:
        """Add an entry for a workitem. Return False if it is not suitable, or has an entry already."""
        name = self._spool.entry_name(f"workitem\n{uid}")
        if self._spool.is_in_progress(name) or self._refused.get(name, 0.0) > time.monotonic():
            return False
        try:
            workitem = self._worklist.retrieve(uid)
        except PermanentFailure as failure:
            log.warning("a workitem cannot be read", object=name, reason=failure.reason)
            self._refuse(name)
            return False
        except Unreadable as failure:  # it must not keep the gateway from claiming others
            log.warning("a workitem cannot be read", object=name, reason=failure.reason)
            return False
        if workitem is None or not self._worklist.is_suitable(workitem):
            return False
        record = {"workitem": uid, "transaction": str(generate_uid(None)), "phase": "claim"}
        return self._spool.add(name, {WORKITEM_FILE: json.dumps(record).encode()}, Stage.worklist)

    def _refuse(self, name: str) -> None:
        """Do not claim a workitem for REFUSED_S."""
        now_s = time.monotonic()
        self._refused = {each: until for each, until in self._refused.items() if until > now_s}
        self._refused[name] = now_s + REFUSED_S

    def _try_step(self, entry: Path, has_news: bool) -> None:
        """Perform the next step of a workitem if it is due, or if its images have news."""
        not_before, failures = self._retries.get(entry.name, (0.0, 0))
        if time.monotonic() < not_before and not (has_news and failures == 0):
            return
        try:
            wait_s, failures = self._step(entry, read_json(entry / WORKITEM_FILE)), 0
        except PermanentFailure as failure:
            move_to_dead(self._spool, self._audit, entry, failure.reason, failure.details)
            return
        except (TemporaryFailure, OSError) as failure:  # the archive, the worklist or the disk
            reason = failure.reason if isinstance(failure, TemporaryFailure) else type(failure).__name__
            requested_s = failure.retry_after_s if isinstance(failure, TemporaryFailure) else None
            wait_s, failures = requested_s or workers.retry_delay_s(failures), failures + 1
            log.info(
                "step will be retried", object=entry.name, stage="worklist", reason=reason, wait_s=round(wait_s, 1)
            )
        except Exception as error:  # an unexpected workitem can raise any exception in pydicom
            move_to_dead(self._spool, self._audit, entry, type(error).__name__, traceback.format_exc())
            return
        if entry.exists():
            self._retries[entry.name] = (time.monotonic() + wait_s, failures)
        else:
            self._retries.pop(entry.name, None)
            self._reported.pop(entry.name, None)

    def _step(self, entry: Path, record: dict[str, Any]) -> float:
        """Perform a step of a workitem, and return the seconds until the next one.

        Raises:
            TemporaryFailure: If the worklist or the archive is not available.
            PermanentFailure: If the worklist refuses the outcome.
        """
        if record["phase"] == "claim" and not self._claim(entry, record):
            return 0.0
        workitem = self._worklist.retrieve(record["workitem"])
        state = _state(workitem)
        if workitem is not None and state == "IN PROGRESS":
            if "outcome" not in record and not self._work(entry, record, workitem):
                return self._table.poll_s
            refusal = self._finish(record)
            state = _state(self._worklist.retrieve(record["workitem"])) if refusal else record["outcome"]
            if refusal and state == "IN PROGRESS":
                raise PermanentFailure(refusal)
        if state != record.get("outcome"):  # others have canceled it
            self._audit.write_once("workitem lost", object=entry.name, state=state)
            self._spool.remove(entry)
            return 0.0
        self._audit.write_once(
            f"workitem {record['outcome'].lower()}",
            object=entry.name,
            reason=record["reason"],
            results=record["results"],
        )
        self._spool.remove(entry)
        return 0.0

    def _claim(self, entry: Path, record: dict[str, Any]) -> bool:
        """Claim a workitem. Return False, and remove its entry, if the worklist refuses that."""
        uid, transaction = record["workitem"], record["transaction"]
        # The response of an earlier attempt may have been lost. Only the performer that claimed the workitem may then
        # change it, because only this performer knows the Transaction UID.
        if not self._worklist.change_state(uid, transaction, "IN PROGRESS") and not self._worklist.update(
            uid, transaction, progress(0, "claimed")
        ):
            self._refuse(entry.name)
            self._audit.write_once("workitem not claimed", object=entry.name)
            self._spool.remove(entry)
            return False
        record |= {"phase": "read", "began": now()}
        self._audit.write_once("workitem claimed", object=entry.name)
        write_file(entry / WORKITEM_FILE, record)
        return True

    def _work(self, entry: Path, record: dict[str, Any], workitem: Dataset) -> bool:
        """Retrieve images and report progress. Return True if the workitem has an outcome now."""
        if record["phase"] == "read":
            try:
                self._read(entry, workitem)
            except PermanentFailure as failure:
                self._decide(
                    entry, record, "CANCELED", failure.reason, canceled(0, Reason.bad_references, failure.reason)
                )
                return True
            record["phase"] = "work"
            write_file(entry / WORKITEM_FILE, record)
        delayed: TemporaryFailure | None = None
        for name in image_states(self._spool, entry).to_retrieve:
            if self._stopped.is_set():
                return False
            try:
                self._retrieve(entry, name)
            except TemporaryFailure as error:
                delayed = error
                break
        images = image_states(self._spool, entry)
        if images.left:
            self._report(entry, record, images)
            if delayed is not None:
                raise delayed
            return False
        self._decide_from(entry, record, workitem, images)
        return True

    def _report(self, entry: Path, record: dict[str, Any], images: Images) -> None:
        """Report the progress of a workitem if it has changed."""
        finished = images.total - images.left
        if self._reported.get(entry.name) != finished:
            text = f"{finished} of {images.total} images are finished"
            changes = progress(100 * finished // images.total, text)
            if self._worklist.update(record["workitem"], record["transaction"], changes):
                self._reported[entry.name] = finished

    def _read(self, entry: Path, workitem: Dataset) -> None:
        """Write a file for each image of the workitem."""
        images = input_images(workitem)
        if not images:
            raise PermanentFailure("the workitem has no input")
        if len(images) > self._table.max_images:
            raise PermanentFailure(f"the workitem has more than {self._table.max_images} images")
        for each in images:
            write_file(entry / "images" / self._spool.entry_name(each.sop_instance), each._asdict(), new_folder=True)

    def _retrieve(self, entry: Path, name: str) -> None:
        """Retrieve an image, and add it to the inbox."""
        notified = self._spool.folder(Stage.notify) / name
        if notified.exists():  # the PACS has the results already
            record_results(self._spool, notified)
            return
        image = ImageReference(**read_json(entry / "images" / name))
        try:
            header, part10 = self._worklist.retrieve_image(image)
            dropped = self._intake.add(header, part10, CALLER)
        except PermanentFailure as failure:
            self._audit.write_once("not retrieved", object=name, workitem=entry.name, reason=failure.reason)
            write_file(entry / "failed" / name, {"reason": failure.reason}, new_folder=True)
        except SpoolFull as error:
            raise TemporaryFailure("the spool is full") from error
        else:
            kind = "added" if dropped in (None, IN_PROGRESS) else "skipped"
            write_file(entry / kind / name, {"reason": dropped}, new_folder=True)

    def _decide_from(self, entry: Path, record: dict[str, Any], workitem: Dataset, images: Images) -> None:
        """Write the outcome of a workitem whose images are finished."""
        results = results_of(entry, images.done)
        failed = len(images.failed) + len(images.not_retrieved)
        text = f"{len(images.done)} of {images.total} images have results, {len(images.skipped)} are not selected"
        changes = completed(workitem, self._config, record["began"], results, self._worklist.retrieve_url, text)
        if not failed and results:
            self._decide(entry, record, "COMPLETED", text, changes, len(results))
            return
        code: Code = Reason.not_supported
        if failed:
            code = Reason.not_retrieved if images.not_retrieved else Reason.failed
            text += f", {len(images.not_retrieved)} could not be retrieved, {len(images.failed)} could not be explained"
        reason = canceled(100 * (images.total - failed) // images.total, code, text)
        changes.ProcedureStepProgressInformationSequence = reason.ProcedureStepProgressInformationSequence
        self._decide(entry, record, "CANCELED", text, changes, len(results))

    def _decide(
        self, entry: Path, record: dict[str, Any], outcome: str, reason: str, changes: Dataset, results: int = 0
    ) -> None:
        """Write the outcome, so that the same one is sent after an interruption."""
        record |= {"outcome": outcome, "reason": reason, "results": results, "changes": changes.to_json_dict()}
        write_file(entry / WORKITEM_FILE, record)

    def _finish(self, record: dict[str, Any]) -> str | None:
        """Send the outcome. Return a text if the worklist refuses it."""
        uid, transaction, outcome = record["workitem"], record["transaction"], record["outcome"]
        if not self._worklist.update(uid, transaction, Dataset.from_json(record["changes"])):
            return "the worklist refuses the attributes of the outcome"
        if not self._worklist.change_state(uid, transaction, outcome):
            return f"the worklist refuses the state {outcome}"
        return None


def _state(workitem: Dataset | None) -> str:
    """Return the state of a workitem; "deleted" if the worklist does not have it."""
    return "deleted" if workitem is None else str(workitem.ProcedureStepState)
