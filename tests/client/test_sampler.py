"""A sample of what a service is asked: which images, and that the service is never held up."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import grpc
import pytest

import camserve
from camserve import Sampler
from camserve.sampler import Counts


def test_the_share_is_drawn_and_the_same_every_time(client, servicer, pixels):
    results: list[camserve.Result] = []

    def drawn(draw: int, share: float, confidence: float | None = None) -> list[int]:
        sampler = Sampler(client, results.append, share=share, below=0.5, sampling_seed=draw, waiting=200)
        taken = [index for index in range(100) if sampler.offer(pixels, confidence=confidence)]
        sampler.close(wait=False)
        return taken

    one, again, other = drawn(1, 0.2), drawn(1, 0.2, 0.9), drawn(2, 0.2)
    source = random.Random(1)
    assert one == again == [index for index in range(100) if source.random() < 0.2]
    assert one != other
    assert (drawn(1, 0.0), drawn(1, 0.0, 0.49)) == ([], [*range(100)])


def test_results_come_with_what_was_offered(client, servicer, pixels):
    found: dict[str, camserve.Result] = {}

    def keep(result: camserve.Result) -> None:
        found[getattr(result.outcome, "request_id", "no error of ours")] = result

    with Sampler(client, keep, share=0, below=0.5, method="opti-cam", parameters={"steps": 2}) as sampler:
        assert not sampler.offer(pixels, confidence=0.5, request_id="sure")
        assert sampler.offer(pixels, confidence=0.4, target="hen", request_id="a")
        assert sampler.offer("none.png", confidence=0.4, request_id="b")
        assert sampler.offer(None, confidence=0.4, request_id="c")  # type: ignore[arg-type]
    assert set(found) == {"a", "c", "no error of ours"}
    a = found["a"]
    assert (a.index, a.image is pixels, a.model, a.method, a.target.index) == (1, True, "first", "opti-cam", 8)
    assert isinstance(found["no error of ours"].error, FileNotFoundError)
    assert "TypeError: image is a" in str(found["c"].error)
    assert sampler.counts == Counts(offered=4, explained=1, failed=2)
    [asked] = servicer.requests
    assert (asked.priority, asked.method.parameters["steps"]) == ("low", 2)


def test_a_server_that_hangs_holds_nobody_up(servicer, address, pixels):
    results: list[camserve.Result] = []
    with camserve.Client(address, timeout=None) as client:
        sampler = Sampler(client, results.append, share=1, waiting=2, in_flight=2, model="slow")
        start = time.monotonic()
        taken = [sampler.offer(pixels) for _ in range(1000)]
        assert time.monotonic() - start < 10, "an offer takes microseconds"
        assert taken == [True] * 4 + [False] * 996
        assert sampler.counts == Counts(offered=1000, dropped=996)
        assert servicer.started.wait(20)
        sampler.close(wait=False)
        assert not sampler.offer(pixels)
        assert sampler.counts == Counts(offered=1001, dropped=998), "what waited is dropped"
    end = time.monotonic() + 20
    while sampler.counts.failed < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert sampler.counts == Counts(offered=1001, dropped=998, failed=2), "what was under way ended with the client"
    assert [type(result.error) for result in results] == [camserve.Cancelled] * 2


def test_no_server_and_a_broken_callback_harm_nobody(servicer, client, pixels, caplog):
    def fail(result: Any) -> None:
        raise RuntimeError("a bug")

    with camserve.Client("127.0.0.1:1", timeout=1) as nobody, Sampler(nobody, fail, share=1) as sampler:
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


def test_threads_share_a_sampler(client, pixels):
    results: list[int] = []
    with Sampler(client, lambda result: results.append(result.index), share=1, waiting=100, in_flight=4) as sampler:
        threads = [
            threading.Thread(target=lambda: [sampler.offer(pixels) for _ in range(10)], daemon=True) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert sampler.counts == Counts(offered=80, explained=80)
    assert sorted(results) == [*range(80)]


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"share": -1}, {"waiting": -1}, {"in_flight": 0}])
def test_wrong_numbers_are_refused(client, wrong):
    with pytest.raises(camserve.InvalidArgument) as caught:
        Sampler(client, print, **wrong)
    assert caught.value.field in wrong


def test_an_option_that_explain_does_not_have_is_refused(client):
    with pytest.raises(TypeError, match="steps"):
        Sampler(client, print, steps=3)
