"""Sampler: selection of images, callbacks, and independence from the server."""

from __future__ import annotations

import random
import threading
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import camserve
from camserve import Sampler
from camserve.sampler import Counts
from tests.client.fake_server import WAIT_S, Servicer, wait_until


def test_random_selection_is_reproducible(
    client: camserve.Client, servicer: Servicer, pixels: NDArray[np.uint8]
) -> None:
    results: list[camserve.Result] = []

    def selected(seed: int, share: float, confidence: float | None = None) -> list[int]:
        sampler = Sampler(client, results.append, share=share, below=0.5, sampling_seed=seed, waiting=200)
        accepted = [index for index in range(100) if sampler.offer(pixels, confidence=confidence)]
        sampler.close(wait=False)
        return accepted

    first, repeated, other_seed = selected(1, 0.2), selected(1, 0.2, 0.9), selected(2, 0.2)
    source = random.Random(1)
    assert first == repeated == [index for index in range(100) if source.random() < 0.2]
    assert first != other_seed
    assert (selected(1, 0.0), selected(1, 0.0, 0.49)) == ([], [*range(100)])


def test_results_contain_the_offered_image_and_options(
    client: camserve.Client, servicer: Servicer, pixels: NDArray[np.uint8]
) -> None:
    results: dict[str, camserve.Result] = {}

    def keep(result: camserve.Result) -> None:
        results[getattr(result.outcome, "request_id", "no CamserveError")] = result

    with Sampler(client, keep, share=0, below=0.5, method="opti-cam", parameters={"steps": 2}) as sampler:
        assert not sampler.offer(pixels, confidence=0.5, request_id="sure")
        assert sampler.offer(pixels, confidence=0.4, target="hen", request_id="a")
        assert sampler.offer("none.png", confidence=0.4, request_id="b")
        assert sampler.offer(None, confidence=0.4, request_id="c")  # type: ignore[arg-type]
    assert set(results) == {"a", "c", "no CamserveError"}
    a = results["a"]
    assert (a.index, a.image is pixels, a.model, a.method, a.target.index) == (1, True, "first", "opti-cam", 8)
    assert isinstance(results["no CamserveError"].error, FileNotFoundError)
    assert "TypeError: image is a" in str(results["c"].error)
    assert sampler.counts == Counts(offered=4, explained=1, failed=2)
    [request] = servicer.requests
    assert (request.priority, request.method.parameters["steps"]) == ("low", 2)


def test_offer_does_not_block_while_the_server_hangs(
    servicer: Servicer, address: str, pixels: NDArray[np.uint8]
) -> None:
    results: list[camserve.Result] = []
    with camserve.Client(address, timeout=None) as client:
        sampler = Sampler(client, results.append, share=1, waiting=2, in_flight=2, model="slow")
        accepted = [sampler.offer(pixels) for _ in range(1000)]
        assert not servicer.cancelled.is_set(), "the server must hang during all offers"
        assert accepted == [True] * 4 + [False] * 996
        assert sampler.counts == Counts(offered=1000, dropped=996)
        assert servicer.started.wait(WAIT_S)
        sampler.close(wait=False)
        assert not sampler.offer(pixels)
        assert sampler.counts == Counts(offered=1001, dropped=998), "waiting images are dropped"
    wait_until(lambda: sampler.counts.failed == 2)
    assert sampler.counts == Counts(offered=1001, dropped=998, failed=2), "closing the client ends running requests"
    assert [type(result.error) for result in results] == [camserve.Cancelled] * 2


@pytest.mark.slow
def test_callback_errors_are_logged_and_counted(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(result: Any) -> None:
        raise RuntimeError("a bug")

    with camserve.Client("127.0.0.1:1", timeout=1) as unreachable, Sampler(unreachable, fail, share=1) as sampler:
        assert sampler.offer(pixels)
    assert sampler.counts == Counts(offered=1, failed=1)
    servicer.before = lambda context: context.abort(grpc.StatusCode.INTERNAL, "")
    with Sampler(client, fail, share=1) as sampler:
        assert sampler.offer(pixels)
    servicer.before = lambda context: None
    with Sampler(client, fail, share=1) as sampler:
        assert sampler.offer(pixels)
    assert sampler.counts == Counts(offered=1, failed=1)
    assert caplog.text.count("RuntimeError: a bug") == 3


def test_threads_can_share_a_sampler(client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    results: list[int] = []
    with Sampler(client, lambda result: results.append(result.index), share=1, waiting=100, in_flight=4) as sampler:
        threads = [
            threading.Thread(target=lambda: [sampler.offer(pixels) for _ in range(10)], daemon=True) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert sampler.counts == Counts(offered=80, explained=80)
    assert sorted(results) == [*range(80)]


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"share": -1}, {"waiting": -1}, {"in_flight": 0}])
def test_out_of_range_arguments_raise(client: camserve.Client, wrong: Any) -> None:
    with pytest.raises(camserve.InvalidArgument) as caught:
        Sampler(client, print, **wrong)
    assert caught.value.field in wrong


def test_unknown_explain_option_raises(client: camserve.Client) -> None:
    with pytest.raises(TypeError, match="steps"):
        Sampler(client, print, steps=3)
