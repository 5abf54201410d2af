"""Rate at which the driver of a bulk run receives and writes maps.

`python -m benchmarks.bulk_driver` prints it: a run on a local cluster, whose engines return ready maps. `DRIVER_S` in
`benchmarks/bulk_cost.py` is its inverse.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from camserve.batches import Variant
from camserve_ray.bulk import run
from camserve_ray.bulk.engine import CHUNK, RESULT, BulkSpec
from camserve_ray.bulk.inputs import BulkImage
from camserve_ray.bulk.rows import Row
from camserve_server.config import Config, embedded_model

SIDE = 224
METHOD = "grad-cam"
MODEL = embedded_model().name
RECEIPT = '{"model_digest": "sha256:0", "padding": "' + 1500 * "x" + '"}'  # as long as a real one


class ReadyMaps:
    """Engine whose maps are ready. It takes the place of `BulkEngine`."""

    def __init__(self, config: Config, spec: BulkSpec) -> None:
        self._saliency = np.random.default_rng(0).random((SIDE, SIDE), np.float32)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the pickled rows of each pickled chunk."""
        for chunk in map(pickle.loads, batch[CHUNK]):
            rows = [self._row(image.name) for image, _ in chunk.images]
            yield {RESULT: np.array([pickle.dumps(rows)], dtype=object)}

    def _row(self, name: str) -> Row:
        named = {"image": name, "model": MODEL, "method": METHOD, "requested_target": "", "boxes": ""}
        return Row({**named, "target": 1, "rows": 2, "error": "", "receipt": RECEIPT}, self._saliency)


def rate(count: int) -> float:
    """Return the maps per second from the first to the last one of a run.

    Args:
        count: Number of maps, at least 2.
    """
    images = [BulkImage(f"{number:08}", "", "file") for number in range(count)]
    spec = BulkSpec([Variant(METHOD, METHOD)], (), [MODEL])
    with mock.patch.object(run, "BulkEngine", ReadyMaps), tempfile.TemporaryDirectory() as folder:
        bulk = run.BulkRun(images, spec, Config(models=[embedded_model()]), Path(folder), address="local")
        results = bulk.results()
        next(results)
        start = time.perf_counter()
        received = sum(1 for _ in results)
        bulk.close()
        return received / (time.perf_counter() - start)


def main() -> None:
    """Print the rate."""
    parser = argparse.ArgumentParser(description="Measure how many maps the driver of a bulk run receives and writes.")
    parser.add_argument("--maps", type=int, default=5000, help="number of maps (default: 5,000)")
    options = parser.parse_args()
    print(f"{rate(options.maps):.0f} maps of {SIDE} × {SIDE} pixels a second")


if __name__ == "__main__":
    main()
