"""Npz file with the maps of a study.

A study may be killed at any time. The maps that are finished by then are saved, and the next run finds them.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camserve.errors import InvalidArgument
from camserve_cli.study.score_csv import Key

__all__ = ["MapReader", "MapWriter"]


class MapWriter:
    """Writer of an npz file with maps, float32 [H, W], by name.

    An npz file to which maps are added is unreadable if the process is killed. The writer therefore saves each map in
    a file of its own, in a folder beside the npz file, until `finish` is called.
    """

    def __init__(self, path: Path) -> None:
        """Take over the maps of an existing npz file.

        Args:
            path: The npz file to write.

        Raises:
            OSError: A file cannot be read or written.
            InvalidArgument: The existing file is not an npz file.
        """
        self.path = path
        self._parts = path.with_name(path.name + ".parts")
        self._parts.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        self._write(name.removesuffix(".npy"), archive.read(name))
            except zipfile.BadZipFile as error:
                raise InvalidArgument(f"{path} is not an npz file: {error}") from error

    def has(self, name: str) -> bool:
        """Return True if the map of that name is saved."""
        return self._part(name).exists()

    def add(self, name: str, saliency: NDArray[np.float32]) -> None:
        """Save a map [H, W]. It is in a file when this method returns."""
        data = io.BytesIO()
        np.save(data, saliency)
        self._write(name, data.getvalue())

    def finish(self, names: Iterable[str]) -> None:
        """Write the npz file atomically with these maps in this order, and remove the folder."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        with zipfile.ZipFile(temporary, "w") as archive:
            for name in names:
                # A ZipInfo without a time makes the bytes of the file reproducible.
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), self._part(name).read_bytes())
        temporary.replace(self.path)
        shutil.rmtree(self._parts)

    def _part(self, name: str) -> Path:
        # Names contain slashes and may be longer than a file name may be.
        return self._parts / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npy"

    def _write(self, name: str, data: bytes) -> None:
        part = self._part(name)
        temporary = part.with_suffix(".tmp")
        temporary.write_bytes(data)
        temporary.replace(part)


class MapReader:
    """Reader of a finished npz file."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Args:
            path: The npz file.

        Raises:
            OSError: The file cannot be read.
            InvalidArgument: The file is not an npz file.
        """
        try:
            self._archive = np.load(path, allow_pickle=False)
        except (zipfile.BadZipFile, ValueError) as error:
            raise InvalidArgument(f"{path} is not an npz file: {error}") from error

    def get(self, key: Key) -> NDArray[np.float32] | None:
        """Return the map [H, W] of an image, model and method, or None if the file does not contain it."""
        image, model, method = key
        # Maps are named by paths if two images have the same file name, so the path is tried first.
        for image_name in (image, Path(image).name):
            for name in (f"{image_name}/{model}/{method}", image_name):
                if name in self._archive:
                    saliency: NDArray[np.float32] = self._archive[name]
                    return saliency
        return None

    def close(self) -> None:
        """Close the file."""
        self._archive.close()
