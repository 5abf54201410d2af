"""Priorities and quotas, over a real channel."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import skimage.data

import camserve
from camserve_server.config import Config, ModelConfig, TokenConfig
from camserve_server.service.server import Server
from tests.conftest import serving

PICTURE = skimage.data.chelsea()
LONG: dict[str, Any] = {"method": "rise", "parameters": {"masks": 6000}}
ENDLESS: dict[str, Any] = {"method": "rise", "parameters": {"masks": 1_000_000}}


def token(name: str, **rights: Any) -> TokenConfig:
    """Whose secret is its name."""
    return TokenConfig(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **rights)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    model = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    config = Config(
        listen="127.0.0.1:0",
        device="cpu",
        models=[model],
        max_rows_owed_per_caller=10_000,
        tokens=[token("anna"), token("modest", max_rows_owed=100), token("patient", priority="low"), token("operator")],
    )
    with serving(config) as running:
        yield running


def begun(client: camserve.Client, **asked: Any) -> Any:
    """A stream that is under way."""
    stream = client.explain_stream(PICTURE, **asked)
    next(event for event in stream if isinstance(event, camserve.Progress))
    return stream


def test_a_high_request_passes_one_that_came_before_it(server: Server) -> None:
    """Both are as long; the map is the same at any priority."""
    with camserve.Client(server.address, token="anna", timeout=120) as anna:
        ended: dict[str, float] = {}
        maps = {}

        def ask(priority: str) -> None:
            found = anna.explain(PICTURE, method="rise", parameters={"masks": 3000}, priority=priority)
            maps[priority] = found.saliency
            ended[priority] = time.monotonic()

        threads = [threading.Thread(target=ask, args=(priority,)) for priority in ("low", "normal", "high")]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        assert sorted(ended, key=ended.__getitem__) == ["high", "normal", "low"]
        assert all(np.array_equal(each, maps["low"]) for each in maps.values())


def test_a_caller_that_owes_too_much_waits_and_others_do_not(server: Server) -> None:
    with (
        camserve.Client(server.address, token="modest", timeout=60) as modest,
        camserve.Client(server.address, token="anna", timeout=60) as anna,
    ):
        stream = begun(modest, **ENDLESS)  # the only one of this caller, however long
        with pytest.raises(camserve.ResourceExhausted, match="this caller owes") as caught:
            next(iter(modest.explain_stream(PICTURE, **LONG, timeout=1)))
        assert caught.value.reason == "QUOTA_EXCEEDED"
        assert caught.value.retry_after_s is not None
        assert anna.explain(PICTURE, method="grad-cam").maps
        stream.close()
        until = time.monotonic() + 20
        while server.engine.rows_owed():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert modest.explain(PICTURE, method="grad-cam").maps


def test_the_quota_of_all_holds_for_who_has_none_of_its_own(server: Server) -> None:
    with camserve.Client(server.address, token="anna", timeout=60) as anna:
        stream = begun(anna, **{**LONG, "parameters": {"masks": 100_000}})
        with pytest.raises(camserve.ResourceExhausted, match="the caller's limit is 10000 rows"):
            next(iter(anna.explain_stream(PICTURE, method="grad-cam", timeout=1)))
        stream.close()


def test_nobody_gets_a_higher_priority_than_the_token_has(server: Server) -> None:
    with camserve.Client(server.address, token="patient", timeout=60) as patient:
        assert patient.explain(PICTURE, method="grad-cam").maps
        assert patient.evaluate(PICTURE, method="grad-cam", metrics="average-gain", priority="low").scores
        with pytest.raises(camserve.PermissionDenied, match="patient may ask for priority low at most") as caught:
            patient.explain(PICTURE, method="grad-cam", priority="normal")
        assert caught.value.field == "priority"


def test_an_unknown_priority_is_refused(server: Server) -> None:
    with camserve.Client(server.address, token="anna", timeout=60) as anna:
        with pytest.raises(camserve.InvalidArgument, match="'urgent'; expected low, normal, high or empty") as caught:
            anna.explain(PICTURE, method="grad-cam", priority="urgent")
        assert caught.value.field == "priority"
