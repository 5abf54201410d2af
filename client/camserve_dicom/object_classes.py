"""Objects that are not images: those without pixels, such as reports, and those with other values, such as doses."""

from __future__ import annotations

from pydicom import Dataset
from pydicom.uid import UID, MediaStorageDirectoryStorage

__all__ = ["NOT_IMAGES", "kind_of_non_image", "name_of_non_image"]

NOT_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "Segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "Label Map Segmentation",
    "1.2.840.10008.5.1.4.1.1.66.8": "Height Map Segmentation",
    "1.2.840.10008.5.1.4.1.1.30": "Parametric Map",
    "1.2.840.10008.5.1.4.1.1.481.2": "RT Dose",
    "1.2.840.10008.5.1.4.1.1.81.1": "Ophthalmic Thickness Map",
    "1.2.840.10008.5.1.4.1.1.82.1": "Corneal Topography Map",
    "1.2.840.10008.5.1.4.1.1.77.1.5.8": "Ophthalmic Optical Coherence Tomography B-scan Volume Analysis",
}
"""Names of the SOP classes whose pixels are not an image, by UID."""

_STORAGE = "1.2.840.10008.5.1.4.1.1"
# SOP classes without pixels (PS3.4 B.5), and groups of them, whose UIDs begin with these.
_WITHOUT_PIXELS = (
    *(f"{_STORAGE}.{number}" for number in (8, 9, 10, 129)),  # overlays, curves, waveforms and tables
    f"{_STORAGE}.11",  # presentation states
    f"{_STORAGE}.4.2",  # MR Spectroscopy
    *(f"{_STORAGE}.66.{number}" for number in (1, 2, 3, 5, 6)),  # registrations, fiducials, surfaces and tracts
    *(f"{_STORAGE}.{number}" for number in (67, 68, 90, 91, 131, 200, 201)),
    f"{_STORAGE}.77.1.5.3",  # Stereometric Relationship
    *(f"{_STORAGE}.{number}" for number in (78, 79, 80)),  # measurements of eyes
    f"{_STORAGE}.88",  # reports (SR) and key objects
    f"{_STORAGE}.104",  # encapsulated documents
    *(f"{_STORAGE}.481.{number}" for number in (*range(3, 23), 25)),  # RT objects other than images and doses
    *(f"1.2.840.10008.5.1.4.{number}" for number in (34, 38, 39, 43, 44, 45)),  # RT instructions, protocols, templates
)
# Classes without pixels that are not the beginning of others, with their names if pydicom does not know them.
_SINGLE_WITHOUT_PIXELS = {
    MediaStorageDirectoryStorage: "DICOMDIR",
    f"{_STORAGE}.66": "Raw Data",
    "1.3.12.2.1107.5.9.1": "Siemens CSA Non-Image",
    "1.3.46.670589.11.0.0.12.1": "Philips MR Spectrum",
    "1.3.46.670589.11.0.0.12.2": "Philips MR Series Data",
    "1.3.46.670589.11.0.0.12.4": "Philips MR Examcard",
}

# Values of Modality of the same objects with a private SOP class.
_MODALITIES = {"SEG": "Segmentation", "RTDOSE": "RT Dose", "OPM": "Ophthalmic Map"}


def kind_of_non_image(header: Dataset) -> str:
    """Return the name of the kind of an object whose values are not an image; empty for an image.

    SOP Class, Modality and the presence of segments tell it.
    """
    of_class = NOT_IMAGES.get(str(header.get("SOPClassUID") or ""), "")
    of_modality = _MODALITIES.get(str(header.get("Modality") or "").strip().upper(), "")
    return of_class or of_modality or ("Segmentation" if "SegmentSequence" in header else "")


def name_of_non_image(sop_class: str) -> str:
    """Return the name of a SOP class whose objects are not images; empty for other and for unknown classes.

    Args:
        sop_class: The UID of the class.
    """
    if name := NOT_IMAGES.get(sop_class) or _SINGLE_WITHOUT_PIXELS.get(sop_class):
        return name
    if any(sop_class == each or sop_class.startswith(f"{each}.") for each in _WITHOUT_PIXELS):
        return UID(sop_class).name.replace(" Storage", "")
    return ""
