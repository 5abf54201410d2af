"""The images of a bulk run: what a folder, a Parquet file, a WebDataset archive or a DICOM folder contains.

The driver lists the images, and the engines read them. Therefore the paths must be valid on all nodes.
"""

from __future__ import annotations

import logging
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from camserve.errors import InvalidArgument
from camserve_ray.bulk.files import EXPECTED, SUFFIXES, Kind, escaped, find_files, kind_of, name_of_non_image

__all__ = ["BulkImage", "find_images"]

# Names are parts of the names in zip archives, which have at most 65,535 bytes and end at NUL.
_MAX_NAME_BYTES = 4096
_SCAN_BYTES = 1 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BulkImage:
    """An image of a bulk run, and where it is.

    Attributes:
        name: Its unique name in the output.
        path: The absolute path of the file that contains it.
        kind: How the file contains it: as an image file, as a DICOM file, as a file of a tar archive, or as a row of a
            Parquet file.
        offset: Position of the file in the tar archive in bytes, or row in the row group of the Parquet file.
        size: Size of the file in the tar archive in bytes.
        group: Row group of the Parquet file.
        target: Class index or label. None stands for the predicted class.
        boxes: Boxes of the target in pixels of the upright image, (left, top, right, bottom).
    """

    name: str
    path: str
    kind: Kind
    offset: int = 0
    size: int = 0
    group: int = 0
    target: int | str | None = None
    boxes: Sequence[Sequence[float]] | None = None


def find_images(
    paths: Iterable[Path],
    *,
    target: int | str | None = None,
    image_column: str = "image",
    name_column: str | None = None,
    target_column: str | None = None,
    out: Path | None = None,
) -> list[BulkImage]:
    """List the images of files and folders.

    DICOM files that are no images, such as reports, are left out with a warning. So are compressed archives in folders.

    Args:
        paths: Image files, DICOM files, Parquet files, uncompressed tar archives, and folders of them. Folders include
            their subfolders, also those behind symbolic links. Each folder is searched once.
        target: The target of all images, unless `target_column` is set.
        image_column: The column of Parquet files with the encoded images: bytes, or a struct with the field "bytes".
        name_column: The column of Parquet files with the names of the images. None names an image FILE.parquet/ROW.
        target_column: The column of Parquet files, or the extension of files in archives, with the class index or the
            label of each image.
        out: The output folder of the run. The scores in it, which are Parquet files, are not searched for images.

    Returns:
        The images in the order of the paths, without duplicates. The files of a folder are sorted. Images are named by
        their paths, and those of archives ARCHIVE.tar/FILE.

    Raises:
        OSError: A file or folder cannot be read.
        InvalidArgument: There are no images, a file has another form, an image has no usable name, or two images have
            the same name.
        ModuleNotFoundError: There are DICOM files, and the packages of the extra `dicom` are missing.
    """
    images: list[BulkImage] = []
    left_out = Counter[str]()
    for path in dict.fromkeys(file for each in paths for file in find_files(each, out)):
        match kind_of(path):
            case "parquet":
                images += _rows(path, target, image_column, name_column, target_column)
            case "tar":
                images += _members(path, target, target_column)
            case "dicom" if name := name_of_non_image(path):
                left_out[name] += 1
            case kind:
                images.append(BulkImage(escaped(path), str(path.absolute()), kind, target=target))
    if left_out:
        counts = ", ".join(f"{number} {name}" for name, number in sorted(left_out.items()))
        log.warning("left out DICOM files that are no images: %s", counts)
    if not images:
        raise InvalidArgument(f"there are no images; expected paths of {EXPECTED}", field="image")
    names = set[str]()
    for image in images:
        if not image.name or "\0" in image.name or len(image.name.encode()) > _MAX_NAME_BYTES:
            raise InvalidArgument(
                f"an image in {escaped(image.path)} has the name {image.name[:80]!r}; expected 1 to {_MAX_NAME_BYTES} "
                "bytes without NUL; choose another column with names",
                field="image",
            )
        if image.name in names:
            raise InvalidArgument(
                f"two images have the name {image.name}; choose a column with distinct names, or remove one of them",
                field="image",
            )
        names.add(image.name)
    return images


def _target(value: object, name: str) -> int | str:
    match value:
        case bool():
            pass
        case int():
            return value
        case str() if value.strip():
            return int(value) if value.strip().isdecimal() and value.isascii() else value.strip()
    raise InvalidArgument(f"the target of {name} is {value!r}; expected a class index or a label", field="target")


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def _rows(
    path: Path, target: int | str | None, image_column: str, name_column: str | None, target_column: str | None
) -> Iterator[BulkImage]:
    path.stat()  # the message of a missing file is that of other files
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, image_column, name_column, target_column)
            row = 0
            for group in range(file.num_row_groups):
                wanted = {each for each in (name_column, target_column) if each is not None}
                values = file.read_row_group(group, columns=[*wanted])
                count = file.metadata.row_group(group).num_rows
                names = values[name_column].to_pylist() if name_column else [None] * count
                targets = values[target_column].to_pylist() if target_column else [target] * count
                for offset, (name, value) in enumerate(zip(names, targets, strict=True)):
                    called = f"{escaped(path)}/{row}" if name is None else str(name)
                    yield BulkImage(
                        called,
                        str(path.absolute()),
                        "parquet",
                        offset,
                        group=group,
                        target=_target(value, called) if target_column else target,
                    )
                    row += 1
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} has names or targets that are not UTF-8", field="image") from error
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # Arrow raises an OSError without a number for damaged data.
        raise InvalidArgument(
            f"{path} is not a Parquet file, or is damaged: {' '.join(str(error).split())}", field="image"
        ) from error


def _check_columns(
    path: Path, schema: pyarrow.Schema, image_column: str, name_column: str | None, target_column: str | None
) -> None:
    for kind, column in {"image": image_column, "name": name_column, "target": target_column}.items():
        if column is not None and (count := schema.names.count(column)) != 1:
            has = f"{count} columns" if count else "no column"
            raise InvalidArgument(
                f"{path} has {has} {column!r}; it has {', '.join(schema.names)}; choose another {kind} column",
                field="image",
            )
    if not _holds_images(schema.field(image_column).type):
        raise InvalidArgument(
            f"the column {image_column!r} of {path} has the type {schema.field(image_column).type}; "
            'expected binary, or a struct with the binary field "bytes"',
            field="image",
        )
    if name_column is not None and not _holds_names(schema.field(name_column).type):
        raise InvalidArgument(
            f"the column {name_column!r} of {path} has the type {schema.field(name_column).type}; expected string or "
            "integer; choose another name column",
            field="image",
        )


def _holds_images(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_images(kind.field(index).type)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _holds_names(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_dictionary(kind):
        return _holds_names(kind.value_type)
    return any(
        test(kind)
        for test in (
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
            pyarrow.types.is_string_view,
            pyarrow.types.is_integer,
        )
    )


# ---- archives --------------------------------------------------------------------------------------------------------


def _members(path: Path, target: int | str | None, target_column: str | None) -> Iterator[BulkImage]:
    """Yield the images of a WebDataset archive. The files of a sample have the same name up to the first dot."""
    found: list[tarfile.TarInfo] = []
    files: dict[str, tarfile.TarInfo] = {}
    targets: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, extension = _sample(member.name)
                if member.isfile():
                    files[posixpath.normpath(member.name)] = member
                elif not (member.islnk() or member.issym()):
                    continue
                if f".{extension.rpartition('.')[2].lower()}" in SUFFIXES:
                    found.append(member)
                elif target_column is not None and extension == target_column:
                    content = archive.extractfile(member)
                    targets[key] = "" if content is None else content.read().decode("utf-8", "replace")
            end = archive.offset
    except (tarfile.ReadError, KeyError) as error:  # KeyError: a target is a link that leads nowhere
        raise InvalidArgument(
            f"{escaped(path)} is not an uncompressed tar archive, or is damaged: {error}; decompress it first, or "
            "create it again",
            field="image",
        ) from error
    _check_end(path, end)
    if not found:
        raise InvalidArgument(
            f"{escaped(path)} contains no images; expected names that end with {', '.join(SUFFIXES)}", field="image"
        )
    for member in found:
        name = f"{escaped(path)}/{escaped(member.name)}"
        place = _linked(member, files)
        if place is not None and place.issparse():
            raise InvalidArgument(
                f"{name} is a sparse file; create the archive without the option --sparse of tar", field="image"
            )
        # A link that leads nowhere is an image without data, which cannot be read.
        offset, size = (0, 0) if place is None else (place.offset_data, place.size)
        wanted = target if target_column is None else _target(targets.get(_sample(member.name)[0], ""), name)
        yield BulkImage(name, str(path.absolute()), "tar", offset, size, target=wanted)


def _linked(member: tarfile.TarInfo, files: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """Return the file with the data of a member, which may be a link; None if the archive does not contain it."""
    if member.isfile():
        return member
    # The place of a hard link is a name in the archive. That of a symbolic link is relative to the folder of the link.
    folder = posixpath.dirname(member.name) if member.issym() else ""
    return files.get(posixpath.normpath(posixpath.join(folder, member.linkname)))


def _check_end(path: Path, end: int) -> None:
    """Refuse an archive with data after the place where tarfile has stopped, whose images would be missing."""
    with path.open("rb") as file:
        file.seek(end)
        while data := file.read(_SCAN_BYTES):
            if data.strip(b"\0"):
                raise InvalidArgument(
                    f"{escaped(path)} is damaged, or consists of several archives: what follows byte {end} cannot be "
                    "read; create it again, or separate the archives",
                    field="image",
                )


def _sample(name: str) -> tuple[str, str]:
    """Split the name of a file in an archive into the key of its sample and the extension, as WebDataset does."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension
