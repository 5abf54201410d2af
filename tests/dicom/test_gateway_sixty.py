"""Sixty mixed objects over six associations, while the gateway is killed six times."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    UltrasoundMultiFrameImageStorage,
)

from camserve_server.service.server import Server
from tests.dicom.gateways import forked, write_config
from tests.dicom.pacs import Pacs, image, send
from tests.dicom.receivers import hl7_engine, webhook
from tests.dicom.test_gateway_killed import source
from tests.dicom.test_gateway_studies import predecessors
from tests.dicom.test_study_report import references
from tests.processes import LIMIT_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # about a minute on an idle machine
    pytest.mark.usefixtures("broken_associations"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),
]

KILLS, ASSOCIATIONS, OBJECTS = 6, 6, 10
CONFIG = """
commitment_timeout_s = 0.5

[study]
quiet_s = 1.0

[[flags]]
min_probability = 0.0

[[rules]]
model = "tiny"
method = "grad-cam"
metrics = ["insertion"]
outputs = ["sc", "sr", "pdf"]
check = "insertion>=0"

[[notifications]]
name = "hook"
url = "{hook}"

[[notifications]]
name = "ris"
mllp = "{engine}"
attributes = ["PatientID", "AccessionNumber", "StudyInstanceUID"]
"""


def mixed(association: int, number: int) -> Dataset:
    """Return an object. Each association sends a study of its own, with one object of each kind."""
    uid = f"1.2.826.0.1.3680043.10.999.4.{association + 1}"
    made = image(10 * association + number, StudyInstanceUID=uid, SeriesInstanceUID=f"{uid}.1")
    pixels = np.random.default_rng(100 * association + number).integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)
    match number:
        case 1:
            made.SOPClassUID, made.Modality, made.PhotometricInterpretation = (
                DigitalXRayImageStorageForPresentation,
                "DX",
                "MONOCHROME1",
            )
        case 2:
            made.SOPClassUID, made.Modality = CTImageStorage, "CT"
            made.RescaleSlope, made.RescaleIntercept = 1, -1024
        case 3:
            made.SOPClassUID, made.Modality = SecondaryCaptureImageStorage, "OT"
            _set_colour(made, pixels[0])
        case 4:
            made.SOPClassUID, made.Modality, made.NumberOfFrames = UltrasoundMultiFrameImageStorage, "US", 2
            _set_colour(made, pixels)
        case 5:
            made.compress(RLELossless, generate_instance_uid=False)
        case 6:  # its overlay is withheld
            made.PixelData = b"\0\1" * (48 * 40)
        case 7:  # it cannot be explained
            made.BurnedInAnnotation = "YES"
        case 8:  # it is dropped
            made.SOPClassUID, made.Modality = SegmentationStorage, "SEG"
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    return made


def _set_colour(made: Dataset, pixels: np.ndarray) -> None:
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PlanarConfiguration = 3, "RGB", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OB"


def test_sixty_objects_and_six_kills(tmp_path: Path, tiny: Server, pacs: Pacs) -> None:
    """No object is lost, no result is stored as another, and each message has one identifier and one content."""
    studies = [[mixed(association, number) for number in range(OBJECTS)] for association in range(ASSOCIATIONS)]
    spool, rng = tmp_path / "spool", random.Random(19)
    unsent = [[*study] for study in studies]

    def modality(objects: list[Dataset]) -> None:
        """Send objects in one association, and those without a response again in another one."""
        while objects:
            statuses = send(pacs.gateway, *objects)
            objects[:] = [
                each for each, status in zip(objects, [*statuses, *[None] * len(objects)], strict=False) if status != 0
            ]
            time.sleep(0.05)

    with webhook() as hook, hl7_engine() as engine:
        path = write_config(tmp_path, tiny.address, pacs, CONFIG.format(hook=hook.url, engine=engine.address))
        senders = [threading.Thread(target=modality, args=(each,), daemon=True) for each in unsent]
        for each in senders:
            each.start()
        for _ in range(KILLS):
            with forked(path, spool) as running:
                time.sleep(rng.uniform(0.3, 4.0))
                running.kill()
                running.wait()
        with forked(path, spool) as running:
            for each in senders:
                each.join(LIMIT_S)
            assert not any(unsent)

            def is_done() -> bool:
                """Each study has a report of all explained images, and nothing waits."""
                done = {line["study"] for line in running.audit() if line.get("images") == OBJECTS - 2}
                return len(done) == ASSOCIATIONS and running.idle()

            deadline = time.monotonic() + 3 * LIMIT_S  # LIMIT_S is for one event
            while not is_done():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            running.terminate()
            assert running.wait() == 0
        check_results(pacs, studies)
        assert [each["reason"] for each in running.dead()] == ["BURNED_IN_ANNOTATION"] * ASSOCIATIONS
        messages = [message for _, message in hook.requests]
        check_messages(pacs, messages)
        # Times of an image that was sent again differ.
        told = {re.sub(r"\b\d{14}\+0000\b", "", message) for message in engine.messages}
        assert len({message.split("|")[9] for message in told}) == len(told) == len({each["id"] for each in messages})


def check_results(pacs: Pacs, studies: list[list[Dataset]]) -> None:
    """Check that each explained image has each result once, and that reports have them all."""
    of_images = [each for each in pacs.objects() if each.SeriesNumber < 9008]
    for study in studies:
        expected = {str(each.SOPInstanceUID) for number, each in enumerate(study) if number not in (7, 8)}
        withheld = str(study[6].SOPInstanceUID)
        results = [each for each in of_images if each.StudyInstanceUID == study[0].StudyInstanceUID]
        for modality, sources in (("OT", expected - {withheld}), ("SR", expected), ("DOC", expected)):
            assert sorted(source(each) for each in results if each.Modality == modality) == sorted(sources)
        reports = {
            str(each.SOPInstanceUID): each
            for each in pacs.objects()
            if each.SeriesNumber == 9008 and each.StudyInstanceUID == study[0].StudyInstanceUID
        }
        [last] = reports.keys() - {uid for each in reports.values() for uid in predecessors(each)}
        assert references(reports[last]) == {str(each.SOPInstanceUID) for each in results} | expected


def check_messages(pacs: Pacs, messages: list[dict[str, Any]]) -> None:
    """Check that the webhook was told about all objects that the PACS has, with the same content each time."""
    distinct = {json.dumps({key: value for key, value in message.items() if key != "time"}) for message in messages}
    assert len({message["id"] for message in messages}) == len(distinct)
    told = [each["sop_instance_uid"] for message in distinct for each in json.loads(message)["results"]]
    assert sorted(told) == sorted(str(each.SOPInstanceUID) for each in pacs.objects())
