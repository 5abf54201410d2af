"""The overlay as a Secondary Capture image."""

from __future__ import annotations

from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from camserve_dicom import grey, overlay
from camserve_dicom.derivation import Derivation
from camserve_dicom.errors import DicomError
from camserve_dicom.header import reference, source_image

__all__ = ["secondary_capture"]

# Rows and Columns are of 16 bits.
_MOST_ROWS = 65535


def secondary_capture(derivation: Derivation) -> Dataset:
    """The map over the picture, with a legend below it."""
    pixels, scale = overlay.drawn(derivation)
    if max(pixels.shape) > _MOST_ROWS:
        raise DicomError(f"an overlay of more than {_MOST_ROWS} rows or columns is no image", "UNSUPPORTED_PIXELS")
    source = derivation.image.source
    result = Dataset()
    result.SOPClassUID = SecondaryCaptureImageStorage
    result.Modality = "OT"
    result.ConversionType = "WSD"
    result.ImageType = ["DERIVED", "SECONDARY"]
    result.PatientOrientation = source.get("PatientOrientation")
    result.BurnedInAnnotation = "YES"
    result.DerivationDescription = description(derivation)
    result.SourceImageSequence = [source_image(derivation)]
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
        result.PositionReferenceIndicator = source.get("PositionReferenceIndicator")
    header = grey.of_frame(source, derivation.image.frame)
    if spacing := grey.spacing(header, "PixelSpacing"):
        result.PixelSpacing = [f"{min(spacing) / scale:.10g}"] * 2  # the picture's pixels are square
        for name in ("PixelSpacingCalibrationType", "PixelSpacingCalibrationDescription"):
            if header.get(name):
                setattr(result, name, header.get(name))
    return result


def description(derivation: Derivation) -> str:
    """What this is, for people: at most 1024 characters."""
    explanation = derivation.explanation
    return (
        f"Saliency map of class {explanation.target.index} ({derivation.label}, probability "
        f"{explanation.target.probability:.3f}) by {explanation.receipt.method} of model {explanation.receipt.model}; "
        f"source pixels: {', '.join(derivation.image.steps) or 'as stored'}"
    )[:1024]
