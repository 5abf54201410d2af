"""Errors as the server sends them, read without googleapis-common-protos."""

from __future__ import annotations

import asyncio
import pickle

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

import camserve
from camserve import answers, errors
from camserve.v1 import explain_pb2 as pb

NAMED = {kind.code: kind for kind in camserve.CamserveError.__subclasses__()}


def packed(*details: object) -> list[Any]:
    messages = []
    for detail in details:
        message = Any()
        message.Pack(detail)
        messages.append(message)
    return messages


def abort(code: grpc.StatusCode, message: str, *details: object):
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message, details=packed(*details))
    return lambda context: context.abort_with_status(rpc_status.to_status(status))


ALL = (
    error_details_pb2.ErrorInfo(reason="UNKNOWN_NAME", domain="camserve", metadata={"known": "a, b", "more": "ü"}),
    error_details_pb2.DebugInfo(detail="of no interest"),
    error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field="method.name", description="?")]
    ),
    error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)),
    error_details_pb2.RequestInfo(request_id="r-1"),
)


@pytest.mark.parametrize("code", NAMED, ids=lambda code: code.name)
def test_each_code_has_its_class_and_its_details(servicer, client, pixels, code):
    servicer.before = abort(code, "what and why", *ALL)
    for call in (client.explain, client.evaluate_stream):
        with pytest.raises(NAMED[code]) as caught:
            list(call(pixels, method="x"))
        error = caught.value
        assert type(error) is NAMED[code]
        assert error.code is code
        assert error.message == "what and why"
        assert (error.field, error.reason, error.request_id) == ("method.name", "UNKNOWN_NAME", "r-1")
        assert error.metadata == {"known": "a, b", "more": "ü"}
        assert error.retry_after_s == 2.5
        assert str(error) == "what and why [field method.name, request r-1]"


def test_awaited_calls_raise_the_same(servicer, address, pixels):
    servicer.before = abort(grpc.StatusCode.NOT_FOUND, "no such model", *ALL)

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            with pytest.raises(camserve.NotFound) as caught:
                await client.explain(pixels)
            assert caught.value.request_id == "r-1"
            with pytest.raises(camserve.NotFound):
                _ = [event async for event in client.evaluate_stream(pixels, method="x")]

    asyncio.run(ask())


def test_a_code_without_a_class_keeps_its_code(servicer, client):
    servicer.before = abort(grpc.StatusCode.DATA_LOSS, "gone")
    with pytest.raises(camserve.CamserveError) as caught:
        client.models()
    assert type(caught.value) is camserve.CamserveError
    assert (caught.value.code, str(caught.value)) == (grpc.StatusCode.DATA_LOSS, "gone")


def test_details_that_are_missing_or_unreadable_do_not_hide_the_error(servicer, client):
    def plain(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "wrong")

    servicer.before = plain
    with pytest.raises(camserve.InvalidArgument, match=r"^wrong$") as caught:
        client.models()
    assert (caught.value.field, caught.value.metadata, caught.value.retry_after_s) == ("", {}, None)


def test_an_error_without_a_message_says_its_code(servicer, client):
    servicer.before = lambda context: context.abort(grpc.StatusCode.INTERNAL, "")
    with pytest.raises(camserve.InternalError, match=r"^INTERNAL$"):
        client.models()


def test_nobody_there_names_the_address(pixels):
    with camserve.Client("127.0.0.1:1") as client:
        with pytest.raises(camserve.Unavailable, match=r"no response from a camserve server at 127\.0\.0\.1:1: "):
            client.explain(pixels)
        with pytest.raises(camserve.Unavailable, match=r"127\.0\.0\.1:1"):
            next(client.explain_stream(pixels))


def test_a_server_that_is_loading_says_so_itself(servicer, client):
    servicer.before = abort(grpc.StatusCode.UNAVAILABLE, "loading", *ALL)
    with pytest.raises(camserve.Unavailable, match=r"^loading"):
        client.models()


def test_an_answer_without_a_map_is_the_servers_bug():
    for read, answer in (
        (answers.explanation, pb.ExplainResponse(request_id="r")),
        (answers.evaluation, pb.EvaluateResponse(request_id="r")),
    ):
        with pytest.raises(camserve.InternalError, match="no saliency map") as caught:
            read(answer, pb.Image())
        assert caught.value.request_id == "r"


def test_errors_survive_pickling():
    error = camserve.NotFound("no", field="model", metadata={"known": "a"}, request_id="r")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), vars(again), str(again)) == (type(error), vars(error), str(error))


def test_the_drawn_tree_is_the_real_one():
    drawn = [line.split()[1] for line in (errors.__doc__ or "").splitlines() if line.startswith(("├──", "└──"))]
    assert sorted(drawn) == sorted(kind.__name__ for kind in NAMED.values())
    assert sorted(errors.__all__) == sorted([*drawn, "CamserveError"])
    assert set(errors.__all__) <= set(camserve.__all__)
