"""The map itself as Parametric Map, and where it is high as Segmentation: both on the grid of the source's pixels."""

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
from camserve_dicom.header import source_image
from camserve_dicom.secondary_capture import description
from camserve_dicom.standin import geometry, restored, stand_in, thickness

__all__ = ["THRESHOLD", "native", "parametric_map", "segmentation"]

# Of the map's maximum.
THRESHOLD = 0.5

SYNTHETIC = "SYNTHETIC GEOMETRY: the source has none. "
_QUANTITIES = {
    "cam": Code("130402", "DCM", "Class activation"),
    "grad-cam": Code("130403", "DCM", "Gradient-weighted class activation"),
}
_SALIENCY = Code("130404", "DCM", "Saliency")


def native(derivation: Derivation) -> NDArray[np.float32]:
    """float32 [rows, columns] over the whole frame as it is stored, 0 outside of what the model was shown."""
    image = derivation.image
    left, top, right, bottom = image.box
    saliency = PIL.Image.fromarray(derivation.explanation.saliency)
    smooth = saliency.resize((right - left, bottom - top), PIL.Image.Resampling.BILINEAR)
    frame = np.zeros((int(image.source.Rows), int(image.source.Columns)), np.float32)
    frame[top:bottom, left:right] = np.asarray(smooth, dtype=np.float32).clip(0, 1)
    return frame


def parametric_map(derivation: Derivation) -> Dataset:
    """The map in [0, 1] as float32."""
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
        [stand_in(derivation)],
        native(derivation),
        real_world_value_mappings=[mapping],
        # LINEAR, the default, would make a width of 1 a threshold.
        voi_lut_transformations=[hd.VOILUTTransformation(0.5, 1, voi_lut_function="LINEAR_EXACT")],
        contains_recognizable_visual_features=False,
        content_label="SALIENCY",
        content_description=_described(derivation)[:64],
        **_equipment(derivation, "pm"),
    )
    return _about(result, derivation)


def segmentation(derivation: Derivation) -> Dataset:
    """Where the map is at least THRESHOLD of its maximum."""
    saliency = native(derivation)
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
        tracking_id=derivation.tracked,
    )
    result = seg.Segmentation(
        [stand_in(derivation)],
        mask.astype(np.uint8),
        segmentation_type=seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        omit_empty_frames=False,
        content_label="SALIENCY",
        content_description=_described(derivation)[:64],
        **_equipment(derivation, "seg"),
    )
    return _about(result, derivation)


def _equipment(derivation: Derivation, kind: str) -> dict[str, Any]:
    """What highdicom asks for; most of it is said by `finished`."""
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


def _described(derivation: Derivation) -> str:
    where = "" if geometry(derivation) else SYNTHETIC
    return f"{where}{derivation.explanation.receipt.method} of class {derivation.explanation.target.index}"


def _about(result: Dataset, derivation: Derivation) -> Dataset:
    """What it is, in words, and whether its place is made up."""
    where = "" if geometry(derivation) else SYNTHETIC
    result.DerivationDescription = (where + description(derivation))[:1024]
    if where:
        result.ImageComments = where.strip()
    [measures] = result.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    measures.pop("SpacingBetweenSlices", None)  # of one
    if thickness(derivation) is None and "SegmentSequence" not in result:  # a segmentation must have one
        del measures.SliceThickness
    result.SourceImageSequence = [source_image(derivation)]
    return restored(result, derivation)
