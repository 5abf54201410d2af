"""Batches of an evaluation over many images contain few padding rows."""

from __future__ import annotations

import numpy as np
import pytest

from camserve_server.config import Config, ModelConfig
from tests.conftest import serving
from tests.processes import patient_client


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "methods"), [(8, ["grad-cam", "poly-cam"]), (16, ["grad-cam", "integrated-gradients"])]
)
def test_batches_of_many_images_are_at_least_nine_tenths_full(batch_size: int, methods: list[str]) -> None:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(64, 64), batch_size=batch_size)
    images = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)
    metrics = {"insertion": {"steps": 100}, "deletion": {"steps": 100}, "average-drop": {}}
    with serving(Config(listen="127.0.0.1:0", models=[tiny])) as server, patient_client(server.address) as client:
        assert server.engine is not None
        counters = server.engine.counters
        rows = sum(r.cost.rows for r in client.evaluate_many(images, methods=methods, metrics=metrics, in_flight=6))
        assert counters.rows == rows > 4000
        slots = counters.rows + counters.padding
    assert rows / slots >= 0.9
