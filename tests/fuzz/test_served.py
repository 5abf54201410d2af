"""Fuzz tests over a real channel: each request gets an answer or a documented error, and the server survives."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings

from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.config import Config, ModelConfig
from tests.conftest import serving
from tests.fuzz.sample_images import VALID
from tests.fuzz.test_requests import EVALUATE, EXPLAIN, HUGE, ld
from tests.processes import LIMIT_S

# Codes that hostile requests may get. UNKNOWN and INTERNAL would be the result of a bug.
CODES = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
GOOD_REQUEST = pb.ExplainRequest(image=pb.Image(encoded=VALID["png"]), method=pb.MethodSpec(name="grad-cam"))


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one process", "two front ends"]
)
def channel(request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    with (
        serving(
            Config(listen="127.0.0.1:0", models=[tiny], max_image_pixels=1_000_000, frontends=request.param)
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield channel


def reason(error: grpc.RpcError) -> tuple[str, str]:
    """Check the code and the details of an error, and return its reason and its field."""
    assert error.code().name in CODES, error.details()
    metadata = {entry.key: entry.value for entry in error.trailing_metadata()}
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "camserve"
    return info.reason, info.metadata["field"]


# Hypothesis warns if the state of `random` changes while it draws. Other threads of the process may do that.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module", "ignore:Generating overly large repr")
@FUZZ
@given(request=EXPLAIN | EVALUATE)
def test_requests_get_an_answer_or_a_documented_error(
    channel: grpc.Channel, request: pb.ExplainRequest | pb.EvaluateRequest
) -> None:
    request.model = ""
    request.budget = 200  # limits the rows of valid requests
    stub = ExplainServiceStub(channel)
    try:
        if isinstance(request, pb.ExplainRequest):
            assert stub.Explain(request, timeout=LIMIT_S).maps
        else:
            assert stub.Evaluate(request, timeout=LIMIT_S).map.scores
    except grpc.RpcError as error:
        assert reason(error)[1] or error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def raw(channel: grpc.Channel, rpc: str, data: bytes) -> bytes:
    """Send the bytes without encoding them, and return the answer."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes]
    call = channel.unary_unary(f"/camserve.v1.ExplainService/{rpc}", None, None)
    return call(data, timeout=LIMIT_S)


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_huge_message_is_refused(channel: grpc.Channel, name: str) -> None:
    build, field = HUGE[name]
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, "Explain", build())
    assert reason(caught.value) == ("TOO_LARGE", field)
    assert raw(channel, "Explain", GOOD_REQUEST.SerializeToString())


@pytest.mark.parametrize("data", [b"\xff", b"\x22\xff\xff", b"\x0a\x04\xff\xff\xff\xff", ld(3, b"\x0b" * 1000)])
def test_invalid_message_is_refused(channel: grpc.Channel, data: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, "Explain", data)
    assert reason(caught.value) == ("INVALID", "")


def test_huge_message_to_a_list_call_is_refused(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, "ListMethods", ld(1, b"a" * 100_000))
    assert reason(caught.value) == ("TOO_LARGE", "model")


@pytest.mark.parametrize("name", ["a" * 60_000, "\u2603" * 20_000, "\x00" * 60_000])
def test_error_about_a_long_name_is_short_enough_to_arrive(channel: grpc.Channel, name: str) -> None:
    stub = ExplainServiceStub(channel)
    for wrong, expected in (
        (pb.ExplainRequest(model=name), "UNKNOWN_NAME"),
        (pb.ExplainRequest(method=pb.MethodSpec(name=name)), "UNKNOWN_NAME"),
        (pb.ExplainRequest(method=pb.MethodSpec(layers=[name])), "INVALID"),
        (pb.ExplainRequest(targets=[pb.Target(label=name)]), "INVALID"),
        (pb.ExplainRequest(metrics=[pb.MetricSpec(name=name)]), "UNKNOWN_NAME"),
        (pb.ExplainRequest(batch_sizes={name: 1}), "OUT_OF_RANGE"),
        (pb.ExplainRequest(request_id=name), "INVALID"),
        (pb.ExplainRequest(precision=name), "UNSERVABLE"),
    ):
        request = pb.ExplainRequest()
        request.CopyFrom(GOOD_REQUEST)
        request.MergeFrom(wrong)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Explain(request, timeout=LIMIT_S)
        assert reason(caught.value)[0] == expected
    request.CopyFrom(GOOD_REQUEST)
    request.method.parameters.update({name: 1})
    with pytest.raises(grpc.RpcError) as caught:
        stub.Explain(request, timeout=LIMIT_S)
    assert reason(caught.value)[1].startswith("method.parameters.")
