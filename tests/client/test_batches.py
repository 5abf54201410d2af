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

import camserve
from camserve import Variant, batches, request_messages
from camserve_server.errors import QueueFull
from camserve_server.service import status


class Counter:
    """Holds each request of a fake for a moment, and knows how many were there at once."""

    def __init__(self) -> None:
        self.here = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, _: Any) -> None:
        with self.lock:
            self.here += 1
            self.most = max(self.most, self.here)
        time.sleep(0.02)
        with self.lock:
            self.here -= 1


def places(results: Any) -> set[tuple[int, str, str]]:
    return {(result.index, result.model, result.method) for result in results}


def test_every_image_by_every_method_on_every_model(servicer, client, pixels, ramp):
    variants = ["grad-cam", Variant("short", "opti-cam", {"steps": 2}, layers=["deep"], seed=7)]
    results = list(
        client.evaluate_many(
            [pixels, pixels],
            methods=variants,
            models=["a", "b"],
            metrics={"insertion": {"steps": 9}},
            labels=[8, "cock"],
        )
    )
    assert places(results) == {(i, model, name) for i in (0, 1) for model in "ab" for name in ("grad-cam", "short")}
    for result in results:
        assert result.error is None
        assert result.image is pixels
        assert result.target.index == (8, 7)[result.index]
        assert (result.scores, result.cost.rows) == ({"insertion": 0.25}, 12)
        assert result.warnings == ("degenerate: the map is a ramp",)
        assert result.receipt.method == {"grad-cam": "grad-cam", "short": "opti-cam"}[result.method]
        np.testing.assert_array_equal(result.saliency, ramp)
    [asked] = [
        each
        for each in servicer.requests
        if (each.method.name, each.model, each.targets[0].index) == ("opti-cam", "a", 8)
    ]
    assert (dict(asked.method.parameters.items()), asked.method.layers, asked.method.seed) == (
        {"steps": 2},
        ["deep"],
        7,
    )
    assert dict(asked.metrics[0].parameters.items()) == {"steps": 9}


def test_the_forms_of_methods(client, pixels):
    for methods in ("grad-cam", ["grad-cam"], {"grad-cam": {"steps": 2}}, [Variant("grad-cam", "grad-cam")]):
        [result] = client.evaluate_many(iter([pixels]), methods=methods, metrics="insertion")
        assert (result.model, result.method, result.receipt.model) == ("first", "grad-cam", "first")


def test_a_failure_stops_nobody_and_says_itself(client, pixels):
    images = [pixels, "none.png", np.zeros((2, 2)), None, pixels]
    results = {result.index: result for result in client.evaluate_many(images, methods=["a", "b"], in_flight=2)}
    errors = [type(results[index].error) for index in range(5)]
    assert errors == [type(None), FileNotFoundError, camserve.InvalidArgument, camserve.InvalidArgument, type(None)]
    with pytest.raises(FileNotFoundError):
        _ = results[1].scores
    with camserve.Client("127.0.0.1:1") as nobody:
        [result] = nobody.evaluate_many([pixels], methods="a")
    assert isinstance(result.error, camserve.Unavailable)
    assert result.model == ""


class Full:
    """Too busy for the first requests of each image, as the server says it."""

    def __init__(self, refusals: int) -> None:
        self.left = refusals

    def __call__(self, context: Any) -> None:
        self.left -= 1
        if self.left >= 0:
            error = QueueFull("too many rows are owed", retry_after_s=0.01)
            context.set_trailing_metadata(status.trailing_metadata(error, "given"))
            context.abort(status.code(error), str(error))


def test_where_the_server_is_full_a_request_waits_and_is_made_again(servicer, address, client, pixels, monkeypatch):
    monkeypatch.setattr(batches, "MIN_RETRY_WAIT_S", 0.001)
    servicer.before = Full(5)
    results = list(client.evaluate_many([pixels] * 4, methods="a", in_flight=3))
    assert [result.error for result in results] == [None] * 4
    assert len(servicer.requests) == 9

    async def ask() -> list[camserve.Result]:
        async with camserve.aio.Client(address) as client:
            return [result async for result in client.evaluate_many([pixels] * 2, methods="a")]

    servicer.before = Full(3)
    assert [result.error for result in asyncio.run(ask())] == [None] * 2
    servicer.before = Full(1000)
    monkeypatch.setattr(batches, "MAX_ATTEMPTS", 3)
    servicer.requests.clear()
    [result] = client.evaluate_many([pixels], methods="a")
    assert isinstance(result.error, camserve.ResourceExhausted)
    assert len(servicer.requests) == 3


def test_each_image_has_its_own_truth(servicer, address, client, pixels):
    def asked() -> list[tuple[int, bool]]:
        return [(len(each.truth.boxes), each.truth.HasField("mask")) for each in servicer.requests]

    truths: Any = {"boxes": [[(0, 0, 2, 3), (1, 1, 2, 2)], None], "masks": iter([None, np.eye(3)])}
    assert all(not each.error for each in client.evaluate_many([pixels] * 2, methods="a", in_flight=1, **truths))
    assert asked() == [(2, False), (0, True)]

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            assert [each.error async for each in client.evaluate_many([pixels], methods="a", boxes=[(0, 0, 1, 1)])] == [
                None
            ]

    servicer.requests.clear()
    asyncio.run(ask())
    assert asked() == [(1, False)]
    with pytest.raises(ValueError, match="longer"):
        list(client.evaluate_many([pixels], methods="a", boxes=[None, None]))


def test_no_more_than_asked_for_is_in_flight_or_read(servicer, client, pixels):
    servicer.before = counter = Counter()
    read = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(12):
            read += 1
            yield pixels

    for number, _ in enumerate(client.evaluate_many(images(), methods=["a", "b"], in_flight=4), 1):
        assert read <= (number + 4 + 1) / 2 + 1
    assert number == 24
    assert 2 <= counter.most <= 4


def test_wrong_arguments_are_raised_at_once(client, pixels):
    for wrong in ({"in_flight": 0}, {"methods": ["a", "a"]}, {"images": "dog.jpg"}):
        with pytest.raises(camserve.InvalidArgument):
            client.evaluate_many(**{"images": [pixels], "methods": "a"} | wrong)
    with pytest.raises(ValueError, match="shorter"):
        list(client.evaluate_many([pixels, pixels], methods="a", labels=[1]))


def test_what_is_skipped_is_not_asked_for(servicer, client, pixels):
    done = client.evaluate_many([pixels] * 2, methods=["a", "b"], models="m", skip={(0, "m", "a"), (1, "m", "b")})
    assert places(done) == {(0, "m", "b"), (1, "m", "a")}
    assert len(servicer.requests) == 2


def test_leaving_early_cancels_what_is_in_flight(servicer, client, pixels):
    results = client.evaluate_many([pixels, "none.png"], methods="a", models="slow", in_flight=2)
    assert isinstance(next(results).error, FileNotFoundError)
    assert servicer.started.wait(5)
    results.close()
    assert servicer.cancelled.wait(5)


def test_the_awaited_client_does_the_same(servicer, address, pixels):
    servicer.before = counter = Counter()

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            results = client.evaluate_many([pixels, "none.png"] * 6, methods=["a", "b"], in_flight=4)
            found = [result async for result in results]
            assert {(each.index, each.method) for each in found} == {(i, name) for i in range(12) for name in "ab"}
            assert all((each.error is None) == (each.index % 2 == 0) for each in found)
            servicer.before = lambda context: None
            async with aclosing(client.evaluate_many(["none.png", pixels], methods="a", models="slow")) as results:
                async for result in results:
                    assert isinstance(result.error, FileNotFoundError)
                    assert await asyncio.to_thread(servicer.started.wait, 5)
                    break
            assert await asyncio.to_thread(servicer.cancelled.wait, 5)

    asyncio.run(ask())
    assert 2 <= counter.most <= 4


def test_many_are_explained_from_an_iterator_without_a_length(servicer, address, client, pixels):
    images = (each for each in [pixels, "none.png", pixels])
    found = {each.index: each for each in client.explain_many(images, method="grad-cam", top_k=2, in_flight=2)}
    assert [type(found[index].error) for index in range(3)] == [type(None), FileNotFoundError, type(None)]
    assert found[0].image is pixels
    assert [each.target.index for each in found[2].explanation.maps] == [281, 8]
    assert (found[2].model, found[2].method) == ("first", "grad-cam")
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


def test_many_take_the_options_of_one():
    one, several = (
        set(inspect.signature(each).parameters) for each in (request_messages.explain, batches.explain_many)
    )
    of_each = {"image", "boxes", "mask", "request_id", "batch_sizes"}
    assert several == one - of_each | {"images", "labels", "in_flight"}


def test_the_options_of_many_arrive(servicer, client, pixels):
    options = {
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
        "timeout": 20,
    }
    [result] = client.explain_many([pixels], **options)
    client.explain(pixels, **options)
    assert result.error is None
    assert servicer.requests[0] == servicer.requests[1]


@pytest.mark.parametrize("name", ["evaluate_many", "explain_many"])
def test_both_clients_have_the_same_signature(name):
    sync, awaited = getattr(camserve.Client, name), getattr(camserve.aio.Client, name)
    assert (sync.__name__, sync.__doc__) == (awaited.__name__, awaited.__doc__)
    ours, theirs = inspect.signature(sync), inspect.signature(awaited)
    assert ours.parameters == theirs.parameters
    assert get_args(ours.return_annotation) == get_args(theirs.return_annotation) == (camserve.Result,)
