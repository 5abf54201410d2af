"""The overlay as Secondary Capture Image (PS3.3 A.8.1)."""

from __future__ import annotations

from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from camserve_dicom import overlay
from camserve_dicom.derivation import Derivation
from camserve_dicom.errors import DicomError
from camserve_dicom.result_header import reference, source_image
from camserve_dicom.source_header import frame_header, spacing

__all__ = ["MAX_ROWS", "description", "secondary_capture"]

MAX_ROWS = 65535
"""Maximum number of rows and columns of an image: both attributes have 16 bits."""


def secondary_capture(derivation: Derivation) -> Dataset:
    """Return the overlay of the map on the image, with a legend below it.

    Raises:
        DicomError: If the overlay has more than 65535 rows or columns.
    """
    pixels, scale = overlay.draw(derivation)
    if max(pixels.shape) > MAX_ROWS:
        raise DicomError(
            f"the overlay has {max(pixels.shape)} rows or columns; expected at most {MAX_ROWS}, so leave out sc",
            "UNSUPPORTED_PIXELS",
        )
    source = derivation.image.source
    result = Dataset()
    result.SOPClassUID = SecondaryCaptureImageStorage
    result.Modality = "OT"
    result.ConversionType = "WSD"
    result.ImageType = ["DERIVED", "SECONDARY"]
    orientation = source.get("PatientOrientation") or []
    result.PatientOrientation = orientation if len(orientation) == 2 and all(orientation) else None
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
    header = frame_header(source, derivation.image.frame)
    if pixel_spacing := spacing(header, "PixelSpacing"):
        result.PixelSpacing = [f"{min(pixel_spacing) / scale:.10g}"] * 2  # the rendered image has square pixels
        calibration = ("PixelSpacingCalibrationType", "PixelSpacingCalibrationDescription")
        if all(header.get(name) for name in calibration):  # each needs the other
            for name in calibration:
                setattr(result, name, header.get(name))
    return result


def description(derivation: Derivation) -> str:
    """Return a description of the map for display, of at most 1024 characters."""
    explanation = derivation.explanation
    return (
        f"Saliency map of class {explanation.target.index} ({derivation.label}, probability "
        f"{explanation.target.probability:.3f}) by {explanation.receipt.method} of model {explanation.receipt.model}; "
        f"source pixels: {', '.join(derivation.image.steps) or 'as stored'}"
    )[:1024]
