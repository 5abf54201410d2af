"""Concurrent requests over a real channel: results are the same as alone, and requests do not delay each other."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import skimage.data

import camserve
from camserve_server.config import Config, ModelConfig, embedded_model
from camserve_server.engine.job import Job
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.e2e.engines import after_submit, engine_of, wait_until, wait_until_idle
from tests.processes import patient_client
from tests.support import stopped

CAT = skimage.data.chelsea()


@contextmanager
def batches_at_cancel(server: Server) -> Iterator[list[int]]:
    """Yield a list that gets the number of batches so far whenever the engine cancels an unfinished job."""
    engine = engine_of(server)
    batches: list[int] = []
    cancel = engine.cancel

    def counting(job: Job[Any]) -> None:
        finished = job.future.done()  # the service cancels the job of each call that ends
        cancel(job)
        if not finished:
            batches.append(engine.counters.batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "cancel", counting)
        yield batches


def assert_device_is_free(server: Server, batches_at_cancel: list[int]) -> None:
    """Require that the device completed at most the running batch after the cancellation."""
    wait_until_idle(server)
    engine = engine_of(server)
    with patient_client(server.address) as client:
        # Its two batches run after every batch that was in progress.
        cost = client.explain(CAT, method="grad-cam").cost
    assert len(batches_at_cancel) == 1
    assert engine.counters.batches - cost.batches - batches_at_cancel[0] <= 1, "at most the batch that was running"


@pytest.mark.slow
def test_concurrent_answers_equal_answers_alone_bitwise(server: Server) -> None:
    """32 callers send requests of several methods and models at the same time."""
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("tiny", "poly-cam", {}),
        ("tiny", "poly-cam-", {"variant": "official"}),
        ("tiny", "opti-cam", {"steps": 20}),
        ("tiny", "score-cam", {}),
        ("tiny", "grad-cam", {}),
        ("efficientnet-lite0", "grad-cam", {}),
        ("efficientnet-lite0", "opti-cam", {"steps": 5}),
    ]
    images = [np.roll(CAT, 20 * i, axis=1) for i in range(32)]
    order = list(range(32))
    random.Random(0).shuffle(order)

    def explain(client: camserve.Client, i: int) -> camserve.Explanation:
        model, method, parameters = kinds[i % len(kinds)]
        metrics = {"insertion": {"steps": 4}} if i % 3 == 0 else {}
        return client.explain(images[i], model=model, method=method, parameters=parameters, metrics=metrics)

    with patient_client(server.address) as client:
        start, submitted = engine_of(server).counters.batches, list[Job[Any]]()
        with ThreadPoolExecutor(32) as pool, after_submit(submitted.append):
            with stopped(engine_of(server)):  # so that no request ends before the last one arrives
                answers = pool.map(lambda i: explain(client, i), order)
                wait_until(lambda: len(submitted) == len(order))
            together = dict(zip(order, answers, strict=True))
        batches_together = engine_of(server).counters.batches - start
        alone = {i: explain(client, i) for i in order}
        batches_alone = engine_of(server).counters.batches - start - batches_together
    assert batches_together < 0.9 * batches_alone, "requests share batches"
    for i in order:
        assert np.array_equal(together[i].saliency, alone[i].saliency)
        assert together[i].scores == alone[i].scores
        assert together[i].cost.rows == alone[i].cost.rows
        assert together[i].predictions == alone[i].predictions
    wait_until_idle(server)


@pytest.mark.slow
def test_short_request_is_answered_while_a_long_one_runs(server: Server) -> None:
    """A Grad-CAM request that arrives while PCAM± runs is answered within three batches."""
    engine = engine_of(server)
    with patient_client(server.address) as slow, patient_client(server.address) as quick:
        stream = slow.explain_stream(CAT, method="poly-cam")
        next(event for event in stream if isinstance(event, camserve.Progress) and event.rows_done > 20)
        arrived: list[int] = []
        answered: list[int] = []

        def count(job: Job[Any]) -> None:
            arrived.append(engine.counters.batches)
            job.future.add_done_callback(lambda _: answered.append(engine.counters.batches))

        with after_submit(count):
            explanation = quick.explain(CAT, method="grad-cam")
        assert explanation.cost.batches == 2, "the prediction and the gradient"
        assert answered[0] - arrived[0] <= 3, "the batch that was running, and its own two"
        assert isinstance(event := next(stream), camserve.Progress)
        assert event.rows_done > 0, "PCAM± continues"
        stream.close()
    wait_until_idle(server)


def test_cancelled_request_frees_the_device_within_one_batch(server: Server) -> None:
    with patient_client(server.address) as client, batches_at_cancel(server) as batches:
        stream = client.explain_stream(CAT, method="poly-cam")
        next(event for event in stream if isinstance(event, camserve.Progress) and event.rows_done > 8)
        stream.close()
        assert_device_is_free(server, batches)


def test_closed_connection_frees_the_device_within_one_batch(server: Server) -> None:
    with batches_at_cancel(server) as batches:
        client = patient_client(server.address)
        stream = client.explain_stream(CAT, method="poly-cam")
        next(event for event in stream if isinstance(event, camserve.Progress) and event.rows_done > 8)
        client.close()
        assert_device_is_free(server, batches)


def test_failing_requests_do_not_change_other_answers(server: Server) -> None:
    with patient_client(server.address) as client:
        alone = client.explain(CAT, model="tiny", method="poly-cam").saliency
        errors: list[str] = []

        def hostile(i: int) -> None:
            image = np.full((3, 32, 32), 3e38, np.float32) if i % 2 else b"\x89PNG" + bytes(50)
            try:
                client.explain(image, model="tiny", method="opti-cam", parameters={"steps": 3})
            except camserve.CamserveError as error:
                errors.append(error.code.name)

        threads = [threading.Thread(target=hostile, args=(i,)) for i in range(10)]
        for thread in threads:
            thread.start()
        good = [client.explain(CAT, model="tiny", method="poly-cam").saliency for _ in range(3)]
        for thread in threads:
            thread.join()
    assert errors == ["INVALID_ARGUMENT"] * 5, "an overflow gives a degenerate map, not an error"
    assert all(np.array_equal(alone, other) for other in good)


@pytest.mark.slow
def test_map_of_the_embedded_model_shows_the_predicted_object() -> None:
    """The model runs at its own size of 224×224 pixels."""
    config = Config(listen="127.0.0.1:0", models=[embedded_model().model_copy(update={"batch_size": 1})])
    metrics = {"insertion": {"steps": 32}, "deletion": {"steps": 32}}
    with serving(config) as server, patient_client(server.address) as client:
        e = client.explain(skimage.data.camera(), method="opti-cam", metrics=metrics)
    assert e.target.label == "tripod"
    assert e.scores["insertion"] > e.scores["deletion"] + 0.2
    assert e.saliency[60:180, 60:160].mean() > 2 * e.saliency[:60, 160:].mean(), "the photographer, not the sky"


@pytest.mark.slow
def test_listing_reports_random_weights() -> None:
    net = ModelConfig(
        name="r18", source="torchvision:resnet18", allow_random_weights=True, input_size=(32, 32), batch_size=1
    )
    with (
        serving(Config(listen="127.0.0.1:0", models=[net])) as server,
        patient_client(server.address) as client,
    ):
        (model,) = client.models()
        assert model.random_weights
        assert [layer.name for layer in model.layers] == ["relu", "layer1", "layer2", "layer3"]
