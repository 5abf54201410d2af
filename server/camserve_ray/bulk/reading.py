"""Reads the images of a bulk run on the node of an engine."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow
from pyarrow import parquet

from camserve import images
from camserve.errors import InvalidArgument
from camserve.images import ImageLike
from camserve_ray.bulk.files import escaped
from camserve_ray.bulk.inputs import BulkImage

__all__ = ["ImageReader"]


class ImageReader:
    """Reads images. Any thread may call it.

    Args:
        image_column: The column of Parquet files with the encoded images.
    """

    def __init__(self, image_column: str) -> None:
        self._image_column = image_column
        self._lock = threading.Lock()
        # A row group is the smallest part of a Parquet file that can be read. The last one is kept, because most
        # images of a chunk belong to the same group.
        self._group: tuple[str, int] | None = None
        self._values: pyarrow.ChunkedArray | None = None

    def read(self, image: BulkImage) -> ImageLike:
        """Read an image.

        Args:
            image: Where the image is.

        Returns:
            The bytes of the encoded image, or the pixels of a rendered DICOM image, uint8 [H, W] or [H, W, 3].

        Raises:
            OSError: The file cannot be read.
            CamserveError: The file contains no such image, or is too large for a request.
        """
        match image.kind:
            case "dicom":
                return _rendered(image.path)
            case "parquet":
                return self._cell(image)
            case "tar":
                images.check_size(image.size, image.name)
                with Path(image.path).open("rb") as file:
                    file.seek(image.offset)
                    data = file.read(image.size)
                if len(data) < image.size:
                    raise _changed(image)
                return data
            case _:
                return images.to_wire(image.path).encoded

    def _cell(self, image: BulkImage) -> bytes:
        with self._lock:
            if self._group != (image.path, image.group):
                self._group = self._values = None  # frees the memory of the previous group
                with parquet.ParquetFile(image.path) as file:
                    if image.group >= file.num_row_groups:
                        raise _changed(image)
                    self._values = file.read_row_group(image.group, columns=[self._image_column])[self._image_column]
                self._group = (image.path, image.group)
            assert self._values is not None, "the row group has been read"
            if image.offset >= len(self._values):
                raise _changed(image)
            value = self._values[image.offset].as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if encoded is None:
            raise InvalidArgument(f"the column {self._image_column!r} is empty in this row", field="image")
        return bytes(encoded)


def _changed(image: BulkImage) -> InvalidArgument:
    return InvalidArgument(
        f"{escaped(image.path)} has changed since the run listed its images; run the command again", field="image"
    )


def _rendered(path: str) -> ImageLike:
    from camserve_dicom.errors import DicomError, with_options
    from camserve_dicom.explaining import request_pixels
    from camserve_dicom.reading import read, silence_library_warnings

    silence_library_warnings()
    try:
        return request_pixels(read(path))
    except DicomError as error:
        if error.field not in ("regions", "burned_in", "non_image"):
            raise
        problem, _, remedy = with_options(error.message).rpartition("; ")
        raise DicomError(
            f"{problem}; bulk runs have no option for such images: use `camserve dicom explain`, where {remedy}",
            error.reason,
            field=error.field,
        ) from error
