"""Objects with pixels whose values are not an image, such as segmentations and doses."""

from __future__ import annotations

from pydicom import Dataset

__all__ = ["NOT_IMAGES", "kind_of_non_image"]

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
"""Names of the SOP classes, by UID."""

# Values of Modality of the same objects with a private SOP class.
_MODALITIES = {"SEG": "Segmentation", "RTDOSE": "RT Dose", "OPM": "Ophthalmic Map"}


def kind_of_non_image(header: Dataset) -> str:
    """Return the name of the kind of an object whose values are not an image; empty for an image.

    SOP Class, Modality and the presence of segments tell it.
    """
    of_class = NOT_IMAGES.get(str(header.get("SOPClassUID") or ""), "")
    of_modality = _MODALITIES.get(str(header.get("Modality") or "").strip().upper(), "")
    return of_class or of_modality or ("Segmentation" if "SegmentSequence" in header else "")
