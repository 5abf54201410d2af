"""Synthetic DICOM images, and explanations of them without a server."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from camserve import images, responses
from camserve.answers import Explanation
from camserve.v1 import explain_pb2 as pb

STUDY, SERIES, INSTANCE = (
    "1.2.826.0.1.3680043.8.498.7001",
    "1.2.826.0.1.3680043.8.498.7002",
    "1.2.826.0.1.3680043.8.498.7003",
)
# Values of the header that must not be sent or logged.
SECRETS = {
    "PatientName": "Wintersohn^Amelie",
    "PatientID": "PID-4711-0815",
    "IssuerOfPatientID": "Klinikum-Nordwest",
    "PatientBirthDate": "19520317",
    "StudyDate": "20240229",
    "StudyTime": "101112",
    "AccessionNumber": "ACC-993311",
    "StudyDescription": "Thorax bei Verdacht",
    "ReferringPhysicianName": "Hausarzt^Ottokar",
    "InstitutionName": "Sankt-Irgendwo",
    "StationName": "SCANNER-17",
    "AdditionalPatientHistory": "Sturz vom Kirschbaum",
}


def image(pixels: np.ndarray, **attributes: Any) -> Dataset:
    """Return a DICOM image as read from a file.

    Args:
        pixels: uint8, uint16 or int16 pixels [H, W] or [frames, H, W] of a CT, or a colour image [H, W, 3].
        **attributes: Attributes to set; None removes one.
    """
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = INSTANCE, STUDY, SERIES
    dataset.Modality = "CT"
    dataset.PatientSex, dataset.StudyID = "F", "1"
    for name, value in SECRETS.items():
        setattr(dataset, name, value)
    dataset.TimezoneOffsetFromUTC = "+0100"
    dataset.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.7004"
    dataset.PositionReferenceIndicator = ""
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [-10, 5.5, 30], [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [0.5, 0.5], 2
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.Rows, dataset.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in attributes.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    return pydicom.dcmread(io.BytesIO(data_of(dataset)))


def data_of(dataset: Dataset) -> bytes:
    """Return the dataset as a file."""
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


needs_dciodvfy = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of Debian's dicom3tools")


def errors(dataset: Dataset, folder: Path) -> list[str]:
    """Return the errors that dciodvfy reports for an object."""
    path = folder / "checked.dcm"
    path.write_bytes(data_of(dataset))
    checked = subprocess.run(["dciodvfy", path], capture_output=True, text=True, errors="replace", check=False)
    return [line for line in (checked.stdout + checked.stderr).splitlines() if "Error" in line]


def ramp(height: int = 20, width: int = 30) -> np.ndarray:
    """Return uint16 pixels [H, W] that all differ."""
    return np.arange(height * width, dtype=np.uint16).reshape(height, width) * 7


def stored(name: str) -> str:
    """Return the path of an image of pydicom-data."""
    path = get_testdata_file(name, download=False)
    assert path, f"pydicom-data has {name}"
    return str(path)


def explanation(
    pixels: np.ndarray, *, insertion: float = 0.7, request_id: str = "one", index: int = 3, **receipt: Any
) -> Explanation:
    """Return an explanation as the client makes it: a map [32, 32] that is 1 in one place and 0 in most others."""
    y, x = np.mgrid[0:32, 0:32] / 32
    saliency = np.exp(-((x - 0.4) ** 2 + (y - 0.6) ** 2) / 0.02).astype("<f4")
    saliency[saliency < 0.1] = 0
    saliency /= saliency.max()
    scores = [
        pb.Score(metric="insertion", value=insertion, unit="1"),
        pb.Score(metric="deletion", value=0.25, unit="1"),
        pb.Score(metric="average-gain", value=12.5, unit="%"),
    ]
    answer = pb.ExplainResponse(
        request_id=request_id,
        maps=[
            pb.SaliencyMap(
                target=pb.Prediction(index=index, label="effusion", probability=0.875, logit=2),
                saliency=pb.Tensor(shape=saliency.shape, data=saliency.tobytes()),
                scores=scores,
                share=1,
            )
        ],
        cost=pb.Cost(rows=len(request_id)),
    )
    given = {
        "request_id": request_id,
        "model": "thorax",
        "model_digest": "sha256:" + "ab" * 32,
        "method": "poly-cam",
        "layers": ["a", "b"],
        "targets": [index],
        "precision": "fp32",
        "device": "cpu",
        "batch_sizes": {"score": 16},
        "preprocessing": "squash 32x32",
        "versions": {"camserve": "0.1.0", "torch": "2"},
        "input_digest": "sha256:" + "cd" * 32,
        "map_digests": ["sha256:" + "ef" * 32],
    }
    answer.receipt.CopyFrom(pb.Receipt(**given | receipt))
    return responses.explanation(answer, images.to_wire(pixels))
