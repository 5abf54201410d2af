"""What the command line writes: the files of an explanation, and JSON objects. And how it finds them again."""

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

__all__ = ["evaluation_record", "load_map", "map_record", "record_of", "save", "saved_maps", "stems"]

# The map and the overlay.
Files = tuple[Path, Path]


def save(image: Path, explanation: Explanation, out: Path, stem: str) -> list[Files]:
    """Writes into `out`, made if need be, STEM.npy and STEM.png, and STEM.json, the record of both.

    Where there are several maps the first two are STEM.INDEX.npy and STEM.INDEX.png for each. Returns those.
    """
    several = len(explanation.maps) > 1
    written = [each.save(out, f"{stem}.{each.target.index}" if several else stem) for each in explanation.maps]
    record = {
        "image": str(image),
        # Names alone, so that the files can be moved together.
        "maps": [
            _of_map((Path(array.name), Path(png.name)), each)
            for (array, png), each in zip(written, explanation.maps, strict=True)
        ],
        **_of_all(explanation),
    }
    text = json.dumps(record, ensure_ascii=False, indent=2)
    record_of(out, stem).write_text(text + "\n", encoding="utf-8")
    return written


def record_of(out: Path, stem: str) -> Path:
    """Where the record of an image is written."""
    return out / f"{stem}.json"


def saved_maps(receipt: Path, targets: Sequence[int]) -> list[Path | None]:
    """For each target the map that `save` wrote beside its record; None where there is none now."""
    names = [f"{receipt.stem}.{index}.npy" for index in targets] if len(targets) > 1 else [f"{receipt.stem}.npy"]
    beside = [receipt.parent / name for name in names]
    return [path if path.is_file() else None for path in beside]


def load_map(path: Path) -> NDArray[Any]:
    """The array of real numbers in a .npy file. Raises OSError, and InvalidArgument where there is none."""
    try:
        loaded = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InvalidArgument(f"{path} is not a NumPy array file: {error}", field="saliency") from error
    if not isinstance(loaded, np.ndarray) or loaded.dtype.kind not in "fiu":
        raise InvalidArgument(f"{path} does not hold one array of real numbers", field="saliency")
    return loaded


def stems(images: Sequence[Path], out: Path) -> list[str]:
    """A file stem for each image, none twice and none whose files would replace one of the images.

    Nor a JSON file that is no record: labels of an image often lie beside it under the same name.
    """
    here = [image.name for image in images if image.resolve().parent == out.resolve()]

    def taken(stem: str) -> bool:
        written = re.compile(rf"{re.escape(stem)}(\.\d+)?\.(png|npy|json)", re.IGNORECASE)
        return (
            stem.casefold() in map(str.casefold, found)
            or any(map(written.fullmatch, here))
            or _is_foreign(record_of(out, stem))
        )

    found: list[str] = []
    for image in images:
        numbered = (f"{image.stem}-{number}" for number in itertools.count(2))
        found.append(next(stem for stem in itertools.chain([image.stem], numbered) if not taken(stem)))
    return found


def _is_foreign(record: Path) -> bool:
    try:
        Receipt.from_json(record.read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, InvalidArgument):
        return True
    return False


# ---- JSON objects ---------------------------------------------------------------------------------------------------


def map_record(image: Path, record: Path, files: Files, shown: SaliencyMap, of: Explanation) -> dict[str, Any]:
    """One map of one image, as a line of `--json`."""
    return {"image": str(image), "record": str(record), **_of_map(files, shown), **_of_all(of)}


def evaluation_record(image: Path, evaluation: Evaluation) -> dict[str, Any]:
    """The scores of one map, as a line of `--json`."""
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


def _of_map(files: Files, shown: SaliencyMap) -> dict[str, Any]:
    return {
        "saliency": str(files[0]),
        "overlay": str(files[1]),
        "target": asdict(shown.target),
        "share": shown.share,
        "left_out": [asdict(each) for each in shown.left_out],
        "scores": shown.scores,
        "warnings": shown.warnings,
    }


def _of_all(explanation: Explanation) -> dict[str, Any]:
    return {
        "predictions": [asdict(each) for each in explanation.predictions],
        "cost": asdict(explanation.cost),
        "receipt": asdict(explanation.receipt),
        "request_id": explanation.request_id,
    }
