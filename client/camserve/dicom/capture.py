"""The overlay as a Secondary Capture image."""

from __future__ import annotations

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import SecondaryCaptureImageStorage

from camserve.dicom import overlay
from camserve.dicom.derivation import Derivation
from camserve.dicom.header import code, reference
from camserve.dicom.reading import Picture

__all__ = ["secondary_capture"]


def secondary_capture(derivation: Derivation) -> Dataset:
    """The map over the picture, with a legend below it."""
    pixels, scale = overlay.drawn(derivation)
    source = derivation.picture.source
    result = Dataset()
    result.SOPClassUID = SecondaryCaptureImageStorage
    result.Modality = "OT"
    result.ConversionType = "WSD"
    result.ContentDate = result.ContentTime = None  # `finished` sets them
    result.ImageType = ["DERIVED", "SECONDARY"]
    result.PatientOrientation = source.get("PatientOrientation")
    result.BurnedInAnnotation = "YES"
    result.DerivationDescription = description(derivation)
    origin = reference(derivation)
    origin.PurposeOfReferenceCodeSequence = [code("121322", "DCM", "Source image for image processing operation")]
    result.SourceImageSequence = [origin]
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    instance = reference(derivation)
    instance.pop("ReferencedFrameNumber", None)
    series.ReferencedInstanceSequence = [instance]
    result.ReferencedSeriesSequence = [series]
    result.SamplesPerPixel, result.PhotometricInterpretation, result.PlanarConfiguration = 3, "RGB", 0
    result.Rows, result.Columns = pixels.shape[:2]
    result.BitsAllocated, result.BitsStored, result.HighBit, result.PixelRepresentation = 8, 8, 7, 0
    data = pixels.tobytes()
    result.PixelData = data + b"\0" * (len(data) % 2)
    if frame_of_reference := source.get("FrameOfReferenceUID"):
        result.FrameOfReferenceUID = frame_of_reference
        result.PositionReferenceIndicator = None
    if spacing := _spacing(derivation.picture):
        result.PixelSpacing = [f"{spacing / scale:.10g}"] * 2
    return result


def description(derivation: Derivation) -> str:
    """What this is, for people: at most 1024 characters."""
    explanation = derivation.explanation
    return (
        f"Saliency map of class {explanation.target.index} ({derivation.label}, probability "
        f"{explanation.target.probability:.3f}) by {explanation.receipt.method} of model {explanation.receipt.model}; "
        f"source pixels: {', '.join(derivation.picture.steps) or 'as stored'}"
    )[:1024]


def _spacing(shown: Picture) -> float | None:
    """Millimetres from pixel to pixel of the picture, which are square; None where the header does not say."""
    spacing = shown.source.get("PixelSpacing")
    given = [float(each) for each in spacing] if isinstance(spacing, MultiValue) else []
    return min(given) if len(given) == 2 and min(given) > 0 else None
