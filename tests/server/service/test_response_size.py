"""Responses that are larger than the server's limit: the caller and the log get the same error, without a retry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import structlog

import camserve
from camserve_server.config import Config, ModelConfig
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.e2e.engines import after_submit

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
# Two maps [32, 32] of float32 have 8 KiB.
LIMIT = 3 * 4096


@pytest.fixture(scope="module", params=[1, 2], ids=["plain", "front ends"])
def limited(request: pytest.FixtureRequest) -> Iterator[Server]:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    with serving(
        Config(listen="127.0.0.1:0", models=[tiny], max_message_bytes=LIMIT, frontends=request.param)
    ) as server:
        yield server


def codes(lines: list[Any]) -> list[str]:
    return [line["code"] for line in lines if line["event"] == "call"]


@pytest.mark.parametrize("timeout", [20.0, 200.0], ids=["unary", "stream"])
def test_response_of_a_known_size_is_refused_before_any_work(limited: Server, timeout: float) -> None:
    jobs: list[object] = []
    with (
        camserve.Client(limited.address, timeout=timeout) as client,
        after_submit(jobs.append),
        structlog.testing.capture_logs() as lines,
    ):
        assert len(client.explain(IMAGE, method="grad-cam", top_k=2).maps) == 2
        assert len(client.explain(IMAGE, method="grad-cam", top_k=4, map_dtype="uint8").maps) == 4
        with pytest.raises(camserve.TooLarge, match=r"request fewer targets, or smaller maps") as caught:
            client.explain(IMAGE, method="grad-cam", top_k=4)
    assert (caught.value.reason, caught.value.retry_after_s) == ("TOO_LARGE", None)
    assert len(jobs) == 2
    assert codes(lines) == ["OK", "OK", "RESOURCE_EXHAUSTED"]


@pytest.mark.parametrize("timeout", [20.0, 200.0], ids=["unary", "stream"])
def test_log_contains_the_code_of_a_response_whose_size_was_not_known(limited: Server, timeout: float) -> None:
    """RISE makes maps at the resolution of the input, so native maps are not smaller."""
    rise: dict[str, Any] = {"method": "rise", "parameters": {"masks": 4}, "top_k": 4, "native_maps": True}
    with (
        camserve.Client(limited.address, timeout=timeout) as client,
        structlog.testing.capture_logs() as lines,
        pytest.raises(camserve.TooLarge),
    ):
        client.explain(IMAGE, **rise)
    assert codes(lines) == ["RESOURCE_EXHAUSTED"]


def test_lists_have_the_same_limit() -> None:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    with (
        serving(Config(listen="127.0.0.1:0", models=[tiny], max_message_bytes=100)) as server,
        camserve.Client(server.address) as client,
        structlog.testing.capture_logs() as lines,
    ):
        for ask in (client.models, client.methods, client.metrics, lambda: client.methods("tiny")):
            with pytest.raises(camserve.TooLarge):
                ask()
    assert codes(lines) == ["RESOURCE_EXHAUSTED"] * 4
