"""Rendering of stored values by camserve_dicom.read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm  # type: ignore[import-untyped]
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

import camserve_dicom as dicom
from camserve_dicom import DicomError
from tests.dicom.samples import SECRETS, SERIES, data_of, image, ramp, stored

AS_IT_IS: dict[str, Any] = {"regions": "ignore", "burned_in": "ignore"}


def rendered_pixels(pixels: np.ndarray, **attributes: Any) -> np.ndarray:
    return dicom.read(image(pixels, **attributes)).pixels


def linear_levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    shades: np.ndarray = np.rint(255 * ((values - low) / (high - low)).clip(0, 1)).astype(np.uint8)
    return shades


# ---- grey -----------------------------------------------------------------------------------------------------------


def test_rescale_and_window_of_the_header() -> None:
    stored = np.array([[0, 924], [1064, 1164], [1265, 4000]], np.uint16)
    rendered = dicom.read(
        image(stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 500], WindowWidth=[401, 2000])
    )
    # PS3.3 C.11.2.1.2: from centre - 0.5 - (width - 1) / 2 to centre - 0.5 + (width - 1) / 2
    np.testing.assert_array_equal(rendered.pixels, linear_levels(stored - 1024.0, -160.5, 239.5))
    assert rendered.pixels.dtype == np.uint8
    assert rendered.steps == ("rescaled by 1 and -1024", "window 40/401, the header's")


def test_window_argument_overrides_the_header() -> None:
    source = image(ramp(), WindowCenter=1, WindowWidth=2)
    np.testing.assert_array_equal(dicom.read(source, window=(1000, 401)).pixels, linear_levels(ramp(), 799.5, 1199.5))


@pytest.mark.parametrize("attributes", [{}, {"WindowCenter": 5, "WindowWidth": 0}])
def test_percentiles_without_a_window(attributes: Any) -> None:
    values = ramp(40, 50)
    values[0, 0] = 65535  # a bright marker
    pixels = rendered_pixels(values, **attributes)
    np.testing.assert_array_equal(pixels, linear_levels(values, *np.percentile(values, (0.5, 99.5))))


def test_constant_image_is_black() -> None:
    assert not rendered_pixels(np.full((4, 5), 77, np.uint16)).any()


def test_voi_lut_functions() -> None:
    values = np.array([[0, 25, 50, 100]] * 2, np.uint16)
    window = {"WindowCenter": 50, "WindowWidth": 100}
    np.testing.assert_array_equal(
        rendered_pixels(values, VOILUTFunction="LINEAR_EXACT", **window)[0], [0, 64, 128, 255]
    )
    sigmoid = 255 / (1 + np.exp(-4 * (values[0] - 50.0) / 100))
    np.testing.assert_allclose(rendered_pixels(values, VOILUTFunction="SIGMOID", **window)[0], sigmoid, atol=0.5)


def table(entries: list[int], first: int, bits: int) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    item.ModalityLUTType = "US"
    return [item]


def test_lookup_tables_override_windows() -> None:
    values = np.array([[0, 1, 2, 3]] * 2, np.uint16)
    np.testing.assert_array_equal(
        rendered_pixels(values, VOILUTSequence=table([0, 4095, 2048, 0], 0, 12), WindowCenter=1, WindowWidth=1)[0],
        [0, 255, 128, 0],
    )
    modality = rendered_pixels(
        values, ModalityLUTSequence=table([30, 20, 10, 0], 0, 16), WindowCenter=15.5, WindowWidth=31
    )
    np.testing.assert_array_equal(modality[0], [255, 170, 85, 0])


def test_monochrome1_is_inverted_and_padding_is_black() -> None:
    values = np.array([[0, 100, 200], [300, 400, 65000]], np.uint16)
    window = {"WindowCenter": 200.5, "WindowWidth": 401}
    inverted = np.rint(255 * (1 - (values / 400).clip(0, 1))).astype(np.uint8)
    np.testing.assert_array_equal(rendered_pixels(values, PhotometricInterpretation="MONOCHROME1", **window), inverted)
    inverted[0, 0] = 0  # it would be white without Pixel Padding Value
    source = image(values, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0, **window)
    np.testing.assert_array_equal(dicom.read(source).pixels, inverted)


def test_padding_is_compared_with_stored_values_and_excluded_from_percentiles() -> None:
    values = np.tile(np.arange(100, dtype=np.int16), (10, 1))
    values[:, :40] = np.linspace(-2000, -1990, 40).astype(np.int16)
    source = image(values, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990, RescaleSlope=2, RescaleIntercept=5)
    expected = linear_levels(2.0 * values + 5, *np.percentile(2.0 * values[:, 40:] + 5, (0.5, 99.5)))
    expected[:, :40] = 0
    rendered = dicom.read(source)
    np.testing.assert_array_equal(rendered.pixels, expected)
    assert rendered.content[0] >= 40


def test_windows_of_frames() -> None:
    frames = np.stack([ramp(), ramp() + 1000])

    def group(centre: float) -> Dataset:
        voi, item = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, 401
        item.FrameVOILUTSequence = [voi]
        return item

    source = image(frames, PerFrameFunctionalGroupsSequence=[group(200), group(1200)])
    np.testing.assert_array_equal(dicom.read(source, frame=0).pixels, dicom.read(source, frame=1).pixels)
    assert dicom.read(source, frame=1).steps == ("window 1200/401, the header's",)


@pytest.mark.parametrize(
    ("attributes", "by"), [({"RescaleSlope": "", "RescaleIntercept": ""}, (1, 0)), ({"RescaleSlope": 2}, (2, 0))]
)
def test_missing_rescale_attributes_have_defaults(attributes: Any, by: tuple[float, float]) -> None:
    rendered = dicom.read(image(ramp(), WindowCenter=1000, WindowWidth=2001, **attributes))
    np.testing.assert_array_equal(rendered.pixels, linear_levels(by[0] * ramp() + by[1], -0.5, 1999.5))


def test_nan_is_black_and_excluded_from_percentiles() -> None:
    values = np.tile(np.linspace(0, 1, 50, dtype="<f4"), (50, 1))
    source = image(values.astype(np.uint16), PixelData=None, BitsAllocated=32)
    values[:, :10] = np.nan
    values[0, 11] = np.inf
    source.FloatPixelData = values.tobytes()
    for name in ("BitsStored", "HighBit", "PixelRepresentation"):
        delattr(source, name)
    pixels = dicom.read(source).pixels
    assert not pixels[:, :10].any()
    assert not pixels[0, 11]
    assert pixels.max() == 255
    assert len(np.unique(pixels)) > 30


# ---- colour ---------------------------------------------------------------------------------------------------------


def test_rgb_and_ybr() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(rendered_pixels(rgb), rgb)
    np.testing.assert_array_equal(rendered_pixels(rgb.astype(np.uint16) * 257), rgb)
    ybr = convert_color_space(rgb, "RGB", "YBR_FULL")
    np.testing.assert_allclose(rendered_pixels(ybr, PhotometricInterpretation="YBR_FULL").astype(int), rgb, atol=2)


def test_palette() -> None:
    index = np.arange(12, dtype=np.uint8).reshape(3, 4)
    source = image(index, PhotometricInterpretation="PALETTE COLOR")
    for place, colour in enumerate(("Red", "Green", "Blue")):
        source.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        entries = (np.arange(256) * 257 // (place + 1)).astype("<u2").tobytes()
        source.add_new(f"{colour}PaletteColorLookupTableData", "OW", entries)
    pixels = dicom.read(source).pixels
    np.testing.assert_allclose(pixels, index[..., None] / np.array([1, 2, 3]), atol=0.51)


def test_palette_of_bytes_with_more_than_256_entries() -> None:
    index = np.array([[0, 255], [256, 999]], np.uint16)
    source = image(index, PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        source.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [1000, 0, 8])
        source.add_new(f"{colour}PaletteColorLookupTableData", "OW", (np.arange(1000) // 4).astype(np.uint8).tobytes())
    np.testing.assert_array_equal(dicom.read(source).pixels[..., 1], index // 4)


@pytest.mark.parametrize("name", ["OBXXXX1A_expb.dcm", "OBXXXX1A_expb_2frame.dcm"])
def test_palette_in_big_endian(name: str) -> None:
    first, second = (dicom.read(stored(each), **AS_IT_IS).pixels for each in ("OBXXXX1A.dcm", name))
    np.testing.assert_array_equal(first, second)


# ---- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({"PixelSpacing": [1.0, 0.5]}, (40, 30)),
        ({"PixelSpacing": [0.5, 1.0]}, (20, 60)),
        ({"PixelSpacing": None, "PixelAspectRatio": [3, 2]}, (30, 30)),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.2, 0.2]}, (20, 30)),
    ],
)
def test_pixels_are_resampled_to_squares(attributes: Any, shape: tuple[int, int]) -> None:
    rendered = dicom.read(image(ramp(), **attributes))
    assert rendered.pixels.shape == shape
    assert rendered.box == (0, 0, 30, 20)
    assert any("square" in step for step in rendered.steps) == (shape != (20, 30))


def region(left: int, top: int, right: int, bottom: int, kind: int) -> Dataset:
    item = Dataset()
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    item.RegionSpatialFormat = kind
    return item


def test_ultrasound_regions_are_refused_or_cropped() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    regions = [region(0, 0, 29, 4, 3), region(1, 6, 4, 9, 1), region(5, 6, 24, 17, 1)]
    source = image(pixels, SequenceOfUltrasoundRegions=regions, BurnedInAnnotation="YES")
    with pytest.raises(DicomError, match="burned") as refused:
        dicom.read(source)
    assert (refused.value.reason, refused.value.field) == ("BURNED_IN_ANNOTATION", "burned_in")
    with pytest.raises(DicomError, match="regions") as refused:
        dicom.read(source, burned_in="ignore")
    assert (refused.value.reason, refused.value.field) == ("ULTRASOUND_REGIONS", "regions")
    cropped = dicom.read(source, regions="crop")  # the text is outside of the regions
    np.testing.assert_array_equal(cropped.pixels, pixels[6:18, 5:25])
    assert cropped.box == (5, 6, 25, 18)
    np.testing.assert_array_equal(dicom.read(source, regions="ignore", burned_in="ignore").pixels, pixels)
    outside = image(pixels, SequenceOfUltrasoundRegions=[region(40, 0, 50, 5, 1)])
    with pytest.raises(DicomError, match="outside"):
        dicom.read(outside, regions="crop")


# ---- compressed -----------------------------------------------------------------------------------------------------


def jpeg_lossless(dataset: Dataset, folder: Path) -> Path:
    """Write an image in lossless JPEG by GDCM, the only installed package that encodes it."""
    plain, written = folder / "plain.dcm", folder / "compressed_image.dcm"
    plain.write_bytes(data_of(dataset))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(written))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return written


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_lossless_compression_gives_the_same_pixels(syntax: UID) -> None:
    plain, compressed_image = (image(ramp(64, 50), WindowCenter=9000, WindowWidth=15000) for _ in range(2))
    compressed_image.compress(syntax, generate_instance_uid=False)
    reread = pydicom.dcmread(io.BytesIO(data_of(compressed_image)))
    assert reread.file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(dicom.read(reread).pixels, dicom.read(plain).pixels)


def test_lossless_jpeg_gives_the_same_pixels(tmp_path: Path) -> None:
    written = jpeg_lossless(image(ramp(64, 50)), tmp_path)
    assert pydicom.dcmread(written).file_meta.TransferSyntaxUID == JPEGLosslessSV1
    np.testing.assert_array_equal(dicom.read(written).pixels, dicom.read(image(ramp(64, 50))).pixels)


@pytest.mark.parametrize("name", ["JPGLosslessP14SV1_1s_1f_8b.dcm", "JPEG-LL.dcm", "color3d_jpeg_baseline.dcm"])
def test_jpeg_images_are_decoded(name: str) -> None:
    assert dicom.read(stored(name), regions="ignore", burned_in="ignore").pixels.std() > 5


@pytest.mark.slow
@pytest.mark.parametrize(("plain", "compressed"), [("RG1_UNCR.dcm", "RG1_J2KR.dcm"), ("693_UNCR.dcm", "693_J2KR.dcm")])
def test_real_images_with_and_without_compression(plain: str, compressed: str) -> None:
    first, second = (dicom.read(stored(name)) for name in (plain, compressed))
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert first.steps == second.steps
    if plain.startswith("RG1"):
        assert "MONOCHROME1 inverted" in first.steps


# ---- errors ---------------------------------------------------------------------------------------------------------


COLOURS = np.full((4, 4, 3), (120, 90, 200), np.uint8)


def truncate(dataset: Dataset, keep: float) -> io.BytesIO:
    data = data_of(dataset)
    return io.BytesIO(data[: int(len(data) * keep)])


def compressed_image() -> Dataset:
    dataset = image(ramp(64, 50))
    dataset.compress(RLELossless, generate_instance_uid=False)
    return dataset


def with_syntax(uid: str) -> Dataset:
    dataset = compressed_image()
    dataset.file_meta.TransferSyntaxUID = UID(uid)
    return dataset


def without(name: str) -> Dataset:
    dataset = image(ramp())
    delattr(dataset, name)
    return dataset


@pytest.mark.parametrize(
    ("make", "reason", "said"),
    [
        (lambda: io.BytesIO(b"\xff\xd8\xff a photograph" * 50), "NOT_DICOM", "not DICOM"),
        (lambda: io.BytesIO(b""), "NOT_DICOM", "not DICOM"),
        (lambda: truncate(image(ramp(100, 100)), 0.9), "TRUNCATED", "truncated"),
        (lambda: truncate(compressed_image(), 0.8), "TRUNCATED", "truncated"),
        (lambda: truncate(image(ramp(), PatientComments="x" * 9000), 0.3), "TRUNCATED", "truncated"),
        (lambda: image(ramp(), PixelData=None), "NO_PIXELS", "no pixels"),
        (lambda: without("SOPInstanceUID"), "INCOMPLETE", "SOPInstanceUID"),
        (lambda: image(ramp(), PhotometricInterpretation=None), "UNSUPPORTED_PIXELS", "attributes"),
        (lambda: image(ramp(), BitsStored=12, HighBit=15), "UNSUPPORTED_PIXELS", "High Bit"),
        *(
            (lambda kind=kind: image(COLOURS, PhotometricInterpretation=kind), "UNSUPPORTED_PIXELS", "interpretation")
            for kind in ("YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "HSV", "CMYK")
        ),
        (lambda: image(ramp(1, 9)), "UNSUPPORTED_PIXELS", "single row"),
        (lambda: image(ramp(), PixelSpacing=[90, 1]), "UNSUPPORTED_PIXELS", "10 times"),
        (lambda: with_syntax("1.2.840.10008.1.2.4.102"), "UNSUPPORTED_TRANSFER_SYNTAX", "MPEG-4.*no package"),
        (lambda: with_syntax("1.2.3.4"), "UNSUPPORTED_TRANSFER_SYNTAX", "private transfer syntax"),
        (lambda: with_syntax("1.2.840.10008.1.2.4.90"), "UNREADABLE_PIXELS", "corrupt or truncated"),
    ],
)
def test_errors_have_a_reason_and_no_patient_data(make: Callable[[], Any], reason: str, said: str) -> None:
    with pytest.raises(DicomError, match=said) as wrong:
        dicom.read(make())
    assert wrong.value.reason == reason
    assert isinstance(wrong.value, ValueError)
    assert not any(secret in str(wrong.value) for secret in [*SECRETS.values(), SERIES])


@pytest.mark.filterwarnings("ignore")
def test_invalid_value_is_a_broken_header() -> None:
    sound = data_of(image(ramp()[None]))
    broken = sound.replace(b"\x28\x00\x08\x00IS\x02\x001 ", b"\x28\x00\x08\x00IS\x02\x001A")
    assert broken != sound
    with pytest.raises(DicomError, match="invalid value") as wrong:
        dicom.read(io.BytesIO(broken))
    assert wrong.value.reason == "BROKEN_HEADER"


@pytest.mark.parametrize("frame", [-1, 3])
def test_frame_out_of_range(frame: int) -> None:
    with pytest.raises(DicomError, match=r"frame is -?\d; expected 0 to 2") as wrong:
        dicom.read(image(np.zeros((3, 4, 5), np.uint8)), frame=frame)
    assert (wrong.value.reason, wrong.value.field) == ("FRAME_OUT_OF_RANGE", "frame")


def test_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dicom.read(tmp_path / "none.dcm")


def test_read_does_not_change_the_source() -> None:
    source = image(ramp())
    before = data_of(source)
    rendered = dicom.read(source)
    assert "PixelData" in source
    assert "PixelData" not in rendered.source
    assert str(rendered.source.PatientName) == SECRETS["PatientName"]
    assert data_of(source) == before
