"""Errors of the server, parsed without googleapis-common-protos."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from typing import Any as AnyType

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray

import camserve
from camserve import errors, responses
from camserve.v1 import explain_pb2 as pb
from tests.client.fake_server import Servicer

CLASSES = {kind.code: kind for kind in camserve.CamserveError.__subclasses__()}


def packed(*details: Message) -> list[Any]:
    messages = []
    for detail in details:
        message = Any()
        message.Pack(detail)
        messages.append(message)
    return messages


def abort(code: grpc.StatusCode, message: str, *details: Message) -> Callable[[grpc.ServicerContext], None]:
    """Return a function that aborts a call with a status and its details."""
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message, details=packed(*details))
    return lambda context: context.abort_with_status(rpc_status.to_status(status))


ALL = (
    error_details_pb2.ErrorInfo(reason="UNKNOWN_NAME", domain="camserve", metadata={"known": "a, b", "more": "ü"}),
    error_details_pb2.DebugInfo(detail="ignored"),
    error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field="method.name", description="?")]
    ),
    error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)),
    error_details_pb2.RequestInfo(request_id="r-1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("code", CLASSES, ids=lambda code: code.name)
def test_status_code_maps_to_its_class_with_details(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8], code: grpc.StatusCode
) -> None:
    servicer.before = abort(code, "what and why", *ALL)
    calls: tuple[Callable[..., AnyType], ...] = (client.explain, client.evaluate_stream)
    for call in calls:
        with pytest.raises(CLASSES[code]) as caught:
            list(call(pixels, method="x"))
        error = caught.value
        assert type(error) is CLASSES[code]
        assert error.code is code
        assert error.message == "what and why"
        assert (error.field, error.reason, error.request_id) == ("method.name", "UNKNOWN_NAME", "r-1")
        assert error.metadata == {"known": "a, b", "more": "ü"}
        assert error.retry_after_s == 2.5
        assert str(error) == "what and why [field method.name, request r-1]"


def test_aio_client_raises_the_same_errors(servicer: Servicer, address: str, pixels: NDArray[np.uint8]) -> None:
    servicer.before = abort(grpc.StatusCode.NOT_FOUND, "no such model", *ALL)

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            with pytest.raises(camserve.NotFound) as caught:
                await client.explain(pixels)
            assert caught.value.request_id == "r-1"
            with pytest.raises(camserve.NotFound):
                _ = [event async for event in client.evaluate_stream(pixels, method="x")]

    asyncio.run(ask())


def test_unmapped_status_code_is_kept(servicer: Servicer, client: camserve.Client) -> None:
    servicer.before = abort(grpc.StatusCode.DATA_LOSS, "gone")
    with pytest.raises(camserve.CamserveError) as caught:
        client.models()
    assert type(caught.value) is camserve.CamserveError
    assert (caught.value.code, str(caught.value)) == (grpc.StatusCode.DATA_LOSS, "gone")


def test_malformed_details_do_not_hide_the_error(servicer: Servicer, client: camserve.Client) -> None:
    def plain(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "wrong")

    servicer.before = plain
    with pytest.raises(camserve.InvalidArgument, match=r"^wrong$") as caught:
        client.models()
    assert (caught.value.field, caught.value.metadata, caught.value.retry_after_s) == ("", {}, None)


def test_error_without_message_contains_the_code(servicer: Servicer, client: camserve.Client) -> None:
    servicer.before = lambda context: context.abort(grpc.StatusCode.INTERNAL, "")
    with pytest.raises(camserve.InternalError, match=r"^INTERNAL$"):
        client.models()


@pytest.mark.slow
def test_unreachable_server_error_names_the_address(pixels: NDArray[np.uint8]) -> None:
    with camserve.Client("127.0.0.1:1") as client:
        with pytest.raises(camserve.Unavailable, match=r"no response from a camserve server at 127\.0\.0\.1:1: "):
            client.explain(pixels)
        with pytest.raises(camserve.Unavailable, match=r"127\.0\.0\.1:1"):
            next(client.explain_stream(pixels))


@pytest.mark.slow
def test_message_of_a_loading_server_is_kept(servicer: Servicer, client: camserve.Client) -> None:
    servicer.before = abort(grpc.StatusCode.UNAVAILABLE, "loading", *ALL)
    with pytest.raises(camserve.Unavailable, match=r"^loading"):
        client.models()


def test_response_without_a_map_raises_internal_error() -> None:
    cases: list[tuple[Callable[..., object], object]] = [
        (responses.explanation, pb.ExplainResponse(request_id="r")),
        (responses.evaluation, pb.EvaluateResponse(request_id="r")),
    ]
    for parse, response in cases:
        with pytest.raises(camserve.InternalError, match="no saliency map") as caught:
            parse(response, pb.Image())
        assert caught.value.request_id == "r"


def test_errors_can_be_pickled() -> None:
    error = camserve.NotFound("no", field="model", metadata={"known": "a"}, request_id="r")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), vars(again), str(again)) == (type(error), vars(error), str(error))


def test_documented_exception_tree_is_complete() -> None:
    lines = [line.removeprefix("│   ") for line in (errors.__doc__ or "").splitlines()]
    documented = [line.split()[1] for line in lines if line.startswith(("├──", "└──"))]
    assert sorted(documented) == sorted([*(kind.__name__ for kind in CLASSES.values()), "TooLarge"])
    assert sorted(errors.__all__) == sorted([*documented, "CamserveError"])
    assert set(errors.__all__) <= set(camserve.__all__)
