"""The files of a run over many images: which images, the CSV of their scores, the npz of their maps.

A run may be killed at any time: what is done by then is in the files, and is read again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from camserve.batches import Failure, Result, Variant
from camserve.errors import CamserveError, InvalidArgument
from camserve.request_messages import BoxesLike

__all__ = [
    "Key",
    "Maps",
    "Row",
    "SavedMaps",
    "Sheet",
    "check_same",
    "image_files",
    "image_names",
    "key_of",
    "metrics_in",
    "parted",
    "said",
]

# Image, model, method.
Key: TypeAlias = tuple[str, str, str]
Row: TypeAlias = dict[str, str]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# ---- which images --------------------------------------------------------------------------------------------------


def image_files(given: Iterable[Path]) -> list[Path]:
    """The files that are given, each once; for a folder its image files, sorted by name.

    Raises InvalidArgument for a folder without any.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
            if not inside:
                raise InvalidArgument(f"there are no image files in {path}", field="image")
            found += inside
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def image_names(images: Iterable[Path]) -> list[str]:
    """What the images are called in the files: their paths as given, of characters that can be written."""
    return [str(path).encode("utf-8", "backslashreplace").decode() for path in images]


# ---- the CSV --------------------------------------------------------------------------------------------------------

_BEFORE = ["image", "model", "method", "target", "label", "probability"]
_AFTER = ["rows", "queue_ms", "compute_ms", "share", "left_out", "warnings", "error", "boxes", "receipt", "curves"]
# A cell may hold several curves of 10,000 points; what the csv module takes by default is less.
_MAX_CELL_CHARACTERS = 2**27


def key_of(row: Mapping[str, str]) -> Key:
    """What the row is of."""
    return row["image"], row["model"], row["method"]


def parted(label: str) -> tuple[str, str]:
    """The label of a method, METHOD or METHOD@LAYER, as (METHOD, LAYER): "" where it is not of a study per layer."""
    method, _, layer = label.partition("@")
    return method, layer


def metrics_in(path: Path) -> list[str]:
    """The metrics of the CSV at `path`. Raises OSError, and InvalidArgument for a CSV of another kind."""
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file), [])
    metrics = columns[len(_BEFORE) : -len(_AFTER)]
    if columns != [*_BEFORE, *metrics, *_AFTER]:
        raise InvalidArgument(f"{path} is no CSV that `camserve evaluate --csv` wrote")
    return metrics


def said(error: Failure) -> str:
    """What was wrong, in one line that is the same for the same failure: without the request's id."""
    if isinstance(error, CamserveError):
        return " ".join(error.message.split())
    return f"{error.strerror}: {error.filename}" if error.strerror else str(error) or type(error).__name__


def check_same(row: Row, variant: Variant, target: int | str | None, boxes: BoxesLike | None) -> None:
    """Raises InvalidArgument where the row is of other parameters, layers, seed, target or boxes than asked for."""
    receipt = json.loads(row["receipt"])
    pairs: dict[str, tuple[Any, Any]] = {
        "seed": (receipt["seed"], variant.seed),
        "boxes": (row["boxes"] or "none", _written(boxes) or "none"),
    }
    pairs |= {name: (receipt["parameters"].get(name), value) for name, value in variant.parameters.items()}
    if variant.layers:
        pairs["layers"] = (receipt["layers"], list(variant.layers))
    if isinstance(target, int):
        pairs["target"] = (int(row["target"]), target)
    for name, (then, now) in pairs.items():
        if then != now:
            raise InvalidArgument(
                f"{row['image']} by {row['method']} is there with {name} {then}, not {now}: "
                "ask for the same, or give another CSV"
            )


class Sheet:
    """The CSV at `path`: a row for each image, model and method, added as it is done."""

    def __init__(self, path: Path, metrics: Sequence[str]) -> None:
        self.path = path
        self.metrics = list(metrics)
        self._columns = [*_BEFORE, *metrics, *_AFTER]

    def rows(self) -> dict[Key, Row]:
        """What is there, the last of each key; nothing where there is no file.

        The last line counts only if it is whole. Raises InvalidArgument where the columns are others.
        """
        csv.field_size_limit(_MAX_CELL_CHARACTERS)
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1].decode("utf-8", "replace")
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        if reader.fieldnames is None:
            return {}
        if list(reader.fieldnames) != self._columns:
            metrics = [name for name in reader.fieldnames if name not in _BEFORE + _AFTER]
            raise InvalidArgument(
                f"{self.path} has other columns: its metrics are {', '.join(metrics) or 'none'}, "
                f"asked for are {', '.join(self.metrics)}: ask for the same in this order, or give another file"
            )
        # The end of a line that was cut within a cell of several lines looks whole.
        return {key_of(row): row for row in reader if row["curves"] is not None}

    def write(self, rows: Iterable[Row]) -> None:
        """The file anew, sorted by image, model and method; in one step, so that it is whole at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        anew = self.path.with_name(self.path.name + ".tmp")
        with anew.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self._columns)
            writer.writerows([row[name] for name in self._columns] for row in sorted(rows, key=key_of))
        anew.replace(self.path)

    def add(self, name: str, result: Result, boxes: BoxesLike | None = None) -> None:
        """A row for the result, whose image is called `name` and has `boxes`. It is in the file when this returns."""
        values = {"image": name, "model": result.model, "method": result.method, **_values(result)}
        values["boxes"] = _written(boxes)
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([values.get(column, "") for column in self._columns])
        with self.path.open("ab") as file:  # one write, so that Ctrl-C falls before or after the line
            file.write(line.getvalue().encode())


def _written(boxes: BoxesLike | None) -> str:
    """As JSON; empty for none."""
    return "" if boxes is None or not len(boxes) else json.dumps(np.atleast_2d(np.asarray(boxes, float)).tolist())


def _values(result: Result) -> dict[str, Any]:
    if result.error is not None:
        return {"error": said(result.error)}
    curves = {name: [float(f"{y:.6g}") for y in score.curve] for name, score in result.scores.items() if score.curve}
    return {
        "target": result.target.index,
        "label": result.target.label,
        "probability": result.target.probability,
        **{metric: float(score) for metric, score in result.scores.items()},
        "rows": result.cost.rows,
        "queue_ms": result.cost.queue_ms,
        "compute_ms": result.cost.compute_ms,
        "share": result.explanation.share,
        "left_out": json.dumps([asdict(each) for each in result.explanation.left_out]),
        "warnings": "; ".join(result.warnings),
        "receipt": result.receipt.to_json(),
        "curves": json.dumps(curves),
    }


# ---- the npz --------------------------------------------------------------------------------------------------------


class Maps:
    """The maps of a run, float32 [H, W], by name.

    Until `finish` each lies in a file of its own in a folder beside the npz at `path`: an npz that is added to is
    unreadable when the process is killed.
    """

    def __init__(self, path: Path) -> None:
        """Takes what an npz at `path` has. Raises OSError, and InvalidArgument where it is none."""
        self.path = path
        self._parts = path.with_name(path.name + ".parts")
        self._parts.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        self._write(name.removesuffix(".npy"), archive.read(name))
            except zipfile.BadZipFile as error:
                raise InvalidArgument(f"{path} is no npz file: {error}") from error

    def has(self, name: str) -> bool:
        """Whether the map of that name is there."""
        return self._part(name).exists()

    def add(self, name: str, saliency: NDArray[np.float32]) -> None:
        """Keeps a map. It is in a file when this returns."""
        data = io.BytesIO()
        np.save(data, saliency)
        self._write(name, data.getvalue())

    def finish(self, names: Iterable[str]) -> None:
        """The npz anew, of these names in this order; in one step. The folder goes."""
        anew = self.path.with_name(self.path.name + ".tmp")
        with zipfile.ZipFile(anew, "w") as archive:
            for name in names:
                # Without the time of day: the same maps are the same file.
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), self._part(name).read_bytes())
        anew.replace(self.path)
        shutil.rmtree(self._parts)

    def _part(self, name: str) -> Path:
        # Names hold slashes, and may be longer than a file's may.
        return self._parts / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npy"

    def _write(self, name: str, data: bytes) -> None:
        part = self._part(name)
        anew = part.with_suffix(".tmp")
        anew.write_bytes(data)
        anew.replace(part)


class SavedMaps:
    """The finished npz at `path`, to be read."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and InvalidArgument where there is no npz."""
        try:
            self._archive = np.load(path, allow_pickle=False)
        except (zipfile.BadZipFile, ValueError) as error:
            raise InvalidArgument(f"{path} is no npz file: {error}") from error

    def get(self, key: Key) -> NDArray[np.float32] | None:
        """The map, [H, W], under whichever name it was saved; None where there is none."""
        image, model, method = key
        # A path comes before a name: where two images have the same name, maps are named by their paths.
        for image_name in (image, Path(image).name):
            for name in (f"{image_name}/{model}/{method}", image_name):
                if name in self._archive:
                    saliency: NDArray[np.float32] = self._archive[name]
                    return saliency
        return None

    def close(self) -> None:
        """Closes the file."""
        self._archive.close()
