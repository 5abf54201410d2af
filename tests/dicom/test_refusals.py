"""Objects that are not images, reasons of refusals, and JPEG and JPEG XL by imagecodecs."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL.Image
import pydicom
import pytest
from pydicom import Dataset
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import UID, CTImageStorage, JPEGExtended12Bit, MediaStorageDirectoryStorage

import camserve_dicom as dicom
from camserve_dicom import DicomError, decoding, object_classes
from camserve_dicom.part10 import read_sop_class
from tests.dicom.gateways import RULE, UNREACHABLE_SERVER, OpenGateway
from tests.dicom.pacs import image as radiograph
from tests.dicom.pacs import send, wait_until
from tests.dicom.samples import data_of, image, ramp, stored
from tests.dicom.test_explain import run

JPEG_XL_SYNTAXES = ["1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112"]


# ---- objects that are not images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", object_classes.NOT_IMAGES)
def test_objects_that_are_not_images_are_refused(uid: str) -> None:
    source = image(ramp(), SOPClassUID=uid)
    with pytest.raises(DicomError, match=object_classes.NOT_IMAGES[uid]) as refused:
        dicom.read(source)
    assert (refused.value.reason, refused.value.field) == ("NOT_AN_IMAGE", "non_image")
    assert dicom.read(source, non_image="ignore").pixels.shape == (20, 30)


@pytest.mark.parametrize("attributes", [{"Modality": "SEG"}, {"Modality": "RTDOSE"}, {"SegmentSequence": [Dataset()]}])
def test_private_classes_of_objects_that_are_not_images(attributes: Any) -> None:
    with pytest.raises(DicomError) as refused:
        dicom.read(image(ramp(), SOPClassUID="1.2.3.4", **attributes))
    assert refused.value.reason == "NOT_AN_IMAGE"


def test_real_segmentation_and_dose_are_refused() -> None:
    for name in ("liver.dcm", "rtdose.dcm"):
        with pytest.raises(DicomError) as refused:
            dicom.read(stored(name))
        assert refused.value.reason == "NOT_AN_IMAGE"


def test_each_standard_class_is_that_of_images_or_has_a_name() -> None:
    classes = {UID(uid): name for uid, (name, kind, *_) in UID_dictionary.items() if kind == "SOP Class"}
    stored_classes = {uid: name for uid, name in classes.items() if " Storage" in name and " SOP Class" not in name}
    left_out = {uid for uid in stored_classes if object_classes.name_of_non_image(uid)}
    assert set(object_classes.NOT_IMAGES) & set(stored_classes) <= left_out
    other = {name for uid, name in stored_classes.items() if uid not in left_out and " Image " not in name}
    assert other == {
        "Enhanced US Volume Storage",
        *("DICOS Threat Detection Report Storage", "DICOS 2D AIT Storage", "DICOS 3D AIT Storage"),
        "DICOS Quadrupole Resonance (QR) Storage",
    }
    assert not [stored_classes[uid] for uid in left_out if " Image " in stored_classes[uid]]
    assert object_classes.name_of_non_image("1.2.840.10008.5.1.4.1.1.88.11") == "Basic Text SR"
    assert object_classes.name_of_non_image(MediaStorageDirectoryStorage) == "DICOMDIR"
    assert object_classes.name_of_non_image("1.2.3.4") == object_classes.name_of_non_image("") == ""


def test_class_is_read_from_the_beginning_of_a_file(tmp_path: Path) -> None:
    def read(data: bytes) -> str:
        (tmp_path / "x.dcm").write_bytes(data)
        return read_sop_class(tmp_path / "x.dcm")

    assert read(data_of(image(ramp()))) == CTImageStorage
    assert read(data_of(directory())) == MediaStorageDirectoryStorage
    assert read_sop_class(stored("reportsi.dcm")) == "1.2.840.10008.5.1.4.1.1.88.11"
    assert read_sop_class(stored("image_dfl.dcm")) == "1.2.840.10008.5.1.4.1.1.7", "a deflated object"
    assert read_sop_class(stored("rtstruct.dcm")) == "1.2.840.10008.5.1.4.1.1.481.3", "without a header"
    source = image(ramp())  # with a header that contradicts the object
    source.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.88.11")
    assert read(data_of(source)) == CTImageStorage
    data = data_of(image(ramp()))
    for length in range(0, 600, 7):
        for damaged in (data[:length], data[:length] + b"\xfe" * 99 + data[length + 99 :]):
            assert object_classes.name_of_non_image(read(damaged)) == ""
    assert read(b"no DICOM" * 99) == ""


@pytest.mark.usefixtures("broken_associations")
def test_gateway_drops_objects_that_are_not_images(gateway: OpenGateway) -> None:
    objects = [radiograph(number, SOPClassUID=uid) for number, uid in enumerate(object_classes.NOT_IMAGES)]
    accepted = [each for each in objects if each.SOPClassUID.name != str(each.SOPClassUID)]
    with gateway(server=UNREACHABLE_SERVER) as running:
        assert send(running.address, *accepted) == [0] * len(accepted)
        assert [line["reason"] for line in running.audit()] == ["no image"] * len(accepted)
    with gateway(server=UNREACHABLE_SERVER, rules=[RULE | {"non_image": "ignore"}]) as running:
        assert send(running.address, *accepted) == [0] * len(accepted)
        assert len(running.entries("inbox")) == len(accepted)


# ---- reasons --------------------------------------------------------------------------------------------------------


def without_pixels(**attributes: Any) -> Dataset:
    source = image(ramp(), **attributes)
    del source.PixelData
    return source


def directory() -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1")
    made.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    made.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    made.FileSetID = "X"
    made.DirectoryRecordSequence = []
    return made


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (without_pixels(), "no pixels"),
        (without_pixels(StudyInstanceUID=None), "no pixels"),
        (image(ramp(), PixelData=b""), "no pixels"),
        (directory(), "DICOMDIR"),
    ],
    ids=["no pixels", "incomplete", "empty", "DICOMDIR"],
)
def test_objects_without_pixels(source: Dataset, said: str) -> None:
    for each in (source, io.BytesIO(data_of(source))):
        with pytest.raises(DicomError, match=said) as refused:
            dicom.read(each)
        assert refused.value.reason == "NO_PIXELS"


@pytest.mark.parametrize(
    ("syntax", "said"),
    [
        ("1.2.840.10008.1.2.8.1", "Deflated Image Frame Compression"),
        ("1.2.840.10008.1.2.4.999", "1.2.840.10008.1.2.4.999, which is not a transfer syntax that camserve knows"),
        ("1.2.3.4", "a private transfer syntax"),
    ],
)
def test_unsupported_transfer_syntaxes_are_named(syntax: str, said: str) -> None:
    with pytest.raises(DicomError, match=f"compressed as {said}: ") as refused:
        dicom.read(compressed(ramp(), [b"\xff\xd8"], syntax))
    assert refused.value.reason == "UNSUPPORTED_TRANSFER_SYNTAX"


def test_command_names_options(address: str, tmp_path: Path) -> None:
    for name, attributes, said in (
        ("a", {"BurnedInAnnotation": "YES"}, "--burned-in ignore"),
        ("b", {"SequenceOfUltrasoundRegions": [Dataset()]}, "--regions crop"),
        ("c", {"Modality": "SEG"}, "--non-image ignore"),
    ):
        path = tmp_path / f"{name}.dcm"
        path.write_bytes(data_of(image(ramp(), **attributes)))
        ran = run(path, "--address", address, "--out", tmp_path)
        assert said in ran.stderr
        assert '="' not in ran.stderr
    assert run(path, "--address", address, "--out", tmp_path, "--non-image", "ignore").exit_code == 0


def test_table_has_whole_file_names(address: str, tmp_path: Path) -> None:
    """Without a terminal, names are not wrapped; brackets in a name are not markup."""
    path = tmp_path / f"{'long-name-' * 12}[red].dcm"
    path.write_bytes(data_of(image(ramp())))
    ran = run(path, "--address", address, "--out", tmp_path, "--check", "none")
    assert path.name in ran.stdout
    assert f"{path.stem}.sc.dcm, {path.stem}.sr.dcm" in ran.stdout


# ---- JPEG and JPEG XL -----------------------------------------------------------------------------------------------


def compressed(pixels: np.ndarray, frames: Sequence[bytes | bytearray], syntax: str, **attributes: Any) -> Dataset:
    """Return an image with the encoded frames of these pixels."""
    source = image(pixels, **attributes)
    source.PixelData = encapsulate([*map(bytes, frames)])
    source["PixelData"].is_undefined_length, source["PixelData"].VR = True, "OB"
    if len(frames) > 1:
        source.NumberOfFrames = len(frames)
    source.file_meta.TransferSyntaxUID = UID(syntax)
    return source


TWELVE_BITS = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 2048, "WindowWidth": 4096}
SMOOTH = np.add.outer(np.arange(40) * 60, np.arange(50) * 30).astype(np.uint16)


@pytest.mark.parametrize("syntax", [JPEGExtended12Bit, *decoding.JPEG_PROGRESSIVE])
def test_jpeg_with_12_bits(syntax: str) -> None:
    frames = [imagecodecs.jpeg8_encode(values, level=97, bitspersample=12) for values in (SMOOTH, SMOOTH[::-1])]
    source = compressed(SMOOTH, frames, syntax, **TWELVE_BITS)
    for frame, values in enumerate((SMOOTH, SMOOTH[::-1])):
        plain = dicom.read(image(values, **TWELVE_BITS)).pixels
        assert abs(dicom.read(source, frame=frame).pixels.astype(int) - plain).max() <= 1
    assert dicom.read(source).source.LossyImageCompression == "01"


def test_real_jpeg_with_12_bits() -> None:
    assert dicom.read(stored("JPEG-lossy.dcm")).pixels.std() > 5


def test_values_above_bits_stored_are_clipped() -> None:
    noise = np.random.default_rng(0).choice([0, 4095], (40, 50)).astype(np.uint16)
    encoded = imagecodecs.jpeg8_encode(noise // 2, level=30, bitspersample=12)
    source = compressed(noise, [encoded], JPEGExtended12Bit, BitsStored=11, HighBit=10)
    assert imagecodecs.jpeg8_decode(encoded).max() > 2047
    unsigned = decoding.decode_frame(source, 0).astype(int)
    assert unsigned.max() == 2047
    source.PixelRepresentation = 1
    np.testing.assert_array_equal(decoding.decode_frame(source, 0), (unsigned + 1024) % 2048 - 1024)


@pytest.mark.parametrize("colour", [False, True])
def test_progressive_jpeg_with_8_bits(colour: bool) -> None:
    pixels = (SMOOTH // 16).astype(np.uint8)
    pixels = np.stack([pixels, pixels[::-1], pixels // 2], axis=-1) if colour else pixels
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=95, progressive=True)
    attributes = {"PhotometricInterpretation": "YBR_FULL_422"} if colour else {"WindowCenter": 128, "WindowWidth": 256}
    source = compressed(pixels, [file.getvalue()], decoding.JPEG_PROGRESSIVE[1], **attributes)
    expected = np.asarray(PIL.Image.open(file))
    assert abs(dicom.read(source).pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("syntax", JPEG_XL_SYNTAXES)
@pytest.mark.parametrize("colour", [False, True])
def test_jpeg_xl(syntax: str, colour: bool, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8) if colour else ramp()
    source = compressed(pixels, [imagecodecs.jpegxl_encode(pixels, lossless=True)], syntax)
    np.testing.assert_array_equal(dicom.read(source).pixels, dicom.read(image(pixels)).pixels)
    # pydicom cannot write these transfer syntaxes. HTJ2K has a UID of the same length.
    source.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.201")
    data = data_of(source).replace(b"1.2.840.10008.1.2.4.201", syntax.encode())
    np.testing.assert_array_equal(dicom.read(io.BytesIO(data)).pixels, dicom.read(source_of(pixels)).pixels)


def source_of(pixels: np.ndarray) -> Dataset:
    return pydicom.dcmread(io.BytesIO(data_of(image(pixels))))


@pytest.mark.parametrize("syntax", [JPEGExtended12Bit, *decoding.JPEG_PROGRESSIVE, *JPEG_XL_SYNTAXES])
def test_corrupt_jpeg(syntax: str) -> None:
    for data in (b"\xff\xd8\xff\xe0" + b"garbage" * 9, imagecodecs.jpeg8_encode(SMOOTH[:20], bitspersample=12)):
        with pytest.raises(DicomError, match="corrupt or truncated") as wrong:
            dicom.read(compressed(SMOOTH, [data], syntax, **TWELVE_BITS))
        assert wrong.value.reason == "UNREADABLE_PIXELS"


def test_corrupt_rle() -> None:
    """The decoder, which is written in Rust, raises an exception that is not an Exception."""
    source = pydicom.dcmread(stored("MR_small_RLE.dcm"))
    frame = bytearray(get_frame(source.PixelData, 0, number_of_frames=1))
    frame[8] ^= 0x7F  # the offset of the second segment
    source.PixelData = encapsulate([bytes(frame)])
    with pytest.raises(DicomError, match="cannot be decoded") as refused:
        dicom.read(source)
    assert refused.value.reason == "UNREADABLE_PIXELS"


def test_missing_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    source = compressed(SMOOTH, [b"\xff\xd8"], JPEGExtended12Bit, **TWELVE_BITS)
    with pytest.raises(DicomError, match="includes imagecodecs") as wrong:
        dicom.read(source)
    assert wrong.value.reason == "UNSUPPORTED_TRANSFER_SYNTAX"


@pytest.mark.usefixtures("broken_associations")
def test_gateway_receives_jpeg_with_12_bits(gateway: OpenGateway) -> None:
    source = radiograph(0)
    source.PixelData = encapsulate([bytes(imagecodecs.jpeg8_encode(source.pixel_array, bitspersample=12))])
    source["PixelData"].is_undefined_length, source["PixelData"].VR = True, "OB"
    source.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    with gateway() as running:
        assert send(running.address, source) == [0]
        wait_until(lambda: "committed" in running.events())
