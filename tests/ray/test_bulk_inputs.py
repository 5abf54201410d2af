"""Unusual inputs of bulk runs: no image is lost without a message, and no file ends a run with a traceback."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydicom import Dataset

import camserve
from camserve_ray.bulk import BulkImage, find_images
from camserve_ray.bulk.engine import ImageEvaluator
from camserve_ray.bulk.reading import ImageReader
from tests.dicom import samples
from tests.dicom.test_refusals import directory
from tests.ray.test_bulk_engine import encoded, evaluated, evaluator, write_parquet, write_tar

__all__ = ["evaluator"]  # a fixture

NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
)


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def damaged(path: Path, position: int, data: bytes) -> Path:
    """Write a copy of a file that has other data at a position."""
    copy = path.with_stem(f"{path.stem}-damaged")
    content = bytearray(path.read_bytes())
    content[position : position + len(data)] = data
    copy.write_bytes(content)
    return copy


# ---- folders --------------------------------------------------------------------------------------------------------


def test_links_are_followed_and_each_folder_is_searched_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for file in (folder / "a" / "1.png", elsewhere / "2.png"):
        file.parent.mkdir(parents=True)
        file.touch()
    (folder / "b").symlink_to(elsewhere)
    (folder / "c").symlink_to("b")
    (folder / "a" / "loop").symlink_to("..")
    (folder / "lost.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")  # reading it would never end
    names = [each.name.removeprefix(f"{folder}/") for each in find_images([folder])]
    assert names == ["a/1.png", "b/2.png", "lost.png"]


def test_unreadable_subfolder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1.png").touch()
    (tmp_path / "private").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:  # the tests may run as root, who can read all folders
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="private"):
        find_images([tmp_path])


def test_compressed_archives_in_folders_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    names = ["1.tar.gz", "2.TGZ", "3.zip", "sub/4.tar.zst"]
    for name in names:
        (folder / name).touch()
    with caplog.at_level(logging.WARNING), pytest.raises(camserve.InvalidArgument, match="contains no images"):
        find_images([folder])
    (folder / "a.png").touch()
    for name in names[1:]:
        (folder / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert len(find_images([folder])) == 1
    first, second = caplog.messages
    assert first == (
        f"left out compressed archives, 4 in all: {folder}/1.tar.gz, {folder}/2.TGZ, {folder}/3.zip, ...; "
        "decompress them, and run the command again"
    )
    assert f"1 in all: {folder}/1.tar.gz; decompress" in second
    for name in names:
        (folder / name).write_bytes(b"compressed")
        with pytest.raises(camserve.InvalidArgument, match=r"not an uncompressed tar archive.*; decompress it first"):
            find_images([folder / name])


def test_dicom_files_that_are_no_images_are_left_out_with_a_warning(
    evaluator: ImageEvaluator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report, scan = "1.2.840.10008.5.1.4.1.1.88.11", samples.image(samples.ramp())
    without_pixels = samples.image(samples.ramp(), PixelData=None)
    study = tmp_path / "study"
    study.mkdir()
    for name, source in {
        "scan.dcm": scan,
        "DICOMDIR": directory(),
        "sr.dcm": samples.image(samples.ramp(), PixelData=None, SOPClassUID=report),
        "1.2.3": samples.image(samples.ramp(), PixelData=None, SOPClassUID=report),
        "dose.dcm": samples.image(samples.ramp(), SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2"),
        "damaged.dcm": without_pixels,
    }.items():
        (study / name).write_bytes(samples.data_of(source))
    (study / "truncated.dcm").write_bytes(samples.data_of(scan)[:-100])
    with caplog.at_level(logging.WARNING):
        images = find_images([study])
    assert caplog.messages == ["left out DICOM files that are no images: 2 Basic Text SR, 1 DICOMDIR, 1 RT Dose"]
    rows = evaluated(evaluator, images)
    reasons = {Path(name).name: row.reason for (name, method), row in rows.items() if method == "grad-cam"}
    assert reasons == {"scan.dcm": "", "damaged.dcm": "NO_PIXELS", "truncated.dcm": "TRUNCATED"}
    for name in ("scan.dcm", "damaged.dcm", "truncated.dcm"):
        (study / name).unlink()
    with pytest.raises(camserve.InvalidArgument, match="there are no images"):
        find_images([study])


def test_refused_dicom_images_name_a_command_that_has_an_option_for_them(tmp_path: Path) -> None:
    region = Dataset()
    region.RegionLocationMinX0 = region.RegionLocationMinY0 = 0
    region.RegionLocationMaxX1 = region.RegionLocationMaxY1 = 9
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"SequenceOfUltrasoundRegions": [region]}, "ultrasound regions", "--regions crop sends only the largest"),
        ({"BurnedInAnnotation": "YES"}, "text burned into its pixels", "--burned-in ignore sends it anyway"),
        ({"Modality": "SEG"}, "is a Segmentation", "--non-image ignore explains it anyway"),
    ]
    for attributes, problem, remedy in cases:
        (tmp_path / "x.dcm").write_bytes(samples.data_of(samples.image(samples.ramp(), **attributes)))
        [image] = find_images([tmp_path])
        with pytest.raises(camserve.InvalidArgument, match=problem) as refused:
            ImageReader("image").read(image)
        text = str(refused.value)
        assert f"; bulk runs have no option for such images: use `camserve dicom explain`, where {remedy}" in text
        assert '="' not in text


# ---- Parquet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": pyarrow.array([], pyarrow.binary())}, {}, "there are no images"),
        ({"image": [b"1"], "id": NOT_UTF8}, {"name_column": "id"}, "names or targets that are not UTF-8"),
        ({"image": [b"1"], "id": NOT_UTF8}, {"target_column": "id"}, "names or targets that are not UTF-8"),
        ({"image": [b"1"], "id": [b"a"]}, {"name_column": "id"}, "'id' of .* has the type binary; expected string or"),
        ({"image": [b"1"], "id": [["a"]]}, {"name_column": "id"}, "has the type list"),
        ({"image": [b"1"], "id": [1.5]}, {"name_column": "id"}, "has the type double"),
        ({"image": [b"1"]}, {"name_column": "image"}, "has the type binary; expected string or"),
        ({"image": [b"1"], "id": [""]}, {"name_column": "id"}, "has the name ''; expected 1 to 4096 bytes"),
        ({"image": [b"1"], "id": ["a\0b"]}, {"name_column": "id"}, r"has the name 'a\\x00b'; expected .* without NUL"),
        ({"image": [b"1"], "id": ["ä" * 2049]}, {"name_column": "id"}, "expected 1 to 4096 bytes"),
    ],
)
def test_wrong_columns_are_refused(
    columns: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_parquet(tmp_path / "d.parquet", **columns)
    with pytest.raises(camserve.InvalidArgument, match=message):
        find_images([path], **options)


def test_several_columns_with_a_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays(
        [pyarrow.array([b"1"])] * 2 + [pyarrow.array(["a"])] * 2 + [pyarrow.array([b"1"])], [*"iinnx"]
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_column": "i"}, "i"),
        ({"image_column": "x", "name_column": "n"}, "n"),
    ]
    for options, column in cases:
        with pytest.raises(camserve.InvalidArgument, match=f"has 2 columns '{column}'; it has i, i, n, n, x"):
            find_images([tmp_path / "d.parquet"], **options)


def test_names_may_be_numbers_and_categories(tmp_path: Path) -> None:
    for values in ([1, 2], pyarrow.array(["1", "2"]).dictionary_encode(), pyarrow.array(["1", "2"], "large_string")):
        path = write_parquet(tmp_path / "d.parquet", image=[b"x", b"y"], id=values)
        assert [each.name for each in find_images([path], name_column="id")] == ["1", "2"]


def test_damaged_parquet_files_are_refused_or_fail_by_image(evaluator: ImageEvaluator, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", image=[encoded(0), encoded(1)], id=["a", "b"])
    size = path.stat().st_size
    for position in range(0, size, 29):
        copy = damaged(path, position, b"\xfe" * 16)
        try:
            images = find_images([copy], name_column="id")
        except camserve.InvalidArgument as error:
            assert len(str(error).splitlines()) == 1
            continue
        for row in evaluated(evaluator, images).values():
            assert len(row.values["error"].splitlines()) <= 1
            assert "internal error" not in row.values["error"]


# ---- archives -------------------------------------------------------------------------------------------------------


def test_links_in_archives_are_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(link("first/later.png", "../x/1.png"))
        member = tarfile.TarInfo("x/1.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"one"))
        archive.addfile(link("2.png", "x/1.png", tarfile.LNKTYPE))
        archive.addfile(link("x/3.png", "./1.png"))
        archive.addfile(link("x/lost.png", "nowhere.png"))
        archive.addfile(link("x/1.cls", "nowhere.cls"))
    reader = ImageReader("image")
    found = {each.name.removeprefix(f"{path}/"): reader.read(each) for each in find_images([path])}
    assert found == {
        "first/later.png": b"one",
        "x/1.png": b"one",
        "2.png": b"one",
        "x/3.png": b"one",
        "x/lost.png": b"",
    }
    with pytest.raises(camserve.InvalidArgument, match=r"nowhere\.cls"):
        find_images([path], target_column="cls")


def test_archives_that_cannot_be_read_to_the_end_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": b"1" * 600, "2.png": b"2", "3.png": b"3"})
    second = path.read_bytes().index(b"2.png")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(path.read_bytes() * 2)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[: second - 100])
    without_end = tmp_path / "without_end.tar"  # as of a writer that has been killed; all of its images are complete
    without_end.write_bytes(path.read_bytes()[:second])
    for file, message in [
        (damaged(path, second + 100, b"\xee" * 20), f"what follows byte {second} cannot be read"),
        (joined, "consists of several archives"),
        (cut, "is not an uncompressed tar archive, or is damaged: unexpected end of data"),
        (write_tar(tmp_path / "a.tar.gz", {"1.png": b"1"}, "w:gz"), "is not an uncompressed tar archive"),
        (write_tar(tmp_path / "b.tgz", {"1.png": b"1"}, "w:gz"), "is not an uncompressed tar archive"),
    ]:
        with pytest.raises(camserve.InvalidArgument, match=message):
            find_images([file])
    assert len(find_images([without_end])) == 1


def test_sparse_files_in_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    member = tarfile.TarInfo("1.png")
    member.size = 1000
    member.pax_headers = {"GNU.sparse.map": "0,10", "GNU.sparse.size": "5000", "GNU.sparse.name": "1.png"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(b"1" * 1000))
    with pytest.raises(camserve.InvalidArgument, match=r"1\.png is a sparse file"):
        find_images([path])


# ---- files that change during a run ---------------------------------------------------------------------------------


def test_changed_files_are_errors_of_their_images(evaluator: ImageEvaluator, tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "d.parquet", image=[encoded(0)])
    archive = write_tar(tmp_path / "a.tar", {"1.png": encoded(1)})
    images = [
        BulkImage("group", str(table), "parquet", group=1),
        BulkImage("row", str(table), "parquet", offset=1),
        BulkImage("end", str(archive), "tar", offset=512, size=1 << 20),
    ]
    gone = [
        BulkImage("gone table", f"{tmp_path}/gone.parquet", "parquet"),
        BulkImage("gone archive", f"{tmp_path}/gone.tar", "tar"),
    ]
    rows = evaluated(evaluator, [*images, *gone])
    for image in images:
        error = rows[image.name, "grad-cam"].values["error"]
        assert error == f"{image.path} has changed since the run listed its images; run the command again"
    for image in gone:
        error = rows[image.name, "grad-cam"].values["error"]
        assert "No such file or directory" in error
        assert image.path in error
        assert "None" not in error
