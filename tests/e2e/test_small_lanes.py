"""Servers with small lanes: receipts, their replays, later starts, and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

import camserve
from camserve_server.config import Config, ModelConfig
from camserve_server.engine import warmup
from camserve_server.engine.engine import Engine
from camserve_server.models.model import Model
from tests.conftest import serving
from tests.e2e.test_monitoring import Scrape
from tests.processes import patient_client

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
# Its smaller batches give other bits.
MODEL = ModelConfig(name="m", source="python:tests.server.engine.test_small_lanes:BySize", input_size=(32, 32))
METHODS = ("grad-cam", "score-cam", "opti-cam", "integrated-gradients")
PARAMETERS: dict[str, dict[str, int]] = {"opti-cam": {"steps": 3}, "integrated-gradients": {"steps": 6}}
LARGE = {"forward": 8, "gradient": 8, "ascend": 4}
SIZES = {**LARGE, "forward-small": 2, "gradient-small": 2}


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, float]:
    """Let the machine count as idle. Return the rates of batches by their size, which a test may change."""
    rates = {1: 1.0, 2: 5.0, 4: 7.0, 8: 10.0, 16: 10.0}

    def seconds(model: Model, query: object, at_least_s: float, size: int) -> Generator[None, None, float]:
        yield
        return size / rates[size]

    monkeypatch.setattr(warmup, "_batch_seconds", seconds)
    monkeypatch.setattr(Engine, "machine_was_busy", lambda self, since: False)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))  # a server would set them for all later tests
    return rates


def config(folder: Path | str, **keys: object) -> Config:
    model = MODEL.model_copy(update=keys)
    return Config(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", cache_dir=str(folder), models=[model])


def explanations(client: camserve.Client, sizes: dict[str, int] | None = None) -> list[camserve.Explanation]:
    return [
        client.explain(IMAGE, method=name, parameters=PARAMETERS.get(name), target=1, batch_sizes=sizes)
        for name in METHODS
    ]


def test_receipts_and_metrics_of_small_lanes() -> None:
    with serving(config("")) as server, patient_client(server.address) as client:
        made = explanations(client)
        [model] = client.models()
        scrape = Scrape(server)
        assert [each.receipt.batch_sizes for each in made] == [SIZES] * len(METHODS)
        assert model.batch_sizes == SIZES
        for lane, size in SIZES.items():
            assert scrape.sum("camserve_batch_size", model="m", lane=lane) == size
            assert scrape.sum("camserve_rows_total", model="m", lane=lane) > 0
        for each in made:
            again = client.replay(each.receipt, IMAGE)
            assert (again.same, again.differences) == (True, {})


def test_receipts_of_servers_without_small_lanes_give_the_same_bits() -> None:
    with serving(config("", batch_size=8)) as server, patient_client(server.address) as client:
        earlier = explanations(client, LARGE)
    assert [each.receipt.batch_sizes for each in earlier] == [LARGE] * len(METHODS)
    with serving(config("")) as server, patient_client(server.address) as client:
        for each in earlier:
            again = client.replay(each.receipt, IMAGE)
            assert (again.same, again.explanation.receipt.batch_sizes) == (True, LARGE)
        own = explanations(client)
        assert not np.array_equal(own[0].saliency, earlier[0].saliency), "a small lane gives other bits here"
        mixed = dataclasses.replace(own[0].receipt, batch_sizes={**LARGE, "forward-small": 2})
        assert client.replay(mixed, IMAGE).explanation.receipt.batch_sizes == mixed.batch_sizes


def test_later_start_uses_the_small_lanes_of_the_first(tmp_path: Path, rates: dict[int, float]) -> None:
    starts = []
    for _ in range(2):
        with serving(config(tmp_path / "camserve")) as server, patient_client(server.address) as client:
            starts.append(explanations(client))
        rates[1] = rates[4] = 10.0
    for first, second in zip(*starts, strict=True):
        assert first.receipt.batch_sizes == second.receipt.batch_sizes == SIZES
        assert first.receipt.map_digests == second.receipt.map_digests


def test_unknown_kind_of_lane_is_refused() -> None:
    with serving(config("")) as server, patient_client(server.address) as client:
        with pytest.raises(camserve.CamserveError, match="forward-small, gradient-small") as caught:
            client.explain(IMAGE, method="grad-cam", batch_sizes={"ascend-small": 2})
        assert caught.value.field == "batch_sizes"
