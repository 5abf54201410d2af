"""Studies: which images were received and explained, and the report of a study that is complete.

The spool has a folder for each study, which is named by a hash of its UID:

    images/       a file for each image: "received" before it is explained, and what the report says about it afterwards
    left_out/     an empty file for each image that was left out because the study had `max_images`
    not_selected/ an empty file for each image that no rule selects
    header.dcm    attributes of patient and study
    reports.json  the reports that were made. A report is recorded before its entry is added to outbox, so that the same
                  report is made again if the process is killed in between.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog
from pydicom import Dataset, dcmread

from camserve_dicom.explaining import DicomExplanation
from camserve_dicom.gateway import workers
from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.notifications import study_messages
from camserve_dicom.gateway.spool import STUDY_FILE, Spool, Stage, read_json, write_file
from camserve_dicom.study_report import ExplainedImage, Reference, patient_and_study, study_objects

__all__ = ["Studies", "StudyReporter", "file_bytes"]

log = structlog.get_logger()

_FOLDERS = ("images", "left_out", "not_selected")


class Studies:
    """The folders of studies.

    Args:
        config: The configuration. Without `[study]`, nothing is recorded.
        spool: The spool.
    """

    def __init__(self, config: Config, spool: Spool) -> None:
        self._config, self._spool = config.study, spool
        self._lock = threading.Lock()

    def add_received(self, study_uid: str, entry: str) -> bool:
        """Record an image before it is added to the inbox.

        Args:
            study_uid: Study Instance UID. An image without one is not recorded, because it cannot be explained.
            entry: Name of the image in the spool.

        Returns:
            False if the image is left out, because the study has `max_images` already.
        """
        if self._config is None or not study_uid:
            return True
        with self._lock:
            path = self._image_path(study_uid, entry)
            if path.exists():  # the image is sent again
                return True
            limit = self._config.max_images
            if limit is not None and _count(path.parent) >= limit:
                _write_mark(path.parent.parent / "left_out" / entry)
                return False
            write_file(path, {"state": "received"}, new_folder=True)
            (path.parent.parent / "not_selected" / entry).unlink(missing_ok=True)  # the rules have changed
            return True

    def add_not_selected(self, study_uid: str, entry: str) -> None:
        """Record an image that no rule selects.

        Args:
            study_uid: Study Instance UID.
            entry: Name of the image in the spool.
        """
        if self._config is None or not study_uid:
            return
        with self._lock:
            path = self._image_path(study_uid, entry)
            if not path.exists():
                _write_mark(path.parent.parent / "not_selected" / entry)

    def add_explained(self, entry: str, made: DicomExplanation) -> None:
        """Record an explanation before its entry moves to outbox.

        Args:
            entry: Name of the image in the spool.
            made: The explanation.
        """
        if self._config is None or made.derivation is None:
            return
        source = made.image.source
        image = ExplainedImage.of(made.derivation, made.objects)
        with self._lock:
            path = self._image_path(str(source.StudyInstanceUID), entry)
            header = path.parent.parent / "header.dcm"
            if not header.exists():
                write_file(header, file_bytes(patient_and_study(source)))
            write_file(path, {"state": "explained", "image": image.to_json()}, new_folder=True)

    def _image_path(self, study_uid: str, entry: str) -> Path:
        """Return the path of the file of an image. The folder of its study is created if necessary."""
        folder = self._spool.studies / self._spool.entry_name(study_uid)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / "images" / f"{entry}.json"

    def folders(self) -> list[tuple[Path, float]]:
        """Return the folder of each study, with the Unix time in seconds when an image was recorded last."""
        return [*self._dated_folders()]

    def _dated_folders(self) -> Iterator[tuple[Path, float]]:
        for folder in sorted(self._spool.studies.iterdir()):
            # Each record is renamed into a folder, which changes the time of the folder.
            times = [time_of for name in _FOLDERS if (time_of := _change_time(folder / name)) is not None]
            # Without a record, the process was killed before it wrote one.
            yield folder, min(max(times, default=folder.stat().st_mtime), time.time())

    def clean_up(self, oldest: float) -> None:
        """Delete the folders of studies without a new image since a Unix time in seconds."""
        with self._lock:
            for folder, changed in self.folders():
                if changed <= oldest:
                    self._spool.remove(folder)


class StudyReporter:
    """Thread that makes the report of each complete study.

    A study is complete when no image has been recorded for `quiet_s`, or when `expected_images` are explained; and when
    all results of its images are stored or have failed. If further images are explained later, another report follows,
    which names the earlier one as predecessor.

    Args:
        config: The configuration.
        spool: The spool, which takes the reports.
        audit: The audit trail.
        studies: The studies.

    Attributes:
        thread: The thread, which `start` starts.
    """

    def __init__(self, config: Config, spool: Spool, audit: Audit, studies: Studies) -> None:
        self._config, self._spool, self._audit, self._studies = config, spool, audit, studies
        self._stopped = threading.Event()
        self._finished: dict[str, float] = {}  # time of the last image of each study that needs no report now
        self._retries: dict[str, tuple[float, int]] = {}  # monotonic time of the next attempt, number of failures
        self.thread = threading.Thread(target=self._run, name="studies", daemon=True)

    def start(self) -> None:
        """Start the thread, if the configuration has [study]."""
        if self._config.study is not None:
            self.thread.start()

    def stop(self) -> None:
        """Begin no further report; join the thread to wait for the current one."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(workers.POLL_INTERVAL_S):
            try:
                studies = self._studies.folders()
            except OSError as error:
                log.error("the spool cannot be read", errno=error.errno)
                continue
            names = {folder.name for folder, _ in studies}
            self._finished = {name: each for name, each in self._finished.items() if name in names}
            self._retries = {name: each for name, each in self._retries.items() if name in names}
            for folder, changed in studies:
                if self._stopped.is_set():
                    return
                self._try(folder, changed)

    def _try(self, folder: Path, changed: float) -> None:
        """Make the report of a study if it needs one now, and try again later if that fails."""
        not_before, failures = self._retries.get(folder.name, (0.0, 0))
        if self._finished.get(folder.name) == changed or time.monotonic() < not_before:
            return
        try:
            if self._report_if_complete(folder, changed):
                self._finished[folder.name] = changed
                self._retries.pop(folder.name, None)
        except Exception as error:  # an unusual header can raise any exception in highdicom and pydicom
            delay = workers.retry_delay_s(failures)
            self._retries[folder.name] = (time.monotonic() + delay, failures + 1)
            reason = type(error).__name__
            log.error("report of a study failed", study=folder.name, reason=reason, wait_s=round(delay, 1))

    def _report_if_complete(self, folder: Path, changed: float) -> bool:
        """Return False if the study is not complete. Otherwise make its report, unless it has one already."""
        assert self._config.study is not None
        reports = list(read_json(folder / "reports.json").get("reports", []))
        if reports and not reports[-1]["added"]:  # the process was killed before it had added the entry
            self._add(folder, reports)
        is_quiet = time.time() - changed >= self._config.study.quiet_s
        if (not is_quiet and self._config.study.expected_images is None) or self._is_in_progress(folder):
            return False
        images = {path.stem: read_json(path) for path in sorted((folder / "images").glob("*.json"))}
        if not is_quiet and not self._has_expected(images):
            return False
        explained = {name: each["image"] for name, each in images.items() if each["state"] == "explained"}
        if explained and not (reports and reports[-1]["results"] == _result_uids(explained)):
            texts = self._counts(folder, images)
            reports.append({"images": [*explained], "texts": texts, "time": time.time(), "added": False})
            self._add(folder, reports)
        return True

    def _has_expected(self, images: Mapping[str, Any]) -> bool:
        """Return True if `expected_images` are explained. An image may be recorded that is not in the inbox yet."""
        assert self._config.study is not None
        expected = self._config.study.expected_images
        states = [each["state"] for each in images.values()]
        return expected is not None and states.count("explained") >= expected and "received" not in states

    def _counts(self, folder: Path, images: Mapping[str, Any]) -> list[str]:
        """Return texts with the numbers of images."""
        assert self._config.study is not None
        states = [each["state"] for each in images.values()]
        limit = self._config.study.max_images
        numbers = {
            "that could not be explained": states.count("received"),
            f"that were left out, because at most {limit} of a study are explained": _count(folder / "left_out"),
            "that no rule selects": _count(folder / "not_selected"),
        }
        return [
            f"Images of the study in this report: {states.count('explained')}.",
            *(f"Images of the study {text}: {number}." for text, number in numbers.items() if number),
        ]

    def _is_in_progress(self, folder: Path) -> bool:
        """Return True if an image of the study is not explained yet, or its results are not stored yet."""
        return any(
            (self._spool.folder(stage) / path.stem).exists()
            for path in (folder / "images").glob("*.json")
            for stage in (Stage.inbox, Stage.outbox)
        )

    def _add(self, folder: Path, reports: list[dict[str, Any]]) -> None:
        """Make the objects of the last report, record it, and add its entry to outbox."""
        assert self._config.study is not None
        report, earlier = reports[-1], reports[:-1]
        records = {name: read_json(folder / "images" / f"{name}.json")["image"] for name in report["images"]}
        header = dcmread(folder / "header.dcm")
        made = study_objects(
            header,
            [ExplainedImage.from_json(each) for each in records.values()],
            report=self._config.study.report,
            flags=[each.flag() for each in self._config.flags],
            predecessor=Reference(**earlier[-1]["made"]["study"]) if earlier else None,
            texts=report["texts"],
        )
        stored = {each["made"]["flagged"]["sop_instance"] for each in earlier if "flagged" in each["made"]}
        if "flagged" in made and made["flagged"].SOPInstanceUID in stored:
            del made["flagged"]  # the same images are flagged as before
        references = {kind: Reference.to(each, kind) for kind, each in made.items()}
        report["made"] = {kind: vars(each) for kind, each in references.items()}
        report["results"] = _result_uids(records)
        write_file(folder / "reports.json", {"reports": reports})
        entry = self._spool.entry_name(report["made"]["study"]["sop_instance"])
        files = {f"results/{kind}.dcm": file_bytes(each) for kind, each in made.items()}
        told = [*references.values()]
        files |= study_messages(self._config, self._spool, entry, report.get("time", 0.0), header, records, told)
        self._spool.add(entry, files | {STUDY_FILE: b"{}"}, Stage.outbox)
        self._audit.write_once(
            "study reported",
            object=entry,
            study=folder.name,
            images=len(records),
            results=[self._spool.entry_name(str(each.SOPInstanceUID)) for each in made.values()],
        )
        report["added"] = True
        write_file(folder / "reports.json", {"reports": reports})


def _result_uids(records: dict[str, Any]) -> list[str]:
    """Return the SOP Instance UIDs of the results of all images, sorted."""
    return sorted(result["sop_instance"] for each in records.values() for result in each["results"])


def _count(folder: Path) -> int:
    """Return the number of records in a folder; 0 if it does not exist. Files that are being written do not count."""
    return sum(1 for path in folder.glob("*") if not path.name.startswith("."))


def _write_mark(path: Path) -> None:
    """Create an empty file, unless it exists."""
    if not path.exists():
        write_file(path, b"", new_folder=True)


def _change_time(folder: Path) -> float | None:
    """Return the time of the last change of a folder, in seconds of Unix time; None if it does not exist."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return None


def file_bytes(dataset: Dataset) -> bytes:
    """Return a dataset as a DICOM file."""
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()
