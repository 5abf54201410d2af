"""The messages of the link, and the time until which a slot is in use."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc
from camserve_server import errors
from camserve_server.config import Config
from camserve_server.errors import CamserveError
from camserve_server.models.pixels import Preprocessing
from camserve_server.open_inference import inference_pb2
from camserve_server.open_inference.inference_pb2_grpc import GRPCInferenceServiceStub
from camserve_server.service import status
from camserve_server.service.call import Call
from camserve_server.service.frontends import callers, identity, link_pb2, link_pb2_grpc, messages, shared_memory
from camserve_server.service.frontends.callers import FrontEndServicer, _Slot
from camserve_server.service.frontends.inference import FrontEndInferenceServicer
from camserve_server.service.frontends.link import LinkServicer, _FrontEnd
from camserve_server.service.frontends.shared_memory import SharedMemory, Slots
from camserve_server.service.health import Health
from camserve_server.service.inference import requests as inference_requests
from camserve_server.service.listeners import callers_server
from camserve_server.service.load_reports.reports import LoadReports
from camserve_server.service.prometheus import Metrics
from tests.support import TIMEOUT_S

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CamserveError)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retry_after_s", [None, 0.0, 2.5])
def test_errors_are_the_same_after_the_link(kind: type[CamserveError], retry_after_s: float | None) -> None:
    error = kind("a ☃", field="image", reason="R", metadata={"known": "x"}, retry_after_s=retry_after_s)
    received = messages.error(link_pb2.Failure.FromString(messages.failure(error).SerializeToString()))
    assert type(received) is kind
    assert vars(received) == vars(error)
    if kind is not CamserveError:  # which has no status code
        assert status.trailing_metadata(received, "r") == status.trailing_metadata(error, "r")


def test_pixels_stay_in_the_front_end() -> None:
    tensor = pb.Tensor(shape=[2, 3], data=np.ones(6, "<f4").tobytes())
    request = pb.EvaluateRequest(
        request_id="r",
        image=pb.Image(pixels=pb.Pixels(height=1, width=2, data=b"secret")),
        saliency=tensor,
        metrics=[pb.MetricSpec(name="insertion"), pb.MetricSpec(name="deletion")],
        batch_sizes={"forward": 4},
        truth=pb.Truth(mask=tensor, boxes=[pb.Box(right=1, bottom=1)]),
    )
    sent = messages.without_data(request)
    assert request.image.pixels.data == b"secret"
    for each in (request.image.pixels, request.saliency, request.truth.mask):
        each.data = b""
    assert sent == request


@pytest.mark.parametrize("content", ["encoded", "pixels", "tensor"])
def test_kind_of_the_image_is_kept(content: str) -> None:
    image = pb.Image()
    match content:
        case "encoded":
            image.encoded = b"data"
        case "pixels":
            image.pixels.data = b"data"
        case _:
            image.tensor.data = b"data"
    sent = messages.without_data(pb.ExplainRequest(image=image))
    assert sent.image.WhichOneof("content") == content
    assert sent.image.ByteSize() < image.ByteSize()


def test_slot_is_in_use_until_the_job_has_ended() -> None:
    async def run() -> None:
        link, future = LinkServicer(Config(), None, Metrics()), Future[None]()  # type: ignore[arg-type]  # it runs no call
        front_end = _FrontEnd(None, None, None)  # type: ignore[arg-type]  # the same

        def wait(number: int) -> asyncio.Task[link_pb2.WaitUntilUnusedResponse]:
            request = link_pb2.WaitUntilUnusedRequest(front_end=1, call=number)
            return asyncio.create_task(link.WaitUntilUnused(request, None))

        await wait(7)  # no call has this number
        with link._reading((1, 7), front_end):
            waiting = wait(7)
            await wait(8)
            assert not waiting.done(), "the call may still submit a job that reads the image"
            front_end.call = Call("Explain", None, "r")  # type: ignore[arg-type]  # the same
            front_end.call.job = SimpleNamespace(future=future)  # type: ignore[assignment]
        await wait(8)
        assert not waiting.done(), "the job still reads the image"
        future.set_result(None)
        await waiting
        await wait(7)
        assert not link._unused

    asyncio.run(run())


def test_slot_is_free_if_a_call_ends_without_a_job() -> None:
    async def run() -> None:
        link = LinkServicer(Config(), None, Metrics())  # type: ignore[arg-type]  # it runs no call
        request = link_pb2.WaitUntilUnusedRequest(front_end=1, call=7)
        with pytest.raises(CamserveError), link._reading((1, 7), _FrontEnd(None, None, None)):  # type: ignore[arg-type]
            waiting = asyncio.create_task(link.WaitUntilUnused(request, None))
            await asyncio.sleep(0)
            assert not waiting.done()
            raise CamserveError("refused")
        await waiting
        assert not link._unused

    asyncio.run(run())


def test_slot_is_released_if_the_call_ends_before_it_is_written() -> None:
    async def run() -> None:
        file = shared_memory.create()
        memory = SharedMemory(file)
        slots, preprocessing = Slots(memory), Preprocessing((4, 4), (0.0,), (1.0,), "nearest")

        async def unused() -> None:
            """Return at once."""

        slot = _Slot(slots, preprocessing, unused)
        with slot:
            assert slots.take((4, 4, 1)), "another slot"
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert slots.take((4, 4, 1)) == 0, "the first slot is free again"
        with pytest.raises(asyncio.CancelledError):
            slot.write(memory, pb.ExplainRequest(), preprocessing, 1)
        os.close(file)

    asyncio.run(run())


class Admitting(LinkServicer):
    """The end of the link of an engine process that admits a call and waits for its image."""

    async def Run(self, _: object, context: Any) -> None:  # type: ignore[override]  # the stubs know generators only
        await context.read()
        admitted = link_pb2.Admitted(request_id="r", size=(4, 4), mean=[0.0], std=[1.0], interpolation="nearest")
        await context.write(link_pb2.RunResponse(admitted=admitted))
        await context.read()


class Announcing:
    """The context of a call whose connection does not take the initial metadata."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()

    def time_remaining(self) -> None:
        """Return no deadline."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def auth_context(self) -> dict[str, Any]:
        return {}

    async def send_initial_metadata(self, _: object) -> None:
        self.begun.set()
        await asyncio.get_running_loop().create_future()


def test_slot_is_released_if_the_call_is_cancelled_while_it_is_announced(tmp_path: Path) -> None:
    async def run() -> None:
        config, link, memory = Config(open_inference=False), grpc.aio.server(), shared_memory.create()
        link_pb2_grpc.add_LinkServiceServicer_to_server(Admitting(config, None, Metrics()), link)  # type: ignore[arg-type]
        link.add_insecure_port(f"unix:{tmp_path}/link")
        await link.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/link") as channel:
            servicer, context = FrontEndServicer(config, 1, channel, SharedMemory(memory)), Announcing()
            call = asyncio.create_task(servicer.Explain(pb.ExplainRequest(), context))  # type: ignore[arg-type]
            await context.begun.wait()
            call.cancel()
            await asyncio.wait([call, *callers._waiting])
            await asyncio.gather(*callers._waiting)
            await asyncio.sleep(0)
            assert servicer._slots.take((4, 4, 1)) == 0, "the first slot is free again"
        await link.stop(0)
        os.close(memory)

    asyncio.run(run())


class Refusing(LinkServicer):
    """The end of the link of an engine process that notes which calls a front end has refused."""

    def __init__(self) -> None:
        super().__init__(Config(), None, Metrics())  # type: ignore[arg-type]
        self.calls: list[tuple[str, str, str]] = []

    async def Run(self, _: object, context: Any) -> None:  # type: ignore[override]  # the stubs know generators only
        start = (await context.read()).start
        failure = link_pb2.Failure.FromString(dict(context.invocation_metadata())[identity._REFUSAL])
        self.calls.append((start.rpc, start.explain.request_id, type(messages.error(failure)).__name__))
        await context.abort(grpc.StatusCode.CANCELLED, "")


def test_engine_process_learns_of_calls_that_are_cancelled_while_they_are_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, resumed = threading.Event(), threading.Event()

    def held(message: inference_pb2.ModelInferRequest) -> None:
        begun.set()
        resumed.wait(TIMEOUT_S)

    monkeypatch.setattr(inference_requests, "explain_request", held)

    async def run() -> list[tuple[str, str, str]]:
        link, memory, refusing = grpc.aio.server(), shared_memory.create(), Refusing()
        link_pb2_grpc.add_LinkServiceServicer_to_server(refusing, link)
        link.add_insecure_port(f"unix:{tmp_path}/link")
        await link.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/link") as channel:
            servicer = FrontEndServicer(Config(), 1, channel, SharedMemory(memory))
            inference = FrontEndInferenceServicer(servicer, channel)
            loads = LoadReports(lambda: 1.0)
            front = callers_server(Config(), servicer, Health(), servicer.count_refusal, inference, loads)
            port = front.add_insecure_port("127.0.0.1:0")
            await front.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as callers:
                request = inference_pb2.ModelInferRequest(id="r", model_name="tiny")
                request.inputs.add(name="image").contents.fp32_contents.append(0)
                call = GRPCInferenceServiceStub(callers).ModelInfer(request)
                sent = asyncio.ensure_future(call)
                assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
                call.cancel()
                await asyncio.wait([sent])
                async with asyncio.timeout(TIMEOUT_S):
                    while not refusing.calls:
                        await asyncio.sleep(0.01)
            resumed.set()
            await front.stop(0)
        await link.stop(0)
        os.close(memory)
        return refusing.calls

    assert asyncio.run(run()) == [("ModelInfer", "r", "Cancelled")]


class Stopping(LinkServicer):
    """The end of the link of an engine process that stops while a call runs."""

    async def Run(self, _: object, context: Any) -> None:  # type: ignore[override]  # the stubs know generators only
        await context.read()
        await context.abort(grpc.StatusCode.CANCELLED, "")


def test_caller_may_try_again_if_the_engine_process_stops(tmp_path: Path) -> None:
    async def run() -> grpc.aio.AioRpcError:
        config = Config(open_inference=False)
        link, memory = grpc.aio.server(), shared_memory.create()
        link_pb2_grpc.add_LinkServiceServicer_to_server(Stopping(config, None, Metrics()), link)  # type: ignore[arg-type]
        link.add_insecure_port(f"unix:{tmp_path}/link")
        await link.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/link") as channel:
            servicer = FrontEndServicer(config, 1, channel, SharedMemory(memory))
            front = callers_server(config, servicer, Health(), servicer.count_refusal, None, LoadReports(lambda: 1.0))
            port = front.add_insecure_port("127.0.0.1:0")
            await front.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as callers:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await explain_pb2_grpc.ExplainServiceStub(callers).Explain(pb.ExplainRequest(request_id="r"))
            await front.stop(0)
        await link.stop(0)
        os.close(memory)
        return caught.value

    error = asyncio.run(run())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the server has shut down; try another one"
    assert ("grpc-retry-pushback-ms", "1000") in tuple(error.trailing_metadata())
