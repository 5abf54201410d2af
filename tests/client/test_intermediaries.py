"""Errors that do not come from a camserve server. tests/e2e/test_proxies.py has real proxies."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import camserve
from camserve import connection, intermediaries
from camserve.addresses import check_target
from camserve.v1 import explain_pb2 as pb
from tests.client.fake_server import WAIT_S, Servicer, listening

CODE = grpc.StatusCode


def described(
    code: grpc.StatusCode, details: str, *, started: bool = False, address: str = "explain.example:443"
) -> Any:
    return intermediaries.describe(code, details, address=address, timeout_s=2.5, started=started)


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("status", "code", "expected", "reason", "part"),
    [
        (413, CODE.UNKNOWN, CODE.RESOURCE_EXHAUSTED, "TOO_LARGE", "client_max_body_size"),
        (504, CODE.UNAVAILABLE, CODE.UNAVAILABLE, "", "read timeout"),
        (502, CODE.UNAVAILABLE, CODE.UNAVAILABLE, "", "cannot reach the camserve server"),
        (503, CODE.UNAVAILABLE, CODE.UNAVAILABLE, "", "no camserve server"),
        (408, CODE.UNKNOWN, CODE.UNAVAILABLE, "", "request bodies"),
        (403, CODE.PERMISSION_DENIED, CODE.PERMISSION_DENIED, "", "forbids the call"),
        (418, CODE.UNKNOWN, CODE.UNKNOWN, "", "check the address"),
    ],
)
def test_http_status_names_the_proxy_and_a_remedy(
    status: int, code: grpc.StatusCode, expected: grpc.StatusCode, reason: str, part: str
) -> None:
    failure = described(code, f"Received http2 header with status: {status}")
    assert (failure.code, failure.reason) == (expected, reason)
    assert part in failure.message
    assert f"HTTP status {status}" in failure.message
    assert "proxy" in failure.message


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (CODE.INTERNAL, "Received RST_STREAM with error code 2"),
        (CODE.CANCELLED, "Received RST_STREAM with error code 8"),
        (CODE.UNKNOWN, "Stream removed"),
        (CODE.UNAVAILABLE, "Socket closed"),
    ],
)
def test_lost_connection_is_unavailable_and_says_whether_the_call_had_started(
    code: grpc.StatusCode, details: str
) -> None:
    late, early = described(code, details, started=True), described(code, details)
    assert (late.code, late.reason) == (CODE.UNAVAILABLE, "INTERRUPTED")
    assert "after the server had started the call" in late.message
    assert (early.code, early.reason) == (CODE.UNAVAILABLE, "")
    assert "no response from a camserve server" in early.message


def test_deadline_says_whether_the_call_had_started() -> None:
    assert "the server has not started the call" in described(CODE.DEADLINE_EXCEEDED, "Deadline Exceeded").message
    late = described(CODE.DEADLINE_EXCEEDED, "Deadline Exceeded", started=True)
    assert late.message == "no response from explain.example:443 within 2.5 s; increase the timeout"


def test_status_of_a_cancelled_call_stays() -> None:
    assert described(CODE.CANCELLED, "Locally cancelled by application!", started=True).code is CODE.CANCELLED


def test_message_beyond_the_limit_of_grpc_is_too_large(
    servicer: Servicer, client: camserve.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        connection,
        "_COMMON_OPTIONS",
        [(name, 100 if "receive" in name else value) for name, value in connection._COMMON_OPTIONS],
    )
    with pytest.raises(camserve.TooLarge, match="map_dtype"):
        client.explain(np.zeros((8, 8, 3), np.uint8))
    assert len(servicer.requests) == 1


def test_call_is_not_repeated_after_its_start(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    def before(context: Any) -> None:
        context.send_initial_metadata(((intermediaries.ADMITTED, "räq".encode()),))
        time.sleep(1)  # so that the status does not arrive together with the initial metadata
        context.abort(CODE.UNAVAILABLE, "gone")

    servicer.before = before
    for timeout in (20, 2 * WAIT_S):
        servicer.requests.clear()
        with pytest.raises(camserve.Unavailable, match="does not repeat") as caught:
            client.explain(pixels, timeout=timeout)
        assert (caught.value.request_id, caught.value.reason) == ("räq", "INTERRUPTED")
        assert len(servicer.requests) == 1


class Streaming(Servicer):
    """Records `heartbeats_only` of each stream, and sends no result to the model "broken"."""

    def __init__(self) -> None:
        super().__init__()
        self.streamed: list[bool] = []

    def ExplainStream(self, request: pb.ExplainStreamRequest, context: Any) -> Iterator[pb.ExplainStreamResponse]:
        self.streamed.append(request.heartbeats_only)
        yield pb.ExplainStreamResponse(progress=pb.Progress())
        if request.request.model != "broken":
            yield pb.ExplainStreamResponse(result=self.Explain(request.request, context))


def test_long_calls_use_the_stream(pixels: NDArray[np.uint8]) -> None:
    servicer, long_s = Streaming(), connection.LONG_CALL_S + 1
    with listening(servicer) as address, camserve.Client(address, timeout=connection.LONG_CALL_S) as client:
        client.explain(pixels)
        assert not servicer.streamed
        explained = client.explain(pixels, timeout=long_s)
        assert servicer.streamed == [True]
        assert client.replay(explained.receipt, pixels, timeout=long_s).same
        assert [result.error for result in client.explain_many([pixels], timeout=long_s)] == [None]
        assert servicer.streamed == [True] * 3
        assert client.evaluate(pixels, method="a", timeout=long_s).cost.rows == 9
        with pytest.raises(camserve.InternalError, match="without a result"):
            client.explain(pixels, model="broken", timeout=long_s)


# ---- HTTP proxies of the environment ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "address", "expected"),
    [
        ({}, "explain.example:443", None),
        ({"http_proxy": "http://proxy.example:3128"}, "explain.example:443", ("http_proxy", "proxy.example:3128")),
        ({"http_proxy": "http://user:word@proxy:3128/"}, "dns:///explain.example", ("http_proxy", "proxy:3128")),
        ({"https_proxy": "proxy:1", "http_proxy": "other:1"}, "explain:1", ("https_proxy", "proxy:1")),
        ({"grpc_proxy": "http://proxy:1", "https_proxy": "other:1"}, "explain:1", ("grpc_proxy", "proxy:1")),
        ({"http_proxy": "http://proxy:1", "no_proxy": "a.example, .example"}, "explain.example:443", None),
        ({"http_proxy": "http://proxy:1", "no_proxy": "10.0.0.1"}, "ipv4:10.0.0.1:1", None),
        ({"http_proxy": "http://proxy:1"}, "127.0.0.1:1", None),
        ({"http_proxy": "http://proxy:1"}, "unix:///run/camserve.sock", None),
    ],
)
def test_proxy_of_the_environment_is_found(
    environment: dict[str, str], address: str, expected: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert intermediaries.proxy_variable(address) == expected


def test_error_names_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:word@127.0.0.1:1")
    with (
        camserve.Client("192.0.2.1:50051", timeout=5) as client,
        pytest.raises(camserve.CamserveError, match=r"http_proxy .* proxy 127\.0\.0\.1:1; .* no_proxy") as caught,
    ):
        client.models()
    assert "word" not in str(caught.value)


# ---- addresses and states --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["::1:50051", "::1", "2001:db8::1:50051", "ipv6:::1:50051", "dns:///::1:50051"])
def test_ipv6_hosts_need_brackets(address: str) -> None:
    for kind in (camserve.Client, camserve.aio.Client, camserve.Admin):
        with pytest.raises(camserve.InvalidArgument, match=r"without brackets; write it as in \[::1\]:50051") as caught:
            kind(address)
        assert caught.value.field == "address"


@pytest.mark.parametrize(
    "address",
    ["[::1]:1", "ipv6:[::1]:1,[::2]:2", "dns:///[::1]:1", "dns://8.8.8.8:53/a:1", "unix:a:b:c", "a", "ipv4:1.1.1.1:1"],
)
def test_other_addresses_are_accepted(address: str) -> None:
    check_target(address)


def test_closed_client_says_so(client: camserve.Client, caplog: pytest.LogCaptureFixture) -> None:
    client.close()
    caplog.set_level(logging.WARNING)
    for call in (client.models, lambda: next(client.explain_stream(b"")), lambda: client.explain(b"")):
        with pytest.raises(camserve.CamserveError, match="the client is closed; create a new one"):
            call()
