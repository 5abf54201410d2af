"""Many callers at once, over a real channel: nothing is lost, everything is right, nobody waits for a neighbour."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data

import camserve
from camserve_server.config import Config, ModelConfig, embedded
from camserve_server.engine.engine import Engine
from camserve_server.service.server import Server
from tests.conftest import serving

CAT = skimage.data.chelsea()


def engine_of(server: Server) -> Engine:
    assert server.engine is not None
    return server.engine


def idle(server: Server) -> None:
    """Waits until nothing is owed."""
    until = time.monotonic() + 60
    while engine_of(server).rows_owed():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_thirty_two_callers_with_mixed_requests(server: Server) -> None:
    """Each answer is, to the bit, the one that the same request gets alone."""
    kinds = [
        ("tiny", "poly-cam", {}),
        ("tiny", "poly-cam-", {"variant": "official"}),
        ("tiny", "opti-cam", {"steps": 20}),
        ("tiny", "score-cam", {}),
        ("tiny", "grad-cam", {}),
        ("efficientnet-lite0", "grad-cam", {}),
        ("efficientnet-lite0", "opti-cam", {"steps": 5}),
    ]
    pictures = [np.roll(CAT, 20 * i, axis=1) for i in range(32)]
    order = list(range(32))
    random.Random(0).shuffle(order)

    def ask(client: camserve.Client, i: int) -> camserve.Explanation:
        model, method, parameters = kinds[i % len(kinds)]
        metrics = {"insertion": {"steps": 4}} if i % 3 == 0 else {}
        return client.explain(pictures[i], model=model, method=method, parameters=parameters, metrics=metrics)

    with camserve.Client(server.address, timeout=300) as client:
        start = engine_of(server).counters.batches
        with ThreadPoolExecutor(32) as pool:
            together = dict(zip(order, pool.map(lambda i: ask(client, i), order), strict=True))
        in_company = engine_of(server).counters.batches - start
        alone = {i: ask(client, i) for i in order}
        one_by_one = engine_of(server).counters.batches - start - in_company
    assert in_company < 0.9 * one_by_one, "they shared batches"
    for i in order:
        assert np.array_equal(together[i].saliency, alone[i].saliency)
        assert together[i].scores == alone[i].scores
        assert together[i].cost.rows == alone[i].cost.rows
        assert together[i].predictions == alone[i].predictions
    idle(server)


def test_a_grad_cam_passes_a_poly_cam(server: Server) -> None:
    """Sent while PCAM± runs, it is answered within three batches' time of its arrival."""
    engine = engine_of(server)
    with camserve.Client(server.address, timeout=300) as slow, camserve.Client(server.address) as quick:
        stream = slow.explain_stream(CAT, method="poly-cam")
        next(event for event in stream if isinstance(event, camserve.Progress) and event.rows_done > 20)
        arrived: list[int] = []
        answered: list[int] = []
        submit = engine.submit

        def noting(*args, **kwargs):  # type: ignore[no-untyped-def]
            arrived.append(engine.counters.batches)
            job = submit(*args, **kwargs)
            job.future.add_done_callback(lambda _: answered.append(engine.counters.batches))
            return job

        engine.submit = noting  # type: ignore[method-assign]
        try:
            explanation = quick.explain(CAT, method="grad-cam")
        finally:
            del engine.submit  # type: ignore[method-assign]
        assert explanation.cost.batches == 2, "the prediction and the gradient"
        assert answered[0] - arrived[0] <= 3, "the batch that was running, and its own two"
        assert next(stream).rows_done > 0, "PCAM± goes on"
        stream.close()
    idle(server)


def test_a_cancel_frees_the_device_within_one_batch(server: Server) -> None:
    engine = engine_of(server)
    with camserve.Client(server.address, timeout=300) as client:
        stream = client.explain_stream(CAT, method="poly-cam")
        next(event for event in stream if isinstance(event, camserve.Progress) and event.rows_done > 8)
        cancelled: list[int] = []
        cancel = engine.cancel

        def noting(job):  # type: ignore[no-untyped-def]
            cancelled.append(engine.counters.batches)
            cancel(job)

        engine.cancel = noting  # type: ignore[method-assign]
        try:
            stream.close()
            idle(server)
        finally:
            del engine.cancel  # type: ignore[method-assign]
        time.sleep(0.2)
        assert engine.counters.batches - cancelled[0] <= 1, "at most the batch that was running"


def test_a_caller_that_vanishes_frees_the_device(server: Server) -> None:
    client = camserve.Client(server.address, timeout=300)
    stream = client.explain_stream(CAT, method="poly-cam")
    next(stream)
    client.close()
    idle(server)


def test_a_failure_stays_at_home(server: Server) -> None:
    """Hostile requests among good ones: the good ones get the answers that they get alone."""
    with camserve.Client(server.address, timeout=300) as client:
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
    assert errors == ["INVALID_ARGUMENT"] * 5, "an overflow is a degenerate map, not an error"
    assert all(np.array_equal(alone, other) for other in good)


@pytest.mark.slow
def test_the_embedded_model_at_its_own_size() -> None:
    """224×224: a trained network names what is in a photograph, and what the map shows first is what it needs."""
    config = Config(listen="127.0.0.1:0", models=[embedded().model_copy(update={"batch_size": 1})])
    metrics = {"insertion": {"steps": 32}, "deletion": {"steps": 32}}
    with serving(config) as server, camserve.Client(server.address, timeout=300) as client:
        e = client.explain(skimage.data.camera(), method="opti-cam", metrics=metrics)
    assert e.target.label == "tripod"
    assert e.scores["insertion"] > e.scores["deletion"] + 0.2
    assert e.saliency[60:180, 60:160].mean() > 2 * e.saliency[:60, 160:].mean(), "the photographer, not the sky"


def test_random_weights_are_said_to_be_random() -> None:
    net = ModelConfig(
        name="r18", source="torchvision:resnet18", allow_random_weights=True, input_size=(32, 32), batch_size=1
    )
    with (
        serving(Config(listen="127.0.0.1:0", models=[net])) as server,
        camserve.Client(server.address, timeout=300) as client,
    ):
        (model,) = client.models()
        assert model.random_weights
        assert [layer.name for layer in model.layers] == ["relu", "layer1", "layer2", "layer3"]
