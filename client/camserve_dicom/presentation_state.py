"""Outlines of the highest values of the map as a presentation state, which a viewer draws over the source image."""

from __future__ import annotations

import struct
from typing import Any

import contourpy
import numpy as np
import PIL.ImageCms
from highdicom import PresentationLUTTransformation, pr
from numpy.typing import NDArray
from pydicom import Dataset

from camserve_dicom.derivation import Derivation
from camserve_dicom.maps import THRESHOLD
from camserve_dicom.overlay import WARNING
from camserve_dicom.source_header import frame_header, pixel_aspect
from camserve_dicom.surrogate import restore_references, surrogate_source

__all__ = ["outlines", "presentation_state"]

_VOI = ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")
# An element with a 16-bit length holds 16383 numbers of 32 bits, which is 8191 points.
_MAX_POINTS = 8000


def presentation_state(derivation: Derivation) -> Dataset:
    """Return a Grayscale or Color Softcopy Presentation State with the outlines and a label (PS3.3 A.33)."""
    source, image = derivation.image.source, surrogate_source(derivation)
    for name in ("FrameOfReferenceUID", "PositionReferenceIndicator"):
        image.pop(name, None)
    explanation = derivation.explanation
    layer = pr.GraphicLayer("SALIENCY", order=1, description="Where the map is above half of its maximum")
    text = pr.TextObject(
        f"{WARNING}\n{derivation.label}, p = {explanation.target.probability:.3f}\n{explanation.receipt.method}",
        units=pr.AnnotationUnitsValues.DISPLAY,
        bounding_box=(0.01, 0.01, 0.6, 0.12),
        text_justification=pr.TextJustificationValues.LEFT,
    )
    annotation = pr.GraphicAnnotation(
        [image],
        layer,
        graphic_objects=[
            pr.GraphicObject(pr.GraphicTypeValues.POLYLINE, line, units=pr.AnnotationUnitsValues.PIXEL)
            for line in outlines(derivation)
        ]
        or None,
        text_objects=[text],
    )
    arguments: dict[str, Any] = {
        "referenced_images": [image],
        "series_instance_uid": derivation.uid("gsps/series"),
        "series_number": 1,
        "sop_instance_uid": derivation.uid("gsps"),
        "instance_number": 1,
        "manufacturer": "camserve",
        "manufacturer_model_name": "camserve",
        "software_versions": "0",
        "device_serial_number": "0",
        "content_label": "SALIENCY",
        "content_description": f"{explanation.receipt.method} of class {explanation.target.index}"[:64],
        "graphic_annotations": [annotation],
        "graphic_layers": [layer],
    }
    header = frame_header(source, derivation.image.frame)
    if not str(source.PhotometricInterpretation).startswith("MONOCHROME"):
        colour = pr.ColorSoftcopyPresentationState(**arguments, icc_profile=_srgb())
        return restore_references(_set_pixel_aspect(colour, header), derivation)
    inverse = source.PhotometricInterpretation == "MONOCHROME1"
    shape = PresentationLUTTransformation(presentation_lut_shape="INVERSE" if inverse else "IDENTITY")
    state = pr.GrayscaleSoftcopyPresentationState(**arguments, presentation_lut_transformation=shape)
    voi = Dataset()
    for element in derivation.image.luts:
        (voi if element.keyword in _VOI else state).add(element)
    state.SoftcopyVOILUTSequence = [voi]
    return restore_references(_set_pixel_aspect(state, header), derivation)


def _set_pixel_aspect(state: Dataset, header: Dataset) -> Dataset:
    """Set the aspect ratio of the displayed pixels; highdicom always writes square pixels."""
    aspect = pixel_aspect(header)
    if aspect != 1:
        for area in state.DisplayedAreaSelectionSequence:
            area.PresentationPixelAspectRatio = [round(1000 * aspect), 1000]
    return state


def _srgb() -> bytes:
    """Return sRGB as an input device profile with a constant creation date, so that its bytes are constant."""
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    return profile[:12] + b"scnr" + profile[16:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]


def outlines(derivation: Derivation) -> list[NDArray[np.float32]]:
    """Return the outlines of all areas with at least `THRESHOLD` of the map's maximum.

    Args:
        derivation: The explanation and its image.

    Returns:
        Closed lines, each float32 [points, 2] with (column, row) in the stored frame. The upper left corner of the
        first pixel is (0, 0).
    """
    saliency = derivation.explanation.saliency
    left, top, right, bottom = derivation.image.box
    x, y = (right - left) / saliency.shape[1], (bottom - top) / saliency.shape[0]
    if not saliency.max():
        return []
    # A border of zeros closes every line.
    padded = np.pad(saliency, 1)
    lines = contourpy.contour_generator(z=padded).lines(THRESHOLD * float(saliency.max()))
    closed = []
    for line in lines:
        thinned = np.asarray(line)[:: -(-len(line) // _MAX_POINTS)]
        points = (thinned - 0.5) * (x, y) + (left, top)
        points = points.clip((left, top), (right, bottom)).astype(np.float32)
        closed.append(np.concatenate([points, points[:1]]) if (points[0] != points[-1]).any() else points)
    return closed
