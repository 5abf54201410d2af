"""The map as Parametric Map, and its highest values as Segmentation, on the pixel grid of the source."""

from __future__ import annotations

from typing import Any

import highdicom as hd
import numpy as np
import PIL.Image
from highdicom import pm, seg
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sr.coding import Code

from camserve_dicom.derivation import Derivation
from camserve_dicom.result_header import source_image
from camserve_dicom.secondary_capture import description
from camserve_dicom.surrogate import plane_geometry, restore_references, slice_thickness, surrogate_source

__all__ = ["THRESHOLD", "map_on_source_grid", "parametric_map", "segmentation"]

THRESHOLD = 0.5
"""Threshold of the segmentation and of the outlines, relative to the maximum of the map."""

# CIELab of sRGB (255, 214, 10) as PS3.3 C.10.7.1.1 encodes it.
_DISPLAY_COLOUR = (57166, 33782, 54888)
_SYNTHETIC = "SYNTHETIC GEOMETRY: the source has none. "
_QUANTITIES = {
    "cam": Code("130402", "DCM", "Class activation"),
    "grad-cam": Code("130403", "DCM", "Gradient-weighted class activation"),
}
_SALIENCY = Code("130404", "DCM", "Saliency")


def map_on_source_grid(derivation: Derivation) -> NDArray[np.float32]:
    """Interpolate the map to the stored frame.

    Args:
        derivation: The explanation and its image.

    Returns:
        The map, float32 [Rows, Columns] in [0, 1]. It is 0 outside of the part that the model was shown.
    """
    image = derivation.image
    left, top, right, bottom = image.box
    saliency = PIL.Image.fromarray(derivation.explanation.saliency)
    smooth = saliency.resize((right - left, bottom - top), PIL.Image.Resampling.BILINEAR)
    frame = np.zeros((int(image.source.Rows), int(image.source.Columns)), np.float32)
    frame[top:bottom, left:right] = np.asarray(smooth, dtype=np.float32).clip(0, 1)
    return frame


def parametric_map(derivation: Derivation) -> Dataset:
    """Return the map, float32 in [0, 1], as Parametric Map (PS3.3 A.75)."""
    quantity = _quantity(derivation)
    mapping = pm.RealWorldValueMapping(
        lut_label="SALIENCY",
        lut_explanation="In [0, 1], relative to the maximum of this map"[:64],
        unit=Code("1", "UCUM", "no units"),
        value_range=(0.0, 1.0),
        slope=1,
        intercept=0,
        quantity_definition=quantity,
    )
    result = pm.ParametricMap(
        [surrogate_source(derivation)],
        map_on_source_grid(derivation),
        real_world_value_mappings=[mapping],
        # A window of width 1 is a threshold with the default function, LINEAR.
        voi_lut_transformations=[hd.VOILUTTransformation(0.5, 1, voi_lut_function="LINEAR_EXACT")],
        contains_recognizable_visual_features=False,
        content_label="SALIENCY",
        content_description=_content_description(derivation)[:64],
        **_equipment(derivation, "pm"),
    )
    return _complete(result, derivation)


def segmentation(derivation: Derivation) -> Dataset:
    """Return the pixels with at least `THRESHOLD` of the map's maximum as Segmentation (PS3.3 A.51)."""
    saliency = map_on_source_grid(derivation)
    mask = (saliency >= THRESHOLD * saliency.max()) & (saliency > 0)
    receipt = derivation.explanation.receipt
    segment = seg.SegmentDescription(
        segment_number=1,
        segment_label=derivation.label[:64],
        segmented_property_category=Code("309825002", "SCT", "Spatial and Relational Concept"),
        segmented_property_type=_quantity(derivation),
        algorithm_type=seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=receipt.method[:64],
            family=Code("123110", "DCM", "Artificial Intelligence"),
            version=receipt.versions.get("camserve", "unknown")[:64],
        ),
        tracking_uid=derivation.uid("tracking"),
        tracking_id=derivation.tracking_id,
    )
    result = seg.Segmentation(
        [surrogate_source(derivation)],
        mask.astype(np.uint8),
        segmentation_type=seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        omit_empty_frames=False,
        content_label="SALIENCY",
        content_description=_content_description(derivation)[:64],
        **_equipment(derivation, "seg"),
    )
    result.SegmentSequence[0].RecommendedDisplayCIELabValue = [*_DISPLAY_COLOUR]
    return _complete(result, derivation)


def _equipment(derivation: Derivation, kind: str) -> dict[str, Any]:
    """Return the arguments that highdicom requires. `result_header.complete` replaces most of the values."""
    return {
        "series_instance_uid": derivation.uid(f"{kind}/series"),
        "series_number": 1,
        "sop_instance_uid": derivation.uid(kind),
        "instance_number": 1,
        "manufacturer": "camserve",
        "manufacturer_model_name": "camserve",
        "software_versions": "0",
        "device_serial_number": "0",
    }


def _quantity(derivation: Derivation) -> Code:
    return _QUANTITIES.get(derivation.explanation.receipt.method, _SALIENCY)


def _content_description(derivation: Derivation) -> str:
    where = "" if plane_geometry(derivation) else _SYNTHETIC
    return f"{where}{derivation.explanation.receipt.method} of class {derivation.explanation.target.index}"


def _complete(result: Dataset, derivation: Derivation) -> Dataset:
    """Add descriptions and references, and mark a synthetic plane."""
    where = "" if plane_geometry(derivation) else _SYNTHETIC
    result.DerivationDescription = (where + description(derivation))[:1024]
    if where:
        result.ImageComments = where.strip()
    [measures] = result.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    measures.pop("SpacingBetweenSlices", None)  # there is only one slice
    if slice_thickness(derivation) is None and "SegmentSequence" not in result:  # required in a segmentation
        del measures.SliceThickness
    result.SourceImageSequence = [source_image(derivation)]
    return restore_references(result, derivation)
