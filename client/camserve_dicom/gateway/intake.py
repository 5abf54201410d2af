"""Intake of objects: which ones are explained, and which ones are dropped."""

from __future__ import annotations

import json

import structlog
from pydicom import Dataset

from camserve_dicom.gateway.audit import Audit
from camserve_dicom.gateway.config import Config
from camserve_dicom.gateway.rules import COMPARED
from camserve_dicom.gateway.spool import Spool, Stage
from camserve_dicom.gateway.studies import Studies
from camserve_dicom.object_classes import kind_of_non_image

__all__ = ["HEADER", "IN_PROGRESS", "Intake", "SpoolFull"]

log = structlog.get_logger()

HEADER = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "ImageType",
    "PresentationIntentType",
    *COMPARED,
    "SegmentSequence",
    "Manufacturer",
    "ContributingEquipmentSequence",
)
"""Keywords of the attributes for the rules and for the detection of the gateway's own results."""
IN_PROGRESS = "in progress already"
"""Reason in the audit trail for an object that is in the spool already."""
# Reason for an image that no rule selects.
NOT_SELECTED = "no rule"


class SpoolFull(Exception):
    """The spool has no room for an object."""


class Intake:
    """Adds objects to the inbox.

    Args:
        config: The configuration.
        spool: The spool.
        audit: The audit trail.
        studies: The studies, which record received images.
    """

    def __init__(self, config: Config, spool: Spool, audit: Audit, studies: Studies) -> None:
        self._config, self._spool, self._audit, self._studies = config, spool, audit, studies

    def add(self, header: Dataset, part10: bytes, caller: str) -> str | None:
        """Add an object to the inbox and wait until it is on the disk, or drop it.

        Args:
            header: The header of the object, with at least the elements `HEADER`.
            part10: The object as a DICOM file.
            caller: AE title of the sender.

        Returns:
            The reason why the object was dropped, or None.

        Raises:
            SpoolFull: If too many objects wait, or the disk is almost full.
            OSError: If the object cannot be written.
        """
        name = self._spool.entry_name(str(header.SOPInstanceUID))
        study_uid = str(header.get("StudyInstanceUID") or "")
        drop_reason = self._drop_reason(header, caller)
        if drop_reason == NOT_SELECTED:
            self._studies.add_not_selected(study_uid, name)
        if drop_reason is None:
            queue_full = self._spool.count(Stage.inbox) >= self._config.max_waiting
            if queue_full or self._spool.free_bytes() < self._config.min_free_bytes + len(part10):
                log.warning("spool is full", queue=queue_full)
                raise SpoolFull
            self._audit.write("received", object=name, peer=caller, bytes=len(part10))
            entry = json.dumps({"caller": caller}).encode()
            if not self._studies.add_received(study_uid, name):
                drop_reason = "the study has max_images"
            elif self._spool.add(name, {"source.dcm": part10, "entry.json": entry}):
                return None
            else:
                drop_reason = IN_PROGRESS
        self._audit.write("dropped", object=name, peer=caller, reason=drop_reason)
        return drop_reason

    def _drop_reason(self, header: Dataset, caller: str) -> str | None:
        """Return the reason why an object is not explained, or None. A PACS may send the gateway its own results."""
        equipment = [header, *header.get("ContributingEquipmentSequence", [])]
        if any(each.get("Manufacturer") == "camserve" for each in equipment):
            return "own"
        rule = self._config.rule(header, caller)
        accepts_all = rule is not None and rule.non_image == "ignore"
        if "Rows" not in header or (kind_of_non_image(header) and not accepts_all):
            return "no image"
        if header.get("PresentationIntentType") == "FOR PROCESSING":  # the image FOR PRESENTATION is sent as well
            return "for processing"
        if [*header.get("ImageType", [])][:2] == ["DERIVED", "SECONDARY"]:
            return "derived"
        if rule is None:
            return NOT_SELECTED
        return None
