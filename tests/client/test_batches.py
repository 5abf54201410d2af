"""Requests for many images at once, against the fake server."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

import camserve
from camserve import Variant, batches, request_messages
from camserve_server.errors import CamserveError, Expired, QueueFull
from camserve_server.service import status
from tests.client.fake_server import WAIT_S, Servicer


class ConcurrencyCounter:
    """Count the requests that the fake server processes at the same time.

    The first requests do not return before `expected` requests have arrived. They then stay for another moment, in
    which the counter would see a request in excess.
    """

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.current = self.maximum = 0
        self.lock = threading.Lock()
        self.reached = threading.Event()

    def __call__(self, _: Any) -> None:
        with self.lock:
            self.current += 1
            self.maximum = max(self.maximum, self.current)
            full = self.current == self.expected and not self.reached.is_set()
        if full:
            time.sleep(0.2)
            self.reached.set()
        assert self.reached.wait(WAIT_S), "fewer requests than expected run at the same time"
        with self.lock:
            self.current -= 1


def keys(results: Any) -> set[tuple[int, str, str]]:
    return {(result.index, result.model, result.method) for result in results}


def test_evaluate_many_runs_every_method_on_every_image_and_model(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8], ramp: NDArray[np.float32]
) -> None:
    variants: list[str | Variant] = ["grad-cam", Variant("short", "opti-cam", {"steps": 2}, layers=["deep"], seed=7)]
    results = list(
        client.evaluate_many(
            [pixels, pixels],
            methods=variants,
            models=["a", "b"],
            metrics={"insertion": {"steps": 9}},
            labels=[8, "cock"],
        )
    )
    assert keys(results) == {(i, model, name) for i in (0, 1) for model in "ab" for name in ("grad-cam", "short")}
    for result in results:
        assert result.error is None
        assert result.image is pixels
        assert result.target.index == (8, 7)[result.index]
        assert (result.scores, result.cost.rows) == ({"insertion": 0.25}, 12)
        assert result.warnings == ("degenerate: the map is a ramp",)
        assert result.receipt.method == {"grad-cam": "grad-cam", "short": "opti-cam"}[result.method]
        np.testing.assert_array_equal(result.saliency, ramp)
    [request] = [
        each
        for each in servicer.requests
        if (each.method.name, each.model, each.targets[0].index) == ("opti-cam", "a", 8)
    ]
    assert (dict(request.method.parameters.items()), request.method.layers, request.method.seed) == (
        {"steps": 2},
        ["deep"],
        7,
    )
    assert dict(request.metrics[0].parameters.items()) == {"steps": 9}


def test_methods_can_be_names_mappings_or_variants(client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    for methods in ("grad-cam", ["grad-cam"], {"grad-cam": {"steps": 2}}, [Variant("grad-cam", "grad-cam")]):
        [result] = client.evaluate_many(iter([pixels]), methods=methods, metrics="insertion")
        assert (result.model, result.method, result.receipt.model) == ("first", "grad-cam", "first")


@pytest.mark.slow
def test_failed_request_returns_its_error_and_does_not_stop_others(
    client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    images: list[Any] = [pixels, "none.png", np.zeros((2, 2)), None, pixels]
    results = {result.index: result for result in client.evaluate_many(images, methods=["a", "b"], in_flight=2)}
    errors = [type(results[index].error) for index in range(5)]
    assert errors == [type(None), FileNotFoundError, camserve.InvalidArgument, camserve.InvalidArgument, type(None)]
    with pytest.raises(FileNotFoundError):
        _ = results[1].scores
    with camserve.Client("127.0.0.1:1") as unreachable:
        [result] = unreachable.evaluate_many([pixels], methods="a")
    assert isinstance(result.error, camserve.Unavailable)
    assert result.model == ""


QUEUE_FULL = QueueFull("too many rows are owed", retry_after_s=0.01)
UNREACHABLE = Expired("too many rows run before", reason="DEADLINE_UNREACHABLE", retry_after_s=0.01)


class Busy:
    """Refuse the first requests with the error of a server whose queue is full."""

    def __init__(self, refusals: int, error: CamserveError = QUEUE_FULL) -> None:
        self.refusals = iter(range(refusals))
        self.error = error

    def __call__(self, context: Any) -> None:
        if next(self.refusals, None) is not None:
            error = self.error
            context.set_trailing_metadata(status.trailing_metadata(error, "given"))
            context.abort(status.code(error), str(error))


def test_request_is_retried_while_the_server_is_busy(
    servicer: Servicer,
    address: str,
    client: camserve.Client,
    pixels: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "MIN_RETRY_WAIT_S", 0.001)
    servicer.before = Busy(5)
    results = list(client.evaluate_many([pixels] * 4, methods="a", in_flight=3))
    assert [result.error for result in results] == [None] * 4
    assert len(servicer.requests) == 9

    async def ask() -> list[camserve.Result]:
        async with camserve.aio.Client(address) as client:
            return [result async for result in client.evaluate_many([pixels] * 2, methods="a")]

    servicer.before = Busy(3)
    assert [result.error for result in asyncio.run(ask())] == [None] * 2
    servicer.before = Busy(1000)
    monkeypatch.setattr(batches, "MAX_ATTEMPTS", 3)
    servicer.requests.clear()
    [result] = client.evaluate_many([pixels], methods="a")
    assert isinstance(result.error, camserve.ResourceExhausted)
    assert len(servicer.requests) == 3


def test_request_whose_deadline_cannot_be_met_is_retried(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MIN_RETRY_WAIT_S", 0.001)
    servicer.before = Busy(2, UNREACHABLE)
    [result] = client.explain_many([pixels])
    assert result.error is None
    assert len(servicer.requests) == 3
    servicer.before = Busy(2, Expired("the deadline passed"))
    [result] = client.explain_many([pixels])
    assert isinstance(result.error, camserve.DeadlineExceeded)
    assert len(servicer.requests) == 4


def test_many_requests_have_a_timeout_only_if_the_user_sets_one(
    servicer: Servicer, address: str, pixels: NDArray[np.uint8]
) -> None:
    left: list[float | None] = []
    servicer.before = lambda context: left.append(context.time_remaining())

    async def ask(**options: Any) -> None:
        async with camserve.aio.Client(address) as client:
            async for result in client.explain_many([pixels], **options):
                assert result.error is None

    with camserve.Client(address) as client, camserve.Client(address, timeout=50) as impatient:
        list(client.explain_many([pixels]))
        list(client.evaluate_many([pixels], methods="a"))
        asyncio.run(ask())
        assert [each is None or each > 1e6 for each in left] == [True] * 3
        client.explain(pixels)
        list(client.explain_many([pixels], timeout=40))
        list(impatient.explain_many([pixels]))
        asyncio.run(ask(timeout=20))
        assert left[3:] == [pytest.approx(each, abs=10) for each in (30, 40, 50, 20)]


def test_boxes_and_masks_belong_to_single_images(
    servicer: Servicer, address: str, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    def truths_received() -> list[tuple[int, bool]]:
        return [(len(each.truth.boxes), each.truth.HasField("mask")) for each in servicer.requests]

    truths: Any = {"boxes": [[(0, 0, 2, 3), (1, 1, 2, 2)], None], "masks": iter([None, np.eye(3)])}
    assert all(not each.error for each in client.evaluate_many([pixels] * 2, methods="a", in_flight=1, **truths))
    assert truths_received() == [(2, False), (0, True)]

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            assert [each.error async for each in client.evaluate_many([pixels], methods="a", boxes=[(0, 0, 1, 1)])] == [
                None
            ]

    servicer.requests.clear()
    asyncio.run(ask())
    assert truths_received() == [(1, False)]
    with pytest.raises(ValueError, match="longer"):
        list(client.evaluate_many([pixels], methods="a", boxes=[None, None]))


def test_in_flight_limits_requests_and_images_read(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    servicer.before = counter = ConcurrencyCounter(4)
    read = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(12):
            read += 1
            yield pixels

    for number, _ in enumerate(client.evaluate_many(images(), methods=["a", "b"], in_flight=4), 1):
        assert read <= (number + 4 + 1) / 2 + 1
    assert number == 24
    assert counter.maximum == 4


def test_invalid_arguments_raise_immediately(client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    for wrong in ({"in_flight": 0}, {"methods": ["a", "a"]}, {"images": "dog.jpg"}):
        with pytest.raises(camserve.InvalidArgument):
            client.evaluate_many(**{"images": [pixels], "methods": "a"} | wrong)
    with pytest.raises(ValueError, match="shorter"):
        list(client.evaluate_many([pixels, pixels], methods="a", labels=[1]))


def test_skipped_results_are_not_requested(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    done = client.evaluate_many([pixels] * 2, methods=["a", "b"], models="m", skip={(0, "m", "a"), (1, "m", "b")})
    assert keys(done) == {(0, "m", "b"), (1, "m", "a")}
    assert len(servicer.requests) == 2


def test_closing_the_iterator_cancels_requests_in_flight(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    results = client.evaluate_many([pixels, "none.png"], methods="a", models="slow", in_flight=2)
    assert isinstance(next(results).error, FileNotFoundError)
    assert servicer.started.wait(WAIT_S)
    results.close()
    assert servicer.cancelled.wait(WAIT_S)


def test_aio_evaluate_many_limits_and_cancels_requests(
    servicer: Servicer, address: str, pixels: NDArray[np.uint8]
) -> None:
    servicer.before = counter = ConcurrencyCounter(4)

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            results = client.evaluate_many([pixels, "none.png"] * 6, methods=["a", "b"], in_flight=4)
            all_results = [result async for result in results]
            assert {(each.index, each.method) for each in all_results} == {
                (i, name) for i in range(12) for name in "ab"
            }
            assert all((each.error is None) == (each.index % 2 == 0) for each in all_results)
            servicer.before = lambda context: None
            async with aclosing(client.evaluate_many(["none.png", pixels], methods="a", models="slow")) as results:
                async for result in results:
                    assert isinstance(result.error, FileNotFoundError)
                    assert await asyncio.to_thread(servicer.started.wait, WAIT_S)
                    break
            assert await asyncio.to_thread(servicer.cancelled.wait, WAIT_S)

    asyncio.run(ask())
    assert counter.maximum == 4


def test_explain_many_accepts_an_iterator_without_length(
    servicer: Servicer, address: str, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    images: Iterator[Any] = (each for each in [pixels, "none.png", pixels])
    results = {each.index: each for each in client.explain_many(images, method="grad-cam", top_k=2, in_flight=2)}
    assert [type(results[index].error) for index in range(3)] == [type(None), FileNotFoundError, type(None)]
    assert results[0].image is pixels
    assert [each.target.index for each in results[2].explanation.maps] == [281, 8]
    assert (results[2].model, results[2].method) == ("first", "grad-cam")
    labelled = client.explain_many([pixels] * 3, labels=[7, "hen", None])
    assert {each.index: each.target.index for each in labelled} == {0: 7, 1: 8, 2: 281}
    assert [each.target.index for each in client.explain_many([pixels] * 2, target=8)] == [8, 8]

    async def ask() -> set[int]:
        async with camserve.aio.Client(address) as client:
            return {each.index async for each in client.explain_many(iter([pixels] * 9), in_flight=3)}

    assert asyncio.run(ask()) == {*range(9)}
    for wrong in ({"in_flight": 0}, {"images": "dog.jpg"}, {"target": 1, "labels": [1]}):
        with pytest.raises(camserve.InvalidArgument):
            client.explain_many(**{"images": [pixels]} | wrong)


def test_explain_many_has_the_options_of_explain() -> None:
    single, many = (
        set(inspect.signature(each).parameters) for each in (request_messages.explain, batches.explain_many)
    )
    of_each = {"image", "boxes", "mask", "request_id", "batch_sizes"}
    assert many == single - of_each | {"images", "labels", "in_flight"}


def test_explain_many_sends_the_same_request_as_explain(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    options: dict[str, Any] = {
        "model": "m",
        "method": "opti-cam",
        "target": 7,
        "layers": ["a"],
        "parameters": {"steps": 2},
        "metrics": ["insertion"],
        "seed": 3,
        "budget": 9,
        "precision": "bf16",
        "priority": "low",
        "predictions": 2,
        "raw": True,
        "timeout": WAIT_S,
    }
    [result] = client.explain_many([pixels], **options)
    client.explain(pixels, **options)
    assert result.error is None
    assert servicer.requests[0] == servicer.requests[1]


@pytest.mark.parametrize("name", ["evaluate_many", "explain_many"])
def test_both_clients_have_the_same_signature_of_many(name: str) -> None:
    sync, awaited = getattr(camserve.Client, name), getattr(camserve.aio.Client, name)
    assert (sync.__name__, sync.__doc__) == (awaited.__name__, awaited.__doc__)
    ours, theirs = inspect.signature(sync), inspect.signature(awaited)
    assert ours.parameters == theirs.parameters
    assert get_args(ours.return_annotation) == get_args(theirs.return_annotation) == (camserve.Result,)
