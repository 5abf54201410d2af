"""What is asked, and what is answered: sync and async, over a real channel."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import signal
import threading
import time
from contextlib import aclosing
from typing import get_args

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

import camserve
from camserve import Evaluation, Explanation, Level, Progress, Randomised, Replay, request_messages
from camserve.v1 import explain_pb2 as pb


def test_what_is_asked_arrives(servicer, client, pixels):
    client.explain(
        pixels,
        model="m",
        method="opti-cam",
        target=[np.int64(7), "hen"],
        layers=["a", "b"],
        parameters={"steps": np.int32(20), "norm": "max", "soft": True, "rate": 0.1},
        metrics={"insertion": {"steps": 10}, "deletion": {}},
        seed=2**64 - 1,
        budget=2**40,
        batch_sizes={"forward": np.int64(4)},
        predictions=3,
        raw=True,
        request_id="mine",
    )
    asked = servicer.requests[-1]
    asked.ClearField("image")
    assert MessageToDict(asked, preserving_proto_field_name=True) == {
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


def test_the_defaults_leave_the_choice_to_the_server(servicer, client, pixels):
    client.explain(pixels)
    asked = servicer.requests[-1]
    assert (asked.model, asked.request_id, list(asked.targets), list(asked.metrics)) == ("", "", [], [])
    assert (asked.method.name, list(asked.method.layers), asked.method.seed, asked.top_k) == ("poly-cam", [], 0, 5)
    assert (asked.target_top_k, asked.budget, dict(asked.batch_sizes)) == (0, 0, {})


def test_the_likeliest_classes_are_explained(servicer, client, pixels):
    e = client.explain(pixels, top_k=3)
    assert servicer.requests[-1].target_top_k == 3
    assert [each.target.index for each in e.maps] == [281, 8, 7]
    assert [each.index for each in client.explain(pixels, top_k=2, target=[], predictions=1).predictions] == [281]


def test_a_budget_may_cut_a_map_short(servicer, client, pixels):
    assert client.explain(pixels).share == 1
    assert client.explain(pixels, budget=7).share == 0.25
    assert client.explain(pixels, budget=7).receipt.budget == 7
    client.evaluate(pixels, method="opti-cam", budget=7, batch_sizes={"forward": 4})
    asked = servicer.requests[-1]
    assert (asked.budget, dict(asked.batch_sizes)) == (7, {"forward": 4})


def test_boxes_are_sent_in_shares_of_the_image(servicer, client):
    client.explain(np.zeros((20, 40, 3), np.uint8), boxes=[(10, 5, 20, 20), (0, 0.5, 40, 1)], mask=[[True, False]])
    truth = servicer.requests[-1].truth
    assert [(b.left, b.top, b.right, b.bottom) for b in truth.boxes] == [(0.25, 0.25, 0.5, 1), (0, 0.025, 1, 0.05)]
    assert list(truth.mask.shape) == [1, 2]
    assert np.frombuffer(truth.mask.data, "<f4").tolist() == [1, 0]
    client.evaluate(np.zeros((3, 20, 40), np.float32), method="grad-cam", boxes=np.array([10, 5, 20, 20]))
    assert servicer.requests[-1].truth.boxes[0] == pb.Box(left=0.25, top=0.25, right=0.5, bottom=1)
    client.explain(np.zeros((20, 40, 3), np.uint8))
    assert not servicer.requests[-1].HasField("truth")


def test_a_single_name_is_not_taken_for_its_letters(servicer, client, pixels):
    client.explain(pixels, layers="layer4", metrics="insertion", target="hen")
    asked = servicer.requests[-1]
    assert list(asked.method.layers) == ["layer4"]
    assert [metric.name for metric in asked.metrics] == ["insertion"]
    assert [target.label for target in asked.targets] == ["hen"]


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
def test_wrong_arguments_are_refused_before_anything_is_sent(servicer, client, pixels, wrong, field):
    with pytest.raises(camserve.InvalidArgument) as caught:
        client.explain(pixels, **wrong)
    assert caught.value.field == field
    assert not servicer.requests


def test_an_explanation_is_read(client, pixels, ramp):
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


def test_a_stream_ends_with_the_explanation(client, pixels, ramp):
    *events, last = client.explain_stream(pixels)
    assert isinstance(last, Explanation)
    assert [type(event) for event in events] == [Progress, Level, Level, Progress]
    assert events[0] == Progress(rows_done=0, rows_total=20, stage="explain")
    assert (events[1].index, events[1].count, events[1].layer) == (0, 2, "deep")
    np.testing.assert_array_equal(events[1].saliency, ramp / 2)
    assert len(events[1].maps) == 1


def test_evaluate_scores_a_given_map_or_a_method(servicer, client, pixels, ramp):
    evaluation = client.evaluate(pixels, saliency=ramp.astype(float), target="hen", seed=3)
    asked = servicer.requests[-1]
    assert isinstance(evaluation, Evaluation)
    assert evaluation.scores == {"insertion": 0.25, "deletion": 0.25, "average-gain": 0.25}
    assert evaluation.target.index == 8
    assert (asked.WhichOneof("subject"), list(asked.saliency.shape), asked.seed) == ("saliency", [8, 8], 3)
    *events, last = client.evaluate_stream(pixels, method="poly-cam", layers="a", seed=3, metrics=["insertion"])
    asked = servicer.requests[-1]
    assert [type(event) for event in events] == [Progress, Randomised]
    step = events[1]
    assert (step.order, step.index, step.count, step.layers) == ("independent", 1, 3, ("fc", "conv"))
    assert (step.target, step.spearman, step.ssim, step.hog) == (7, 0.5, 0, -1)
    assert np.array_equal(step.saliency, ramp)
    assert list(last.scores) == ["insertion"]
    assert (asked.method.name, asked.method.layers, asked.method.seed, asked.seed) == ("poly-cam", ["a"], 3, 3)
    assert not asked.HasField("target")


GIVEN = np.zeros((4, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"saliency": GIVEN, "method": "poly-cam"},
        {"saliency": GIVEN[0]},
        {"saliency": GIVEN.astype(complex)},
        {"saliency": GIVEN, "parameters": {"a": 1}},
    ],
)
def test_evaluate_needs_one_subject(client, pixels, wrong):
    with pytest.raises(camserve.InvalidArgument):
        client.evaluate(pixels, **wrong)


def test_what_there_is(servicer, client):
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


# ---- ending early ---------------------------------------------------------------------------------------------------


def test_closing_a_stream_cancels_the_call(servicer, client, pixels):
    events = client.explain_stream(pixels, model="slow")
    assert isinstance(next(events), Progress)
    assert servicer.started.wait(5)
    events.close()
    assert servicer.cancelled.wait(5)


def test_ctrl_c_cancels_the_call(servicer, client, pixels):
    def interrupt() -> None:
        servicer.started.wait(5)
        time.sleep(0.3)  # the request may be there before the client has begun to wait
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        client.explain(pixels, model="slow")
    assert servicer.cancelled.wait(5)


def test_closing_the_client_cancels_its_calls(servicer, address, pixels):
    client = camserve.Client(address)

    def close() -> None:
        servicer.started.wait(5)
        client.close()

    threading.Thread(target=close).start()
    with pytest.raises(camserve.Cancelled):
        client.explain(pixels, model="slow")
    assert servicer.cancelled.wait(5)


def test_the_timeout_is_the_clients(address, pixels):
    with (
        camserve.Client(address, timeout=0.2) as client,
        pytest.raises(camserve.DeadlineExceeded, match=r"within 0\.2 s"),
    ):
        client.explain(pixels, model="slow")


def test_or_the_calls_own(client, pixels):
    with pytest.raises(camserve.DeadlineExceeded, match=r"within 0\.1 s"):
        list(client.explain_stream(pixels, model="slow", timeout=0.1))


def test_threads_share_a_client(servicer, client, pixels):
    answers: dict[int, int] = {}

    def ask(index: int) -> None:
        answers[index] = client.explain(pixels, target=index).target.index

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {index: index for index in range(16)}


# ---- awaited --------------------------------------------------------------------------------------------------------


def test_the_awaited_client_is_the_same(servicer, address, pixels, ramp):
    async def ask() -> None:
        async with camserve.aio.Client(address, timeout=20) as client:
            several = await asyncio.gather(*(client.explain(pixels, target=i) for i in range(5)))
            assert [e.target.index for e in several] == list(range(5))
            events = [event async for event in client.explain_stream(pixels)]
            assert [type(event) for event in events] == [Progress, Level, Level, Progress, Explanation]
            assert (await client.evaluate(pixels, method="poly-cam")).scores["deletion"] == 0.25
            assert isinstance([e async for e in client.evaluate_stream(pixels, saliency=ramp)][-1], Evaluation)
            assert [len(await listed()) for listed in (client.models, client.methods, client.metrics)] == [1, 3, 1]
            receipt = several[0].receipt
            assert (await client.replay(receipt, pixels)).same
            assert isinstance([e async for e in client.replay_stream(receipt, pixels)][-1], Replay)
            with pytest.raises(FileNotFoundError):
                await client.explain("none.png")

    asyncio.run(ask())


def test_leaving_an_awaited_stream_cancels_the_call(servicer, address, pixels):
    async def leave() -> None:
        async with camserve.aio.Client(address) as client:
            async with aclosing(client.explain_stream(pixels, model="slow")) as events:
                async for _ in events:
                    assert await asyncio.to_thread(servicer.started.wait, 5)
                    break
            assert await asyncio.to_thread(servicer.cancelled.wait, 5)

    asyncio.run(leave())


def test_cancelling_the_task_cancels_the_call(servicer, address, pixels):
    async def cancel() -> None:
        async with camserve.aio.Client(address) as client:
            task = asyncio.create_task(client.explain(pixels, model="slow"))
            assert await asyncio.to_thread(servicer.started.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.cancelled.wait, 5)

    asyncio.run(cancel())


# ---- one core -------------------------------------------------------------------------------------------------------

STREAMED = ["explain", "evaluate", "replay"]
METHODS = [*STREAMED, *(f"{name}_stream" for name in STREAMED), "models", "methods", "metrics"]


@pytest.mark.parametrize("name", METHODS)
def test_both_clients_have_the_signature_of_the_call(name):
    sync, awaited = getattr(camserve.Client, name), getattr(camserve.aio.Client, name)
    assert sync.__name__ == awaited.__name__ == name
    assert sync.__doc__ == awaited.__doc__
    ours, theirs = inspect.signature(sync), inspect.signature(awaited)
    assert ours.parameters == theirs.parameters
    assert get_args(theirs.return_annotation)[0] in (ours.return_annotation, *get_args(ours.return_annotation))
    assert inspect.iscoroutinefunction(awaited) != name.endswith("_stream")


def test_every_field_of_a_request_can_be_asked_for():
    """A field added to the contract is not forgotten here."""
    renamed = {"targets": "target", "target_top_k": "top_k", "top_k": "predictions"}
    inside = {"name", "parameters", "layers", "seed"}  # of MethodSpec
    fields = {renamed.get(name, name) for name in pb.ExplainRequest.DESCRIPTOR.fields_by_name} | (inside - {"name"})
    assert set(pb.MethodSpec.DESCRIPTOR.fields_by_name) == inside
    truth = set(pb.Truth.DESCRIPTOR.fields_by_name)
    assert set(inspect.signature(request_messages.explain).parameters) == fields - {"truth"} | truth | {"timeout"}
    fields = set(pb.EvaluateRequest.DESCRIPTOR.fields_by_name) | (inside - {"name"})
    assert set(inspect.signature(request_messages.evaluate).parameters) == fields - {"truth"} | truth | {"timeout"}


READ = ["Prediction", "Cost", "Receipt", "Progress", "Randomised", "Layer", "Model", "Method", "Metric", "Parameter"]


@pytest.mark.parametrize("name", READ)
def test_every_field_of_an_answer_is_read(name):
    fields = [field.name for field in dataclasses.fields(getattr(camserve, name))]
    assert fields == list(getattr(pb, name).DESCRIPTOR.fields_by_name)


def test_every_field_of_a_map_is_read():
    fields = {field.name for field in dataclasses.fields(camserve.SaliencyMap)}
    assert fields == set(pb.SaliencyMap.DESCRIPTOR.fields_by_name) | {"_image"}
