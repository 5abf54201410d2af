"""The outline of what stands out, as a presentation state: a viewer draws it over the original."""

from __future__ import annotations

import struct
from typing import Any

import contourpy
import numpy as np
import PIL.ImageCms
from highdicom import PresentationLUTTransformation, pr
from numpy.typing import NDArray
from pydicom import Dataset

from camserve_dicom import grey
from camserve_dicom.derivation import Derivation
from camserve_dicom.maps import THRESHOLD
from camserve_dicom.overlay import WARNING
from camserve_dicom.standin import restored, stand_in

__all__ = ["outlines", "presentation_state"]

_VOI = ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")
# An element of 32 bit numbers holds 16383 of them.
_MOST_POINTS = 8000


def presentation_state(derivation: Derivation) -> Dataset:
    """Grayscale or Color Softcopy Presentation State with the outlines and what they are."""
    source, image = derivation.image.source, stand_in(derivation)
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
    given: dict[str, Any] = {
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
    header = grey.of_frame(source, derivation.image.frame)
    if not str(source.PhotometricInterpretation).startswith("MONOCHROME"):
        colour = pr.ColorSoftcopyPresentationState(**given, icc_profile=_srgb())
        return restored(_as_wide(colour, header), derivation)
    inverse = source.PhotometricInterpretation == "MONOCHROME1"
    shape = PresentationLUTTransformation(presentation_lut_shape="INVERSE" if inverse else "IDENTITY")
    state = pr.GrayscaleSoftcopyPresentationState(**given, presentation_lut_transformation=shape)
    voi = Dataset()
    for element in derivation.image.luts:
        (voi if element.keyword in _VOI else state).add(element)
    state.SoftcopyVOILUTSequence = [voi]
    return restored(_as_wide(state, header), derivation)


def _as_wide(state: Dataset, header: Dataset) -> Dataset:
    """Pixels are shown as wide and high as they are; highdicom takes them to be square."""
    aspect = grey.pixel_aspect(header)
    if aspect != 1:
        for area in state.DisplayedAreaSelectionSequence:
            area.PresentationPixelAspectRatio = [round(1000 * aspect), 1000]
    return state


def _srgb() -> bytes:
    """sRGB, which the pixels are taken to be of: as an input device's, and with a date that is not today's."""
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    return profile[:12] + b"scnr" + profile[16:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]


def outlines(derivation: Derivation) -> list[NDArray[np.float32]]:
    """Closed lines, float32 [points, 2], each (column, row) in the frame, whose first pixel begins at (0, 0)."""
    saliency = derivation.explanation.saliency
    left, top, right, bottom = derivation.image.box
    x, y = (right - left) / saliency.shape[1], (bottom - top) / saliency.shape[0]
    if not saliency.max():
        return []
    # With nothing around it, every line closes.
    around = np.pad(saliency, 1)
    lines = contourpy.contour_generator(z=around).lines(THRESHOLD * float(saliency.max()))
    found = []
    for line in lines:
        thinned = np.asarray(line)[:: -(-len(line) // _MOST_POINTS)]
        points = (thinned - 0.5) * (x, y) + (left, top)
        points = points.clip((left, top), (right, bottom)).astype(np.float32)
        found.append(np.concatenate([points, points[:1]]) if (points[0] != points[-1]).any() else points)
    return found
