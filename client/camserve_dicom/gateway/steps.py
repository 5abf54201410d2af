"""The steps of an entry from the inbox to its end: explain, store, have it committed. Each may be done twice."""

from __future__ import annotations

import hashlib
import io
import shutil
import threading
import time
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from camserve import errors
from camserve.client import Client
from camserve_dicom.explaining import explain
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.pacs import Dimse, Pacs, references
from camserve_dicom.gateway.receiver import described
from camserve_dicom.gateway.spool import Spool, Stage, load, move_file, save
from camserve_dicom.gateway.workers import Dead, Later

__all__ = ["Commitment", "Delivery", "Explaining", "suspect"]

# An object that ends the process, by a decoder's crash for instance, must not do so for ever. What is killed for other
# reasons is hardly killed so often while it explains the same object, and nothing else.
MOST_BEGUN = 10
BEGUN = "begun.json"
MOST_UNCOMMITTED = 3
# In the name of a result that the PACS has, before the status: the audit trail does not say so yet.
STORED = ".stored-"
# A fault of the server may be its own, and pass, or the image's.
MOST_FAILED = 10
# How long an association is held open for the answer to a storage commitment; later ones come in their own.
ANSWER_WAIT_S = 1.0
# What passes by itself, or by an operator's hand, without the object being to blame.
_PASSING = (
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.Cancelled,
    errors.Unauthenticated,
    errors.PermissionDenied,
)


class Explaining:
    """Inbox to outbox."""

    def __init__(self, config: Config, spool: Spool, audit: Audit, client: Client) -> None:
        self._config, self._spool, self._audit, self._client = config, spool, audit, client

    def __call__(self, entry: Path) -> None:
        """Explains what is in the entry. Raises Later or Dead."""
        if self._spool.free_bytes() < self._config.min_free_bytes:
            raise Later("the disk is full")  # what is left is for results that are there
        begun = int(load(entry / BEGUN).get("times", 0))
        if begun >= MOST_BEGUN:
            (entry / BEGUN).unlink()  # so that it can be tried again by hand
            raise Dead(f"it was begun {begun} times and never ended")
        save(entry / BEGUN, {"times": begun + 1})
        try:
            self._explain(entry)
        finally:
            (entry / BEGUN).unlink(missing_ok=True)  # gone already where all went well

    def _explain(self, entry: Path) -> None:
        source = entry / "source.dcm"
        header = dcmread(source, stop_before_pixels=True)
        rule = self._config.rule(*described(header), load(entry / "entry.json").get("caller", ""))
        if rule is None:  # there was one when it came in
            self._audit.write("dropped", object=entry.name, reason="no rule")
            self._spool.remove(entry)
            return
        started = time.monotonic()
        try:
            made = explain(self._client, source, **rule.asked())
        except _PASSING as error:
            raise Later(type(error).__name__, error.retry_after_s) from error
        except errors.ResourceExhausted as error:
            if error.retry_after_s is None:
                raise Dead(error.reason or type(error).__name__, str(error)) from error
            raise Later(type(error).__name__, error.retry_after_s) from error
        except errors.CamserveError as error:
            # Of a code without a class of its own nobody knows what it means.
            if isinstance(error, errors.InternalError) or type(error) is errors.CamserveError:
                failed = int(load(entry / "failed.json").get("times", 0)) + 1
                save(entry / "failed.json", {"times": failed % MOST_FAILED})  # so that it can be tried again by hand
                if failed < MOST_FAILED:
                    raise Later(type(error).__name__) from error
            raise Dead(error.reason or type(error).__name__, str(error)) from error
        seconds = round(time.monotonic() - started, 3)
        shutil.rmtree(entry / "results", ignore_errors=True)  # of an earlier time, to which the process was killed
        for kind, each in made.objects.items():
            save(entry / "results" / f"{kind}.dcm", _bytes(each))
        self._audit.write(
            "withheld" if made.withheld else "explained",
            object=entry.name,
            results=[self._spool.name(each.SOPInstanceUID) for each in made.objects.values()],
            model_digest=made.explanation.receipt.model_digest,
            input_digest=made.explanation.receipt.input_digest,
            method=made.explanation.receipt.method,
            seconds=seconds,
        )
        (entry / BEGUN).unlink()
        self._spool.move(entry, Stage.outbox)


def suspect(entry: Path) -> bool:
    """Whether the process ended while it explained the entry: by its fault, or that of what was explained beside it."""
    return (entry / BEGUN).exists()


class Delivery:
    """Outbox to stored or, where no commitment is asked for, to the end."""

    def __init__(self, config: Config, spool: Spool, audit: Audit, pacs: Pacs) -> None:
        self._commits, self._spool, self._audit, self._pacs = config.pacs.commits, spool, audit, pacs

    def __call__(self, entry: Path) -> None:
        """Stores what is not stored yet. Raises Later or Dead."""
        times = int(load(entry / "uncommitted.json").get("times", 0))
        if times >= MOST_UNCOMMITTED:
            (entry / "uncommitted.json").unlink()  # so that it can be tried again by hand
            raise Dead(f"the PACS did not commit itself {times} times")
        self._tell(entry)  # of what was stored before the process was killed, or nothing could be written
        files = sorted((entry / "results").glob("*.dcm"))
        try:
            if files:
                self._pacs.store(files, _mark)
        finally:
            self._tell(entry)
        if self._commits and (entry / "sent").exists():
            self._spool.move(entry, Stage.stored)
        else:
            self._spool.remove(entry)

    def _tell(self, entry: Path) -> None:
        for file in sorted((entry / "results").glob(f"*.dcm{STORED}*")):
            name, _, status = file.name.partition(STORED)
            self._audit.write_once(
                "stored",
                object=entry.name,
                result=self._spool.name(references(file).ReferencedSOPInstanceUID),
                digest=f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}",
                status=status,
            )
            move_file(file, entry / "sent" / name)


def _mark(file: Path, status: int) -> None:
    """Keeps in mind that it is stored by its name alone, for which a full disk has room: it is not stored again."""
    move_file(file, file.with_name(f"{file.name}{STORED}{status:#06x}"))


class Commitment:
    """Stored to the end, or back to the outbox for what the PACS does not have after all."""

    def __init__(self, config: Config, spool: Spool, audit: Audit) -> None:
        self._timeout_s, self._spool, self._audit = config.pacs.commitment_timeout_s, spool, audit
        self._lock = threading.Lock()
        self.pacs: Dimse | None = None
        # Those that were asked for before the process was started may be answered now.
        self._asked = {
            asked["transaction"]: entry
            for entry in spool.entries(Stage.stored)
            if (asked := load(entry / "transaction.json"))
        }

    def __call__(self, entry: Path) -> None:
        """Asks for the commitment, unless an answer may still come. Raises Later or Dead."""
        assert self.pacs is not None
        if any((entry / "results").glob("*.dcm")):  # killed while what the PACS lacks was taken back
            (entry / "transaction.json").unlink(missing_ok=True)
            self._spool.move(entry, Stage.outbox)
            return
        asked = load(entry / "transaction.json")
        left_s = asked.get("time", 0.0) + self._timeout_s - time.time()
        if 0 < left_s <= self._timeout_s:
            raise Later("the answer of the PACS is awaited", left_s)
        transaction = str(generate_uid(None))
        save(entry / "transaction.json", {"transaction": transaction, "time": time.time()})
        with self._lock:  # an answer to an earlier one may come yet: archives take their time
            self._asked[transaction] = entry
        try:
            self.pacs.commit(sorted((entry / "sent").glob("*.dcm")), transaction, lambda: self._wait(transaction))
        except (Later, Dead):
            with self._lock:
                self._asked.pop(transaction, None)
            (entry / "transaction.json").unlink(missing_ok=True)
            raise
        if entry.exists():
            raise Later("the answer of the PACS is awaited", self._timeout_s)

    def _wait(self, transaction: str) -> None:
        until = time.monotonic() + ANSWER_WAIT_S
        while transaction in self._asked and time.monotonic() < until:
            time.sleep(0.02)

    def answered(self, transaction: str, there: list[str], failed: dict[str, int]) -> bool:
        """What the PACS says. False where it was not asked for that, or has said so before."""
        with self._lock:  # the two could come at once
            entry = self._asked.get(transaction)
            if entry is None or not entry.exists():
                return False
            lacking = [
                file
                for file in sorted((entry / "sent").glob("*.dcm"))
                if references(file).ReferencedSOPInstanceUID not in set(there) - failed.keys()
            ]
            if not lacking and not any((entry / "results").glob("*.dcm")):
                self._audit.write_once("committed", object=entry.name)
                self._spool.remove(entry)
            else:
                self._store_again(entry, lacking, sorted(set(failed.values())))
            self._asked = {each: of for each, of in self._asked.items() if of != entry}
            return True

    def _store_again(self, entry: Path, lacking: list[Path], reasons: list[int]) -> None:
        times = int(load(entry / "uncommitted.json").get("times", 0)) + 1
        save(entry / "uncommitted.json", {"times": times})
        self._audit.write(
            "not committed", object=entry.name, results=len(lacking), reasons=[f"{each:#06x}" for each in reasons]
        )
        for file in lacking:
            move_file(file, entry / "results" / file.name)
        (entry / "transaction.json").unlink(missing_ok=True)
        self._spool.move(entry, Stage.outbox)


def _bytes(made: Dataset) -> bytes:
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()
