"""Explanations of DICOM images as DICOM objects that a PACS can store.

Of the DICOM object, the functions send only pixels to the server. The header stays on this machine, and the results are
objects of the same study:

    with camserve.Client("127.0.0.1:50051") as client:
        e = camserve_dicom.explain(client, "image.dcm", outputs=("sc", "sr"))
        e.save("results")

The package requires `pip install 'camserve[dicom]'`.
"""

from camserve_dicom.class_codes import ClassCode
from camserve_dicom.derivation import IMPLEMENTATION_UID
from camserve_dicom.errors import DicomError
from camserve_dicom.explaining import DicomExplanation, explain, explain_async, request_pixels
from camserve_dicom.reading import Box, RenderedImage, Source, Window, read, silence_library_warnings
from camserve_dicom.results import KINDS, objects

__all__ = [
    "IMPLEMENTATION_UID",
    "KINDS",
    "Box",
    "ClassCode",
    "DicomError",
    "DicomExplanation",
    "RenderedImage",
    "Source",
    "Window",
    "explain",
    "explain_async",
    "objects",
    "read",
    "request_pixels",
    "silence_library_warnings",
]
