"""The output folder of a bulk run.

It contains `run.json` with the settings, and numbered parts: `scores/part-00000.parquet` with rows, and
`maps/part-00000.npz` with their maps. A part is complete when its Parquet file exists, so a run may be killed at any
time: the next one keeps the complete parts and repeats the other images.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
from pyarrow import compute, parquet

from camserve.errors import InvalidArgument
from camserve_ray.bulk import rows
from camserve_ray.bulk.files import scores_folder
from camserve_ray.bulk.rows import Key, Row

__all__ = ["Output"]

# A part is written when one of these limits is reached. A killed run loses the rows of one part.
PART_ROWS = 1000
PART_BYTES = 64 << 20  # of maps
PART_S = 30.0


class Output:
    """Writer of the output folder. Only one process may use a folder at a time.

    Args:
        folder: The folder. It is created if necessary.
        metrics: Names of the metrics.
        settings: The settings of the run, as JSON values. A folder accepts rows of equal settings only.

    Attributes:
        finished: The keys of the rows of earlier runs without error, with the requested target and the
            boxes, as `rows.requested` returns them.

    Raises:
        OSError: A file cannot be read or written.
        InvalidArgument: Another process uses the folder, or its rows have other settings.
    """

    def __init__(self, folder: Path, metrics: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._schema = rows.schema(metrics)
        self._scores, self._maps = scores_folder(folder), folder / "maps"
        self._scores.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise InvalidArgument(
                f"another run writes to {folder}; wait for its end, or choose another folder"
            ) from error
        except OSError as error:  # for example of a network file system without locks
            self._lock.close()
            raise OSError(error.errno, f"cannot lock the folder ({error.strerror})", str(folder)) from error
        try:
            self._check_settings(settings)
            self._drop_failed()
            self.finished = dict(self._read_finished())
            self._digests = dict(self._read_digests())
        except BaseException:
            self._lock.close()
            raise
        self._pending: list[Row] = []
        self._bytes, self._since = 0, time.monotonic()

    def add(self, row: Row) -> None:
        """Add a row. It is on disk after the next `flush`, which happens now if the part is large or old.

        Raises:
            OSError: A file cannot be written.
            InvalidArgument: The weights of the model differ from those of the other rows.
        """
        self._check_digest(row)
        if not self._pending:
            self._since = time.monotonic()
        self._pending.append(row)
        self._bytes += 0 if row.saliency is None else row.saliency.nbytes
        old = time.monotonic() - self._since >= PART_S
        if old or len(self._pending) >= PART_ROWS or self._bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the added rows as a new part."""
        if not self._pending:
            return
        number = 1 + max((int(path.stem.removeprefix("part-")) for path in self._parts()), default=-1)
        part = f"part-{number:05}"
        file, names = self._write_maps(part)
        values = [
            {**row.values, **({} if name is None else {"map_file": file, "map_name": name})}
            for row, name in zip(self._pending, names, strict=True)
        ]
        # The maps are written before the rows, so that each row on disk has its map.
        _replace(self._scores / f"{part}.parquet", pyarrow.Table.from_pylist(values, schema=self._schema))
        self._pending, self._bytes = [], 0

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return columns of all rows on disk."""
        return [each for table in self._tables(columns) for each in table.to_pylist()]

    def close(self) -> None:
        """Write the added rows, and let other processes use the folder."""
        try:
            self.flush()
        finally:
            self._lock.close()

    def _write_maps(self, part: str) -> tuple[str, list[str | None]]:
        """Write the maps of the pending rows. Return their file and the name of each, or None for a row without map."""
        if all(row.saliency is None for row in self._pending):
            return "", [None] * len(self._pending)
        self._maps.mkdir(exist_ok=True)
        path = self._maps / f"{part}.npz"
        names: list[str | None] = []
        with _replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            for row in self._pending:
                names.append(None if row.saliency is None else "/".join(rows.key(row.values)))
                if row.saliency is not None:
                    data = io.BytesIO()
                    np.save(data, row.saliency)
                    # A ZipInfo without a time makes the bytes of the file reproducible.
                    archive.writestr(zipfile.ZipInfo(f"{names[-1]}.npy"), data.getvalue())
        return str(path.relative_to(self.folder)), names

    # ---- the parts of earlier runs -----------------------------------------------------------------------------------

    def _parts(self) -> list[Path]:
        return sorted(self._scores.glob("part-[0-9]*.parquet"))

    def _tables(self, columns: Sequence[str]) -> Iterator[pyarrow.Table]:
        for path in self._parts():
            yield parquet.read_table(path, columns=[*columns])

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / "run.json"
        current = json.loads(json.dumps(settings))
        # A run whose settings were refused has left no results. Then other settings may take their place.
        if path.exists() and self._parts():
            try:
                existing = json.loads(path.read_bytes())
                if not isinstance(existing, dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise InvalidArgument(f"{path} is damaged ({error}); choose another folder") from error
            for name, old, new in _differences(existing, current):
                raise InvalidArgument(
                    f"{self.folder} has results with {name} {json.dumps(old)}; this run uses {json.dumps(new)}; use "
                    "the same settings, or choose another folder"
                )
            return
        if self._parts():
            raise InvalidArgument(f"{self.folder} has results without run.json; choose another folder")
        with _replacing(path) as file:
            file.write(json.dumps(current, indent=1).encode() + b"\n")

    def _drop_failed(self) -> None:
        """Remove the rows of failed images, so that this run tries them again."""
        for path in self._parts():
            try:
                table = parquet.read_table(path)
            except (pyarrow.ArrowException, OSError) as error:
                raise InvalidArgument(
                    f"{path} is damaged ({' '.join(str(error).split())}); remove it to evaluate its images again, or "
                    "choose another folder"
                ) from error
            if not table.schema.equals(self._schema):
                raise InvalidArgument(f"{path} has other columns than this run; choose another folder")
            kept = table.filter(compute.equal(table["error"], ""))
            if not kept.num_rows:
                path.unlink()
            elif kept.num_rows < table.num_rows:
                _replace(path, kept)

    def _read_finished(self) -> Iterator[tuple[Key, tuple[str, str]]]:
        for each in self.rows(["image", "model", "method", "requested_target", "boxes"]):
            yield rows.key(each), (each["requested_target"], each["boxes"])

    def _read_digests(self) -> Iterator[tuple[str, str]]:
        for table in self._tables(["model", "receipt"]):
            for model in table["model"].unique().to_pylist():
                first = compute.index(table["model"], model).as_py()
                yield model, json.loads(table["receipt"][first].as_py())["model_digest"]

    def _check_digest(self, row: Row) -> None:
        if row.values["error"]:
            return
        model, digest = row.values["model"], json.loads(row.values["receipt"])["model_digest"]
        if self._digests.setdefault(model, digest) != digest:
            raise InvalidArgument(
                f"the weights of {model} have the digest {digest}, but other rows in {self.folder} were computed with "
                f"{self._digests[model]}; use the same weights on all nodes and in all runs, or choose another folder"
            )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the old and the new value of each setting that differs. A missing one is None."""
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


def _replace(path: Path, table: pyarrow.Table) -> None:
    with _replacing(path) as file:
        parquet.write_table(table, file)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file, which replaces the file at the path when the context ends without an exception.

    The contents are on disk before that, so that after a power failure no incomplete file has the name.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # readers of Parquet folders ignore names that begin with a dot
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # half a file is of no use, and the disk may be full
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
