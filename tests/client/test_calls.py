"""Requests and responses of single calls, with the blocking client and the asyncio client."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from numpy.typing import NDArray

import camserve
from camserve import Evaluation, Explanation, Level, Progress, Randomised, Replay, request_messages
from camserve.connection import LONG_CALL_S
from camserve.v1 import explain_pb2 as pb
from tests.client.fake_server import WAIT_S, Servicer, wait_until


def test_request_contains_all_arguments(servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    client.explain(
        pixels,
        model="m",
        method="opti-cam",
        target=[np.int64(7), "hen"],  # type: ignore[list-item] # Integers of numpy are also accepted.
        layers=["a", "b"],
        parameters={"steps": np.int32(20), "norm": "max", "soft": True, "rate": 0.1},
        metrics={"insertion": {"steps": 10}, "deletion": {}},
        seed=2**64 - 1,
        budget=2**40,
        batch_sizes={"forward": np.int64(4)},  # type: ignore[dict-item]
        predictions=3,
        raw=True,
        request_id="mine",
    )
    request = servicer.requests[-1]
    request.ClearField("image")
    assert MessageToDict(request, preserving_proto_field_name=True) == {
        "request_id": "mine",
        "model": "m",
        "method": {
            "name": "opti-cam",
            "parameters": {"steps": 20.0, "norm": "max", "soft": True, "rate": 0.1},
            "layers": ["a", "b"],
            "seed": str(2**64 - 1),
        },
        "targets": [{"index": 7}, {"label": "hen"}],
        "metrics": [{"name": "insertion", "parameters": {"steps": 10.0}}, {"name": "deletion", "parameters": {}}],
        "top_k": 3,
        "raw": True,
        "budget": str(2**40),
        "batch_sizes": {"forward": 4},
    }
    assert servicer.metadata["user-agent"].startswith(f"camserve/{camserve.__version__}")


def test_default_arguments_leave_fields_unset(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    client.explain(pixels)
    request = servicer.requests[-1]
    assert (request.model, request.request_id, list(request.targets), list(request.metrics)) == ("", "", [], [])
    assert (request.method.name, list(request.method.layers), request.method.seed, request.top_k) == (
        "poly-cam",
        [],
        0,
        5,
    )
    assert (request.target_top_k, request.budget, dict(request.batch_sizes)) == (0, 0, {})


def test_top_k_explains_the_most_probable_classes(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    e = client.explain(pixels, top_k=3)
    assert servicer.requests[-1].target_top_k == 3
    assert [each.target.index for each in e.maps] == [281, 8, 7]
    assert [each.index for each in client.explain(pixels, top_k=2, target=[], predictions=1).predictions] == [281]


def test_budget_is_sent_and_share_is_returned(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    assert client.explain(pixels).share == 1
    assert client.explain(pixels, budget=7).share == 0.25
    assert client.explain(pixels, budget=7).receipt.budget == 7
    client.evaluate(pixels, method="opti-cam", budget=7, batch_sizes={"forward": 4})
    request = servicer.requests[-1]
    assert (request.budget, dict(request.batch_sizes)) == (7, {"forward": 4})


def test_boxes_are_sent_as_fractions_of_the_image(servicer: Servicer, client: camserve.Client) -> None:
    client.explain(np.zeros((20, 40, 3), np.uint8), boxes=[(10, 5, 20, 20), (0, 0.5, 40, 1)], mask=[[True, False]])
    truth = servicer.requests[-1].truth
    assert [(b.left, b.top, b.right, b.bottom) for b in truth.boxes] == [(0.25, 0.25, 0.5, 1), (0, 0.025, 1, 0.05)]
    assert list(truth.mask.shape) == [1, 2]
    assert np.frombuffer(truth.mask.data, "<f4").tolist() == [1, 0]
    boxes: Any = np.array([10, 5, 20, 20])
    client.evaluate(np.zeros((3, 20, 40), np.float32), method="grad-cam", boxes=boxes)
    assert servicer.requests[-1].truth.boxes[0] == pb.Box(left=0.25, top=0.25, right=0.5, bottom=1)
    client.explain(np.zeros((20, 40, 3), np.uint8))
    assert not servicer.requests[-1].HasField("truth")


def test_single_string_is_one_name(servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    client.explain(pixels, layers="layer4", metrics="insertion", target="hen")
    request = servicer.requests[-1]
    assert list(request.method.layers) == ["layer4"]
    assert [metric.name for metric in request.metrics] == ["insertion"]
    assert [target.label for target in request.targets] == ["hen"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"target": -1}, "target"),
        ({"target": [0, 2**31]}, "target"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2, "target": 0}, "top_k"),
        ({"predictions": 0}, "predictions"),
        ({"budget": 0}, "budget"),
        ({"boxes": (0, 0, 1000, 1)}, "truth.boxes[0]"),
        ({"mask": [True]}, "truth.mask"),
        ({"batch_sizes": {"forward": 0}}, "batch_sizes"),
        ({"parameters": {"steps": object()}}, "method.parameters"),
        ({"metrics": {"insertion": {"steps": object()}}}, "metrics.parameters"),
    ],
)
def test_invalid_arguments_raise_before_a_request_is_sent(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8], wrong: Any, field: str
) -> None:
    with pytest.raises(camserve.InvalidArgument) as caught:
        client.explain(pixels, **wrong)
    assert caught.value.field == field
    assert not servicer.requests


def test_explain_returns_all_fields_of_the_response(
    client: camserve.Client, pixels: NDArray[np.uint8], ramp: NDArray[np.float32]
) -> None:
    e = client.explain(pixels, target=[8, 7], metrics=("insertion", "average-gain"), parameters={"n": 3}, raw=True)
    np.testing.assert_array_equal(e.saliency, ramp)
    np.testing.assert_array_equal(e.raw, ramp[:2, :3] * 10)
    assert e.target == camserve.Prediction(8, "hen", 0.75, 4.5)
    assert [p.index for p in e.predictions] == [281, 8]
    assert e.scores == {"insertion": 0.25, "average-gain": 0.25}
    assert e.scores["average-gain"].unit == "%"
    assert list(e.curves) == ["insertion"]
    np.testing.assert_array_equal(e.curves["insertion"], [0, 0.25, 0.5])
    assert e.warnings == ("degenerate: the map is a ramp",)
    assert e.cost == camserve.Cost(rows=12, batches=3, queue_ms=1.5, compute_ms=20.25)
    assert e.receipt.parameters == {"n": 3}
    assert isinstance(e.receipt.parameters["n"], int)
    assert e.receipt.targets == (8, 7)
    assert e.receipt.batch_sizes == {"score": 16}
    assert e.request_id == "given"
    assert [m.target.label for m in e.maps] == ["hen", "cock"]
    assert e.maps[0].saliency is e.saliency
    assert repr(e) == "<Explanation of hen (8), p = 0.750, [8, 8]>"
    assert client.explain(pixels).raw is None
    assert client.explain(pixels, request_id="mine").request_id == "mine"


def test_explain_stream_ends_with_the_explanation(
    client: camserve.Client, pixels: NDArray[np.uint8], ramp: NDArray[np.float32]
) -> None:
    *events, last = client.explain_stream(pixels)
    assert isinstance(last, Explanation)
    assert [type(event) for event in events] == [Progress, Level, Level, Progress]
    assert events[0] == Progress(rows_done=0, rows_total=20, stage="explain")
    assert isinstance(events[1], Level)
    assert (events[1].index, events[1].count, events[1].layer) == (0, 2, "deep")
    np.testing.assert_array_equal(events[1].saliency, ramp / 2)
    assert len(events[1].maps) == 1


def test_evaluate_scores_a_map_or_a_method(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8], ramp: NDArray[np.float32]
) -> None:
    evaluation = client.evaluate(pixels, saliency=ramp.astype(float), target="hen", seed=3)
    request = servicer.requests[-1]
    assert isinstance(evaluation, Evaluation)
    assert evaluation.scores == {"insertion": 0.25, "deletion": 0.25, "average-gain": 0.25}
    assert evaluation.target.index == 8
    assert (request.WhichOneof("subject"), list(request.saliency.shape), request.seed) == ("saliency", [8, 8], 3)
    *events, last = client.evaluate_stream(pixels, method="poly-cam", layers="a", seed=3, metrics=["insertion"])
    request = servicer.requests[-1]
    assert [type(event) for event in events] == [Progress, Randomised]
    step = events[1]
    assert isinstance(step, Randomised)
    assert isinstance(last, Evaluation)
    assert (step.order, step.index, step.count, step.layers) == ("independent", 1, 3, ("fc", "conv"))
    assert (step.target, step.spearman, step.ssim, step.hog) == (7, 0.5, 0, -1)
    assert np.array_equal(step.saliency, ramp)
    assert list(last.scores) == ["insertion"]
    assert (request.method.name, request.method.layers, request.method.seed, request.seed) == ("poly-cam", ["a"], 3, 3)
    assert not request.HasField("target")


MAP = np.zeros((4, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"saliency": MAP, "method": "poly-cam"},
        {"saliency": MAP[0]},
        {"saliency": MAP.astype(complex)},
        {"saliency": MAP, "parameters": {"a": 1}},
    ],
)
def test_evaluate_requires_either_a_map_or_a_method(
    client: camserve.Client, pixels: NDArray[np.uint8], wrong: Any
) -> None:
    with pytest.raises(camserve.InvalidArgument):
        client.evaluate(pixels, **wrong)


def test_models_methods_and_metrics_are_listed(servicer: Servicer, client: camserve.Client) -> None:
    (model,) = client.models()
    assert (model.name, model.input_size, model.labels) == ("first", (8, 9), ("a", "b", "c"))
    stem, shallow, deep = model.named_layers
    assert stem == camserve.Layer("stem", 2048, 8, 9, signed=True, prefix_tokens=0)
    assert (model.layers, model.layer, shallow.prefix_tokens) == ((shallow, deep), "deep[1]", 1)
    opti, poly, fake = client.methods("first")
    assert servicer.requests[-1].model == "first"
    assert poly.unavailable == "no such layers"
    assert (opti.rows, opti.rows_per_target, opti.anytime, opti.seeded) == (1101, 1050, True, True)
    assert (fake.needs, fake.class_agnostic, fake.anytime) == ("a class", True, False)
    steps, norm = opti.parameters
    assert steps == camserve.Parameter("steps", "integer", 50, 1.0, None, (), "How many.")
    assert (norm.default, norm.choices) == ("max", ("max", "range"))
    (metric,) = client.metrics()
    assert (metric.name, metric.higher_is_better, metric.rows) == ("insertion", True, 100)


# ---- cancellation ---------------------------------------------------------------------------------------------------


def test_closing_a_stream_cancels_the_call(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    events = client.explain_stream(pixels, model="slow")
    assert isinstance(next(events), Progress)
    assert servicer.started.wait(WAIT_S)
    events.close()
    assert servicer.cancelled.wait(WAIT_S)


def test_ctrl_c_cancels_the_call(servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    main_thread = threading.get_ident()

    def waits_for_the_response() -> bool:
        frames = traceback.extract_stack(sys._current_frames()[main_thread])
        return any(
            "grpc" in Path(frame.filename).parts and frame.name in ("result", "_next", "_next_response")
            for frame in frames
        )

    def interrupt() -> None:
        servicer.started.wait(WAIT_S)
        wait_until(waits_for_the_response)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        client.explain(pixels, model="slow")
    assert servicer.cancelled.wait(WAIT_S)


def test_closing_the_client_cancels_calls_in_flight(
    servicer: Servicer, address: str, pixels: NDArray[np.uint8]
) -> None:
    client = camserve.Client(address)

    def close() -> None:
        servicer.started.wait(WAIT_S)
        client.close()

    threading.Thread(target=close).start()
    with pytest.raises(camserve.Cancelled):
        client.explain(pixels, model="slow")
    assert servicer.cancelled.wait(WAIT_S)


class ClosedByAnotherThread(camserve.Client):
    """Client that another thread closes at the moment at which a call begins."""

    def _channels(self) -> Any:
        channels = super()._channels()
        self.close()
        return channels


@pytest.mark.parametrize(
    "call",
    [
        lambda client, image: client.explain(image),
        lambda client, image: [*client.explain_stream(image)],
        lambda client, image: client.models(),
        lambda client, image: [each.explanation for each in client.explain_many([image])],
    ],
)
def test_closing_the_client_while_a_call_begins_cancels_it(
    call: Callable[[camserve.Client, Any], Any], servicer: Servicer, address: str, pixels: NDArray[np.uint8]
) -> None:
    with pytest.raises(camserve.Cancelled, match="the client was closed while the call was in flight"):
        call(ClosedByAnotherThread(address), pixels)
    assert not servicer.requests


class AdminClosedByAnotherThread(camserve.Admin):
    """Client for operators that another thread closes at the moment at which a call begins."""

    def _channels(self) -> Any:
        channels = super()._channels()
        self.close()
        return channels


@pytest.mark.parametrize("name", ["load", "unload", "reload"])
def test_closing_the_client_of_operators_while_a_call_begins_cancels_it(name: str, address: str) -> None:
    with pytest.raises(camserve.Cancelled, match="the client was closed while the call was in flight"):
        getattr(AdminClosedByAnotherThread(address), name)("tiny")


def test_client_timeout_applies_to_calls(address: str, pixels: NDArray[np.uint8]) -> None:
    with (
        camserve.Client(address, timeout=0.2) as client,
        pytest.raises(camserve.DeadlineExceeded, match=r"within 0\.2 s"),
    ):
        client.explain(pixels, model="slow")


def test_call_timeout_overrides_client_timeout(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    with pytest.raises(camserve.DeadlineExceeded, match=r"within 0\.1 s"):
        list(client.explain_stream(pixels, model="slow", timeout=0.1))
    assert len(servicer.requests) <= 1, "grpc 1.85 reports the deadline of a stream as removed; it is not sent again"


def test_threads_can_share_a_client(servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    answers: dict[int, int] = {}

    def ask(index: int) -> None:
        answers[index] = client.explain(pixels, target=index).target.index

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {index: index for index in range(16)}


# ---- asyncio --------------------------------------------------------------------------------------------------------


def test_aio_client_has_the_same_methods(
    servicer: Servicer, address: str, pixels: NDArray[np.uint8], ramp: NDArray[np.float32]
) -> None:
    async def ask() -> None:
        async with camserve.aio.Client(address, timeout=WAIT_S) as client:
            explanations = await asyncio.gather(*(client.explain(pixels, target=i) for i in range(5)))
            assert [e.target.index for e in explanations] == list(range(5))
            events = [event async for event in client.explain_stream(pixels)]
            assert [type(event) for event in events] == [Progress, Level, Level, Progress, Explanation]
            assert (await client.evaluate(pixels, method="poly-cam")).scores["deletion"] == 0.25
            assert isinstance([e async for e in client.evaluate_stream(pixels, saliency=ramp)][-1], Evaluation)
            assert [len(await list_all()) for list_all in (client.models, client.methods, client.metrics)] == [1, 3, 1]
            receipt = explanations[0].receipt
            assert (await client.replay(receipt, pixels)).same
            assert isinstance([e async for e in client.replay_stream(receipt, pixels)][-1], Replay)
            with pytest.raises(FileNotFoundError):
                await client.explain("none.png")

    asyncio.run(ask())


def test_aio_closing_a_stream_cancels_the_call(servicer: Servicer, address: str, pixels: NDArray[np.uint8]) -> None:
    async def leave() -> None:
        async with camserve.aio.Client(address) as client:
            async with aclosing(client.explain_stream(pixels, model="slow")) as events:
                async for _ in events:
                    assert await asyncio.to_thread(servicer.started.wait, WAIT_S)
                    break
            assert await asyncio.to_thread(servicer.cancelled.wait, WAIT_S)

    asyncio.run(leave())


def test_aio_cancelling_a_task_cancels_the_call(servicer: Servicer, address: str, pixels: NDArray[np.uint8]) -> None:
    async def cancel() -> None:
        async with camserve.aio.Client(address) as client:
            task = asyncio.create_task(client.explain(pixels, model="slow"))
            assert await asyncio.to_thread(servicer.started.wait, WAIT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.cancelled.wait, WAIT_S)

    asyncio.run(cancel())


@pytest.mark.parametrize(
    "call",
    [
        lambda client, image: client.explain(image, model="slow", timeout=WAIT_S),
        lambda client, image: client.explain(image, model="slow", timeout=1.0 + LONG_CALL_S),
        lambda client, image: last(client.explain_stream(image, model="slow")),
        lambda client, image: last(client.explain_many([image], model="slow")),
    ],
)
def test_aio_closing_the_client_does_not_cancel_the_task(
    call: Callable[[camserve.aio.Client, Any], Any], servicer: Servicer, address: str, pixels: NDArray[np.uint8]
) -> None:
    async def close() -> None:
        client = camserve.aio.Client(address)
        task = asyncio.create_task(call(client, pixels))
        assert await asyncio.to_thread(servicer.started.wait, WAIT_S)
        await client.close()
        await asyncio.wait([task])
        assert not task.cancelled()
        with pytest.raises(camserve.Cancelled, match="the client was closed while the call was in flight"):
            await task

    asyncio.run(close())


async def last(events: Any) -> Any:
    """Return the last event of a stream, or the explanation in the last result of many."""
    found = [each async for each in events][-1]
    return found.explanation if isinstance(found, camserve.Result) else found


# ---- interface ------------------------------------------------------------------------------------------------------

STREAMED = ["explain", "evaluate", "replay"]
METHODS = [*STREAMED, *(f"{name}_stream" for name in STREAMED), "models", "methods", "metrics"]


@pytest.mark.parametrize("name", METHODS)
def test_both_clients_have_the_same_signatures_and_docstrings(name: str) -> None:
    sync, awaited = getattr(camserve.Client, name), getattr(camserve.aio.Client, name)
    assert sync.__name__ == awaited.__name__ == name
    assert sync.__doc__ == awaited.__doc__
    ours, theirs = inspect.signature(sync), inspect.signature(awaited)
    assert ours.parameters == theirs.parameters
    assert get_args(theirs.return_annotation)[0] in (ours.return_annotation, *get_args(ours.return_annotation))
    assert inspect.iscoroutinefunction(awaited) != name.endswith("_stream")


def test_every_request_field_has_an_argument() -> None:
    """Every field of a request message corresponds to an argument of the client."""
    argument_names = {"targets": "target", "target_top_k": "top_k", "top_k": "predictions"}
    method_fields = {"name", "parameters", "layers", "seed"}
    fields = {argument_names.get(name, name) for name in pb.ExplainRequest.DESCRIPTOR.fields_by_name} | (
        method_fields - {"name"}
    )
    assert set(pb.MethodSpec.DESCRIPTOR.fields_by_name) == method_fields
    assert set(pb.MapFormat.DESCRIPTOR.fields_by_name) == {"dtype", "native"}
    messages = {"truth", "map_format"}
    others = set(pb.Truth.DESCRIPTOR.fields_by_name) | {"map_dtype", "native_maps", "timeout"}
    assert set(inspect.signature(request_messages.explain).parameters) == fields - messages | others
    fields = set(pb.EvaluateRequest.DESCRIPTOR.fields_by_name) | (method_fields - {"name"})
    assert set(inspect.signature(request_messages.evaluate).parameters) == fields - messages | others


RESPONSES = [
    "Prediction",
    "Cost",
    "Receipt",
    "Progress",
    "Randomised",
    "Layer",
    "Model",
    "Method",
    "Metric",
    "Parameter",
]


@pytest.mark.parametrize("name", RESPONSES)
def test_every_response_field_has_an_attribute(name: str) -> None:
    fields = [field.name for field in dataclasses.fields(getattr(camserve, name))]
    assert fields == list(getattr(pb, name).DESCRIPTOR.fields_by_name)


def test_every_saliency_map_field_has_an_attribute() -> None:
    fields = {field.name for field in dataclasses.fields(camserve.SaliencyMap)}
    # The client uses `input_size` to resize the map.
    assert fields == set(pb.SaliencyMap.DESCRIPTOR.fields_by_name) - {"input_size"} | {"_image"}
