"""DICOM in and out: images are explained without their headers, and results are objects that a PACS stores.

    with camserve.Client("127.0.0.1:50051") as client:
        e = camserve_dicom.explain(client, "image.dcm", outputs=("sc", "sr"))
        e.save("results")

Needs `pip install 'camserve[dicom]'`.
"""

from camserve_dicom.derivation import IMPLEMENTATION_UID
from camserve_dicom.errors import DicomError
from camserve_dicom.explaining import DicomExplanation, explain, explain_async, request_pixels
from camserve_dicom.reading import RenderedImage, Source, read, silence_library_warnings
from camserve_dicom.results import KINDS, objects

__all__ = [
    "IMPLEMENTATION_UID",
    "KINDS",
    "DicomError",
    "DicomExplanation",
    "RenderedImage",
    "Source",
    "explain",
    "explain_async",
    "objects",
    "read",
    "request_pixels",
    "silence_library_warnings",
]
