"""Priorities and quotas of callers, over a real channel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest
import skimage.data

import camserve
from camserve_server.config import Config, ModelConfig, TokenConfig
from camserve_server.engine.job import Job
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.e2e.engines import after_submit, engine_of, wait_until, wait_until_idle
from tests.processes import LIMIT_S, patient_client
from tests.support import stopped

IMAGE = skimage.data.chelsea()
LONG: dict[str, Any] = {"method": "rise", "parameters": {"masks": 6000}}
ENDLESS: dict[str, Any] = {"method": "rise", "parameters": {"masks": 1_000_000}}


def token(name: str, **rights: Any) -> TokenConfig:
    """Return a token whose secret is its name."""
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


class ClientWithoutRetries(camserve.Client):
    """A client that reports the first refusal instead of waiting for the retry delay."""

    _extra_options: ClassVar = [("grpc.enable_retries", 0)]


def running_stream(client: camserve.Client, **arguments: Any) -> Any:
    """Start a long request and return its stream after the first progress event."""
    stream = client.explain_stream(IMAGE, **arguments)
    next(event for event in stream if isinstance(event, camserve.Progress))
    return stream


@pytest.mark.slow
def test_high_priority_request_ends_before_earlier_ones(server: Server) -> None:
    """All requests have the same length. The map is the same at each priority."""
    priorities = ("low", "normal", "high")
    submitted: list[Job[Any]] = []
    ended: list[Job[Any]] = []

    def note(job: Job[Any]) -> None:
        submitted.append(job)
        job.future.add_done_callback(lambda _: ended.append(job))

    with (
        patient_client(server.address, token="anna") as anna,
        ThreadPoolExecutor(3) as pool,
        after_submit(note),
    ):

        def explain(priority: str) -> camserve.Explanation:
            return anna.explain(IMAGE, method="rise", parameters={"masks": 1900}, priority=priority)

        calls = []
        with stopped(engine_of(server)):  # no request runs before all of them are in the queue
            for priority in priorities:
                calls.append(pool.submit(explain, priority))
                wait_until(lambda: len(submitted) == len(calls))
        maps = [call.result(LIMIT_S).saliency for call in calls]
    assert [priorities[submitted.index(job)] for job in ended] == ["high", "normal", "low"]
    assert all(np.array_equal(each, maps[0]) for each in maps)


def test_quota_delays_one_caller_and_not_others(server: Server) -> None:
    with (
        patient_client(server.address, token="modest") as modest,
        patient_client(server.address, token="anna") as anna,
    ):
        stream = running_stream(modest, **ENDLESS)  # the first request of a caller may exceed its quota
        with (
            ClientWithoutRetries(server.address, token="modest", timeout=LIMIT_S) as once,
            pytest.raises(camserve.ResourceExhausted, match="this caller owes") as caught,
        ):
            next(iter(once.explain_stream(IMAGE, **LONG)))
        assert caught.value.reason == "QUOTA_EXCEEDED"
        assert caught.value.retry_after_s is not None
        assert anna.explain(IMAGE, method="grad-cam").maps
        stream.close()
        wait_until_idle(server)
        assert modest.explain(IMAGE, method="grad-cam").maps


def test_default_quota_applies_to_callers_without_their_own(server: Server) -> None:
    with (
        patient_client(server.address, token="anna") as anna,
        ClientWithoutRetries(server.address, token="anna", timeout=LIMIT_S) as once,
    ):
        stream = running_stream(anna, **{**LONG, "parameters": {"masks": 100_000}})
        with pytest.raises(camserve.ResourceExhausted, match="the caller's limit is 10000 rows"):
            next(iter(once.explain_stream(IMAGE, method="grad-cam")))
        stream.close()


def test_priority_above_that_of_the_token_is_refused(server: Server) -> None:
    with patient_client(server.address, token="patient") as patient:
        assert patient.explain(IMAGE, method="grad-cam").maps
        assert patient.evaluate(IMAGE, method="grad-cam", metrics="average-gain", priority="low").scores
        with pytest.raises(camserve.PermissionDenied, match="the token of patient permits at most low") as caught:
            patient.explain(IMAGE, method="grad-cam", priority="normal")
        assert caught.value.field == "priority"


def test_unknown_priority_is_refused(server: Server) -> None:
    with patient_client(server.address, token="anna") as anna:
        with pytest.raises(camserve.InvalidArgument, match="'urgent'; expected low, normal, high or empty") as caught:
            anna.explain(IMAGE, method="grad-cam", priority="urgent")
        assert caught.value.field == "priority"
