"""The steps of an entry: explain the image, store the results, request storage commitment.

A step may be repeated, because the process may be killed at any time.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from pathlib import Path

from pydicom import dcmread
from pydicom.uid import generate_uid

from camserve import errors
from camserve.client import Client
from camserve_dicom.explaining import explain
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.notifications import finish, write_messages
from camserve_dicom.gateway.pacs import DimsePacs, Pacs, sop_reference
from camserve_dicom.gateway.spool import Spool, Stage, move_file, read_json, write_file
from camserve_dicom.gateway.studies import Studies, file_bytes
from camserve_dicom.gateway.workers import PermanentFailure, TemporaryFailure

__all__ = ["CommitmentStep", "ExplanationStep", "StorageStep", "was_interrupted"]

# An object that crashes the process, for example in a decoder, must not do so forever. The limit is high, because the
# process may also be killed for other reasons.
MAX_INTERRUPTIONS = 10
# This file exists while an entry is explained.
BEGUN = "begun.json"
MAX_FAILED_COMMITMENTS = 3
# Marks a result in results/ that the PACS has and the audit trail does not record yet. The status follows.
STORED_MARK = ".stored-"
# An internal error of the server may be temporary, or caused by the image.
MAX_SERVER_ERRORS = 10
# Seconds that an association stays open for the report of a commitment. Later reports come in their own association.
REPORT_WAIT_S = 1.0
# Errors that do not depend on the object. They pass, or an operator corrects their cause.
_TEMPORARY_ERRORS = (
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.Cancelled,
    errors.Unauthenticated,
    errors.PermissionDenied,
)


class ExplanationStep:
    """Explains the object of an entry, and moves the entry from inbox to outbox."""

    def __init__(self, config: Config, spool: Spool, audit: Audit, client: Client, studies: Studies) -> None:
        self._config, self._spool, self._audit, self._client = config, spool, audit, client
        self._studies = studies

    def __call__(self, entry: Path) -> None:
        """Explain the object.

        Raises:
            TemporaryFailure: If the disk is almost full, or the server is not available.
            PermanentFailure: If the object cannot be explained.
        """
        if self._spool.free_bytes() < self._config.min_free_bytes:
            raise TemporaryFailure(
                "the disk has less free space than min_free_bytes"
            )  # the rest is reserved for steps of other entries
        interruptions = int(read_json(entry / BEGUN).get("times", 0))
        if interruptions >= MAX_INTERRUPTIONS:
            (entry / BEGUN).unlink()  # an operator may move the entry back
            raise PermanentFailure(f"the process ended {interruptions} times while it explained the object")
        write_file(entry / BEGUN, {"times": interruptions + 1})
        try:
            self._explain(entry)
        finally:
            (entry / BEGUN).unlink(missing_ok=True)  # after a success it is deleted already

    def _explain(self, entry: Path) -> None:
        source = entry / "source.dcm"
        header = dcmread(source, stop_before_pixels=True)
        rule = self._config.rule(header, read_json(entry / "entry.json").get("caller", ""))
        if rule is None:  # the configuration changed after the object was received
            self._audit.write("dropped", object=entry.name, reason="no rule")
            self._spool.remove(entry)
            return
        started = time.monotonic()
        try:
            made = explain(
                self._client,
                source,
                pdf_fonts=self._config.pdf_fonts,
                class_codes=self._config.class_codes,
                **rule.explain_arguments(),
            )
        except _TEMPORARY_ERRORS as error:
            raise TemporaryFailure(type(error).__name__, error.retry_after_s) from error
        except errors.ResourceExhausted as error:
            if error.retry_after_s is None:
                raise PermanentFailure(error.reason or type(error).__name__, str(error)) from error
            raise TemporaryFailure(type(error).__name__, error.retry_after_s) from error
        except errors.CamserveError as error:
            # A status code without a class of its own may be temporary, too.
            if isinstance(error, errors.InternalError) or type(error) is errors.CamserveError:
                failures = int(read_json(entry / "failed.json").get("times", 0)) + 1
                # The count restarts at 0 after the last failure, because an operator may move the entry back.
                write_file(entry / "failed.json", {"times": failures % MAX_SERVER_ERRORS})
                if failures < MAX_SERVER_ERRORS:
                    raise TemporaryFailure(type(error).__name__) from error
            raise PermanentFailure(error.reason or type(error).__name__, str(error)) from error
        seconds = round(time.monotonic() - started, 3)
        shutil.rmtree(entry / "results", ignore_errors=True)  # an interrupted attempt may have left some
        for kind, each in made.objects.items():
            write_file(entry / "results" / f"{kind}.dcm", file_bytes(each), new_folder=True)
        self._studies.add_explained(entry.name, made)
        write_messages(self._config, self._spool, entry, made)
        self._audit.write(
            "withheld" if made.withheld else "explained",
            object=entry.name,
            results=[self._spool.entry_name(each.SOPInstanceUID) for each in made.objects.values()],
            model_digest=made.explanation.receipt.model_digest,
            input_digest=made.explanation.receipt.input_digest,
            method=made.explanation.receipt.method,
            seconds=seconds,
            **({"reason": made.withheld} if made.withheld else {}),
            **({"warnings": made.warnings} if made.warnings else {}),
        )
        (entry / BEGUN).unlink()
        self._spool.move(entry, Stage.outbox)


def was_interrupted(entry: Path) -> bool:
    """Return True if the process ended while it explained the entry, because of this entry or a concurrent one."""
    return (entry / BEGUN).exists()


class StorageStep:
    """Stores the results of an entry and moves it to stored, or removes it if storage commitment is not requested."""

    def __init__(self, config: Config, spool: Spool, audit: Audit, pacs: Pacs) -> None:
        self._requests_commitment = config.pacs.requests_commitment
        self._spool, self._audit, self._pacs = spool, audit, pacs

    def __call__(self, entry: Path) -> None:
        """Store the results that the PACS does not have yet.

        Raises:
            TemporaryFailure: If the PACS is not available.
            PermanentFailure: If the PACS refuses a result, or reported failed commitments repeatedly.
        """
        failures = int(read_json(entry / "uncommitted.json").get("times", 0))
        if failures >= MAX_FAILED_COMMITMENTS:
            (entry / "uncommitted.json").unlink()  # an operator may move the entry back
            raise PermanentFailure(f"the PACS reported a failed commitment {failures} times")
        self._record_stored(entry)  # the process was killed, or could not write, after the PACS had taken a result
        files = sorted((entry / "results").glob("*.dcm"))
        try:
            if files:
                self._pacs.store(files, _mark_stored)
        finally:
            self._record_stored(entry)
        if self._requests_commitment and (entry / "sent").exists():
            self._spool.move(entry, Stage.stored)
        else:
            finish(self._spool, entry)

    def _record_stored(self, entry: Path) -> None:
        """Write each marked result to the audit trail, and move it to sent/."""
        for file in sorted((entry / "results").glob(f"*.dcm{STORED_MARK}*")):
            name, _, status = file.name.partition(STORED_MARK)
            self._audit.write_once(
                "stored",
                object=entry.name,
                result=self._spool.entry_name(sop_reference(file).ReferencedSOPInstanceUID),
                digest=f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}",
                status=status,
            )
            move_file(file, entry / "sent" / name)


def _mark_stored(file: Path, status: int) -> None:
    """Mark a result as stored in its file name, so that it is not stored again. A full disk has room for a rename."""
    move_file(file, file.with_name(f"{file.name}{STORED_MARK}{status:#06x}"))


class CommitmentStep:
    """Requests storage commitment, and removes the entry, or moves it back to outbox if the PACS lacks a result.

    Attributes:
        pacs: The PACS. It is set after creation, because the PACS needs the receiver, which needs this step.
    """

    def __init__(self, config: Config, spool: Spool, audit: Audit) -> None:
        self._timeout_s, self._spool, self._audit = config.pacs.commitment_timeout_s, spool, audit
        self._lock = threading.Lock()
        self._reported = threading.Condition(self._lock)
        self.pacs: DimsePacs | None = None
        # Transaction UIDs of this process. The report on an earlier request may have come while no process ran.
        self._requested: set[str] = set()
        # Entries by Transaction UID. The PACS may report on requests of an earlier process.
        self._transactions = {
            request["transaction"]: entry
            for entry in spool.entries(Stage.stored)
            if (request := read_json(entry / "transaction.json"))
        }

    def __call__(self, entry: Path) -> None:
        """Request the commitment, unless the report on an earlier request of this process may still come.

        Raises:
            TemporaryFailure: If the report has not come yet, or the PACS is not available.
            PermanentFailure: If the PACS refuses the request.
        """
        assert self.pacs is not None
        if any((entry / "results").glob("*.dcm")):  # the process was killed while it moved results back
            (entry / "transaction.json").unlink(missing_ok=True)
            self._spool.move(entry, Stage.outbox)
            return
        request = read_json(entry / "transaction.json")
        left_s = request.get("time", 0.0) + self._timeout_s - time.time()
        if request.get("transaction") in self._requested and 0 < left_s <= self._timeout_s:
            raise TemporaryFailure("waiting for the commitment report of the PACS", left_s)
        transaction = str(generate_uid(None))
        self._requested = {*self._requested - {request.get("transaction")}, transaction}
        write_file(entry / "transaction.json", {"transaction": transaction, "time": time.time()})
        with self._lock:  # earlier transactions of the entry remain, because the PACS may report late
            self._transactions[transaction] = entry
        files = sorted((entry / "sent").glob("*.dcm"))
        try:
            self.pacs.request_commitment(files, transaction, lambda: self._wait_for_report(transaction))
        except (TemporaryFailure, PermanentFailure):
            with self._lock:
                if self._transactions.pop(transaction, None) is None:
                    return  # the PACS has reported before the association failed
            (entry / "transaction.json").unlink(missing_ok=True)
            raise
        with self._lock:  # a result that the PACS lacked may be stored again already, so the entry may be back
            waiting = transaction in self._transactions
        if waiting:
            raise TemporaryFailure("waiting for the commitment report of the PACS", self._timeout_s)

    def _wait_for_report(self, transaction: str) -> None:
        with self._reported:
            self._reported.wait_for(lambda: transaction not in self._transactions, REPORT_WAIT_S)

    def handle_report(self, transaction: str, committed: list[str], failed: dict[str, int]) -> bool:
        """Process a commitment report of the PACS.

        Args:
            transaction: Transaction UID.
            committed: SOP Instance UIDs that the PACS is committed to.
            failed: Failure reasons by SOP Instance UID.

        Returns:
            False if the transaction is unknown or was reported already.
        """
        with self._reported:  # two reports may arrive concurrently
            entry = self._transactions.get(transaction)
            if entry is None or not entry.exists():
                return False
            missing = [
                file
                for file in sorted((entry / "sent").glob("*.dcm"))
                if sop_reference(file).ReferencedSOPInstanceUID not in set(committed) - failed.keys()
            ]
            if not missing and not any((entry / "results").glob("*.dcm")):
                self._audit.write_once("committed", object=entry.name)
                finish(self._spool, entry)
            else:
                self._store_again(entry, missing, sorted(set(failed.values())))
            self._transactions = {uid: other for uid, other in self._transactions.items() if other != entry}
            self._reported.notify_all()
            return True

    def _store_again(self, entry: Path, missing: list[Path], reasons: list[int]) -> None:
        """Move results back to results/, and the entry to outbox."""
        failures = int(read_json(entry / "uncommitted.json").get("times", 0)) + 1
        write_file(entry / "uncommitted.json", {"times": failures})
        self._audit.write(
            "not committed", object=entry.name, results=len(missing), reasons=[f"{each:#06x}" for each in reasons]
        )
        for file in missing:
            move_file(file, entry / "results" / file.name)
        (entry / "transaction.json").unlink(missing_ok=True)
        self._spool.move(entry, Stage.outbox)
