"""Files and JSON objects of explanations: names, writing and reading."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camserve.answers import Evaluation, Explanation, SaliencyMap
from camserve.errors import InvalidArgument
from camserve.receipt import Receipt

__all__ = ["evaluation_record", "load_map", "map_record", "record_path", "save", "saved_maps", "stems"]

# Paths of the map and of the overlay.
Files = tuple[Path, Path]


def save(image: Path, explanation: Explanation, out: Path, stem: str) -> list[Files]:
    """Write the maps, overlays and record of an explanation.

    Args:
        image: The image, which the record names.
        explanation: The explanation with one or more maps.
        out: The folder. It is created if necessary.
        stem: The files are STEM.npy, STEM.png and STEM.json. If there are several maps, they are STEM.INDEX.npy and
            STEM.INDEX.png, with the class index.

    Returns:
        The paths of the map and of the overlay, for each map.

    Raises:
        OSError: A file cannot be written.
    """
    several = len(explanation.maps) > 1
    written = [each.save(out, f"{stem}.{each.target.index}" if several else stem) for each in explanation.maps]
    record = {
        "image": str(image),
        # Names without folders, so that the files can be moved together.
        "maps": [
            _map_fields((Path(array.name), Path(png.name)), each)
            for (array, png), each in zip(written, explanation.maps, strict=True)
        ],
        **_shared_fields(explanation),
    }
    text = json.dumps(record, ensure_ascii=False, indent=2)
    # The escapes of bytes in file names that are not UTF-8 are those of JSON.
    record_path(out, stem).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return written


def record_path(out: Path, stem: str) -> Path:
    """Return the path of the record of an image."""
    return out / f"{stem}.json"


def saved_maps(receipt: Path, targets: Sequence[int]) -> list[Path | None]:
    """Find the maps that `save` wrote beside a record.

    Args:
        receipt: Path of the record.
        targets: The targets of its receipt.

    Returns:
        The path of the map of each target, or None if the file does not exist.
    """
    names = [f"{receipt.stem}.{index}.npy" for index in targets] if len(targets) > 1 else [f"{receipt.stem}.npy"]
    beside = [receipt.parent / name for name in names]
    return [path if path.is_file() else None for path in beside]


def load_map(path: Path) -> NDArray[Any]:
    """Load the array of a .npy file.

    Raises:
        OSError: The file cannot be read.
        InvalidArgument: The file does not contain one array of real numbers.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InvalidArgument(f"{path} is not a NumPy array file: {error}", field="saliency") from error
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind not in "fiu":
        raise InvalidArgument(
            f"{path} does not contain one array of real numbers; expected a map [H, W]", field="saliency"
        )
    return loaded


def stems(images: Sequence[Path], out: Path) -> list[str]:
    """Choose a distinct file stem for each image.

    No file replaces one of the images, or a JSON file that is not a record: labels are often saved beside their image
    under the same name.

    Args:
        images: The images.
        out: The folder to which the files will be written.
    """
    here = [image.name for image in images if image.resolve().parent == out.resolve()]

    def taken(stem: str) -> bool:
        written = re.compile(rf"{re.escape(stem)}(\.\d+)?\.(png|npy|json)", re.IGNORECASE)
        return (
            stem.casefold() in map(str.casefold, chosen)
            or any(map(written.fullmatch, here))
            or _is_foreign(record_path(out, stem))
        )

    chosen: list[str] = []
    for image in images:
        numbered = (f"{image.stem}-{number}" for number in itertools.count(2))
        chosen.append(next(stem for stem in itertools.chain([image.stem], numbered) if not taken(stem)))
    return chosen


def _is_foreign(record: Path) -> bool:
    """Return True if the file exists and is not a record."""
    try:
        Receipt.from_json(record.read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, InvalidArgument):
        return True
    return False


# ---- JSON objects ---------------------------------------------------------------------------------------------------


def map_record(
    image: Path, record: Path, files: Files, result: SaliencyMap, explanation: Explanation
) -> dict[str, Any]:
    """Return the JSON object of one map, which `camserve explain --json` prints."""
    return {"image": str(image), "record": str(record), **_map_fields(files, result), **_shared_fields(explanation)}


def evaluation_record(image: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Return the JSON object of the scores of one map, which `camserve evaluate --json` prints."""
    return {
        "image": str(image),
        "target": asdict(evaluation.target),
        "share": evaluation.share,
        "left_out": [asdict(each) for each in evaluation.left_out],
        "scores": evaluation.scores,
        "curves": {metric: score.curve for metric, score in evaluation.scores.items() if score.curve},
        "warnings": evaluation.warnings,
        "cost": asdict(evaluation.cost),
        "receipt": asdict(evaluation.receipt),
        "request_id": evaluation.request_id,
    }


def _map_fields(files: Files, result: SaliencyMap) -> dict[str, Any]:
    return {
        "saliency": str(files[0]),
        "overlay": str(files[1]),
        "target": asdict(result.target),
        "share": result.share,
        "left_out": [asdict(each) for each in result.left_out],
        "scores": result.scores,
        "warnings": result.warnings,
    }


def _shared_fields(explanation: Explanation) -> dict[str, Any]:
    return {
        "predictions": [asdict(each) for each in explanation.predictions],
        "cost": asdict(explanation.cost),
        "receipt": asdict(explanation.receipt),
        "request_id": explanation.request_id,
    }
