"""Connection: retries, load balancing, TLS, tokens and trace context."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1.health_pb2 import HealthCheckResponse
from numpy.typing import NDArray

import camserve
from camserve import connection
from camserve_server.errors import QueueFull, TooLarge, Unavailable
from camserve_server.service import status
from tests.client.fake_server import WAIT_S, Health, Servicer, listening, wait_until
from tests.client.proxy import forwarding
from tests.processes import free_port

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING

# Larger than the default retry buffer of gRPC.
LARGE = np.zeros((700, 700, 3), np.uint8)


# ---- retries ---------------------------------------------------------------------------------------------------------


def refuse(servicer: Servicer, error: Any, times: int) -> None:
    """Make the fake server refuse the first requests with an error of the real server."""
    left = iter(range(times))

    def before(context: Any) -> None:
        if next(left, None) is not None:
            context.set_trailing_metadata(status.trailing_metadata(error, "r"))
            context.abort(status.code(error), str(error))

    servicer.requests.clear()
    servicer.before = before


FULL = QueueFull("too many rows are owed", retry_after_s=0.02)
LOADING = Unavailable("loading", retry_after_s=0.02)


@pytest.mark.parametrize("error", [FULL, LOADING], ids=lambda error: error.code)
def test_busy_server_receives_at_most_four_attempts(
    servicer: Servicer, address: str, client: camserve.Client, error: Any
) -> None:
    refuse(servicer, error, 3)
    assert client.explain(LARGE).cost.rows == 12
    assert len(servicer.requests) == 4

    async def ask() -> None:
        async with camserve.aio.Client(address) as client:
            await client.explain(LARGE)

    refuse(servicer, error, 3)
    asyncio.run(ask())
    assert len(servicer.requests) == 4
    refuse(servicer, error, 4)
    with pytest.raises(camserve.CamserveError) as caught:
        client.explain(LARGE)
    assert caught.value.code is status.code(error)
    assert (caught.value.retry_after_s, caught.value.request_id) == (0.02, "r")
    assert len(servicer.requests) == 4


@pytest.mark.slow
def test_retry_waits_for_the_delay_of_the_server(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    refuse(servicer, QueueFull("too many rows are owed", retry_after_s=0.7), 1)
    start = time.monotonic()
    client.explain(pixels)
    assert time.monotonic() - start >= 0.7
    assert len(servicer.requests) == 2


def test_retry_without_a_server_delay_uses_the_client_backoff(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    left = iter(range(1))
    servicer.before = lambda context: (
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone") if next(left, None) is not None else None
    )
    start = time.monotonic()
    client.explain(pixels)
    assert time.monotonic() - start >= 0.05
    assert len(servicer.requests) == 2


def test_permanent_errors_are_not_retried(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    refuse(servicer, TooLarge("the image has too many pixels"), 9)
    with pytest.raises(camserve.ResourceExhausted) as caught:
        client.explain(pixels)
    assert caught.value.retry_after_s is None
    assert len(servicer.requests) == 1
    servicer.before = lambda context: context.abort(grpc.StatusCode.INTERNAL, "a bug")
    with pytest.raises(camserve.InternalError):
        client.explain(pixels)
    assert len(servicer.requests) == 2


@pytest.mark.slow
def test_retries_end_at_the_timeout(servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    client.models()  # Connect first, so that the timeout applies only to the request and its retries.
    refuse(servicer, QueueFull("too many rows are owed", retry_after_s=10 * WAIT_S), 9)
    with pytest.raises(camserve.DeadlineExceeded):
        client.explain(pixels, timeout=1)
    assert len(servicer.requests) == 1


def test_waits_of_evaluate_many_do_not_count_towards_the_timeout(
    servicer: Servicer,
    address: str,
    client: camserve.Client,
    pixels: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each refusal is one request: gRPC does not retry it in addition to the client."""
    delay_s = 10 * WAIT_S  # longer than the timeout of the client
    waits: list[float] = []
    sleep = asyncio.sleep

    async def aio_sleep(seconds: float) -> None:
        if seconds < delay_s:
            await sleep(seconds)
        else:
            waits.append(seconds)

    monkeypatch.setattr("camserve.client.time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(asyncio, "sleep", aio_sleep)
    busy = QueueFull("too many rows are owed", retry_after_s=delay_s)
    refuse(servicer, busy, 3)
    [result] = client.evaluate_many([pixels], methods="a")
    assert (result.error, len(servicer.requests), waits) == (None, 4, [delay_s] * 3)

    async def ask() -> list[camserve.Result]:
        async with camserve.aio.Client(address, timeout=WAIT_S) as aio_client:
            return [result async for result in aio_client.evaluate_many([pixels], methods="a")]

    refuse(servicer, busy, 3)
    assert [result.error for result in asyncio.run(ask())] == [None]
    assert (len(servicer.requests), waits) == (4, [delay_s] * 6)
    refuse(servicer, LOADING, 3)
    [result] = client.evaluate_many([pixels], methods="a")
    assert (result.error, len(servicer.requests)) == (None, 4)


# ---- several servers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_calls_are_distributed_over_ready_servers() -> None:
    servicers, healths = [Servicer(), Servicer()], [Health(), Health()]
    with contextlib.ExitStack() as stack:
        addresses = [
            stack.enter_context(listening(servicer, health=health))
            for servicer, health in zip(servicers, healths, strict=True)
        ]
        client = stack.enter_context(camserve.Client("ipv4:" + ",".join(addresses)))

        def request_counts() -> list[int]:
            for servicer in servicers:
                servicer.requests.clear()
            for _ in range(10):
                client.models()
            return [len(servicer.requests) for servicer in servicers]

        wait_until(lambda: request_counts() == [5, 5])
        healths[0].state = NOT_SERVING
        wait_until(lambda: request_counts() == [0, 10])

        async def ask() -> None:
            async with camserve.aio.Client(client.address) as aio_client:
                for _ in range(10):
                    await aio_client.models()

        servicers[1].requests.clear()
        asyncio.run(ask())
        assert len(servicers[1].requests) == 10
        healths[1].state = NOT_SERVING

        def unavailable() -> bool:
            try:
                client.models(timeout=WAIT_S)
            except camserve.Unavailable as error:
                return "loading its models or shutting down" in str(error)
            return False

        wait_until(unavailable)
        healths[0].state = SERVING
        wait_until(lambda: [*map(bool, request_counts())] == [True, False])


def test_dns_names_are_resolved() -> None:
    with listening(Servicer()) as address:
        port = address.rpartition(":")[2]
        for name in (f"dns:///localhost:{port}", f"localhost:{port}"):
            with camserve.Client(name) as client:
                assert client.models()


@pytest.mark.slow
def test_keepalive_detects_a_lost_connection(servicer: Servicer, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEEPALIVE_MS", 200)
    monkeypatch.setattr(connection, "KEEPALIVE_TIMEOUT_MS", 300)
    silent = threading.Event()
    with forwarding(address, silent) as proxy_address, camserve.Client(proxy_address, timeout=None) as client:

        def cut() -> None:
            servicer.started.wait(WAIT_S)
            silent.set()

        threading.Thread(target=cut).start()
        with pytest.raises(camserve.Unavailable):
            client.explain(LARGE, model="slow")


def test_server_permits_the_ping_interval_of_the_client() -> None:
    from camserve_server.service import listeners

    options = dict(listeners.KEEPALIVE)
    assert options["grpc.http2.min_ping_interval_without_data_ms"] < connection.KEEPALIVE_MS
    assert options["grpc.keepalive_permit_without_calls"] == 1


# ---- TLS and tokens --------------------------------------------------------------------------------------------------


def test_tls_with_a_token(
    servicer: Servicer,
    authority: trustme.CA,
    certificate: tuple[bytes, bytes],
    tmp_path: Path,
    pixels: NDArray[np.uint8],
) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    with listening(servicer, grpc.ssl_server_credentials([certificate])) as address:
        for form in (ca, str(ca), ca.read_bytes()):
            with camserve.Client(address, ca=form, token="secret") as client:
                client.explain(pixels)
                assert servicer.metadata["authorization"] == "Bearer secret"
                assert "secret" not in repr(client)

        async def ask() -> None:
            async with camserve.aio.Client(address, ca=ca, token="other") as client:
                await client.explain(pixels)
                assert [type(event) async for event in client.explain_stream(pixels)][-1] is camserve.Explanation

        asyncio.run(ask())
        assert servicer.metadata["authorization"] == "Bearer other"


@pytest.mark.slow
def test_mutual_tls(
    servicer: Servicer, authority: trustme.CA, certificate: tuple[bytes, bytes], pixels: NDArray[np.uint8]
) -> None:
    key, chain = certificate
    ca = authority.cert_pem.bytes()
    credentials = grpc.ssl_server_credentials([certificate], ca, require_client_auth=True)
    with listening(servicer, credentials) as address:
        with camserve.Client(address, ca=ca, certificate=chain, key=key) as client:
            assert client.explain(pixels).cost.rows == 12
        with (
            camserve.Client(address, ca=ca) as client,
            pytest.raises(camserve.Unavailable, match="or a client certificate"),
        ):
            client.explain(pixels)


@pytest.mark.slow
def test_failed_tls_handshake_suggests_a_remedy(
    servicer: Servicer, authority: trustme.CA, certificate: tuple[bytes, bytes], address: str
) -> None:
    ca = authority.cert_pem.bytes()
    other_authority = trustme.CA()
    issued = other_authority.issue_cert("elsewhere.example")
    elsewhere = issued.private_key_pem.bytes(), b"".join(each.bytes() for each in issued.cert_chain_pems)

    def message(address: str, **options: Any) -> str:
        with camserve.Client(address, **options) as client, pytest.raises(camserve.Unavailable) as caught:
            client.models()
        return caught.value.message

    assert "the server does not use TLS" in message(address, ca=ca)
    with listening(servicer, grpc.ssl_server_credentials([certificate])) as tls:
        assert "the server may require TLS" in message(tls)
        assert "does not trust the authority" in message(tls, tls=True)
    with listening(servicer, grpc.ssl_server_credentials([elsewhere])) as tls:
        assert "not valid for this address" in message(tls, ca=other_authority.cert_pem.bytes())
    assert not servicer.requests


def test_token_is_sent_in_plaintext_to_loopback(servicer: Servicer, address: str, pixels: NDArray[np.uint8]) -> None:
    with camserve.Client(address, token="secret") as client:
        client.explain(pixels)
        assert servicer.metadata["authorization"] == "Bearer secret"
        _ = [*client.evaluate_many([pixels], methods="a")]
        assert servicer.metadata["authorization"] == "Bearer secret"


def test_loopback_connection_bypasses_the_proxy(
    servicer: Servicer, address: str, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with camserve.Client(address, token="secret", timeout=WAIT_S) as client:
        assert client.explain(pixels).maps


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("dns:///localhost:1", True),
        ("dns:127.9.9.9:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/camserve", True),
        ("10.0.0.1:1", False),
        ("explain:1", False),
        ("explain", False),
        ("localhost.example:1", False),
        ("dns:///explain.example:1", False),
        ("dns://127.0.0.1/explain.example:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("[2001:db8::1]:1", False),
        ("0.0.0.0:1", False),
    ],
)
def test_token_without_tls_requires_a_loopback_address(address: str, is_allowed: bool) -> None:
    if is_allowed:
        camserve.Client(address, token="secret").close()
        return
    with pytest.raises(camserve.InvalidArgument, match="requires TLS") as caught:
        camserve.Client(address, token="secret")
    assert caught.value.field == "token"
    assert "secret" not in str(caught.value)
    camserve.Client(address, token="secret", tls=True).close()


def test_invalid_certificates_keys_and_tokens_raise(certificate: tuple[bytes, bytes], tmp_path: Path) -> None:
    incomplete: list[dict[str, Any]] = [{"certificate": certificate[1]}, {"key": certificate[0]}]
    for wrong in incomplete:
        with pytest.raises(camserve.InvalidArgument, match="expected both certificate and key"):
            camserve.Client(**wrong)
    key, chain = certificate
    path = tmp_path / "other.pem"
    path.write_bytes(trustme.CA().issue_cert("localhost").private_key_pem.bytes())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ca": b"no certificate"}, "ca"),
        ({"ca": key}, "ca"),
        ({"certificate": key, "key": key}, "certificate"),
        ({"certificate": chain, "key": path}, "certificate"),
        ({"certificate": chain, "key": b"\xff"}, "certificate"),
    ]
    for wrong, field in cases:
        with pytest.raises(camserve.InvalidArgument) as caught:
            camserve.Client(**wrong)
        assert caught.value.field == field
    for token in ("", "two words", "line\n", "schlüssel"):
        with pytest.raises(camserve.InvalidArgument, match="visible ASCII") as caught:
            camserve.Client(token=token)
        assert not token or token not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        camserve.Client(ca=tmp_path / "none.pem")


# ---- trace context ---------------------------------------------------------------------------------------------------


def test_trace_context_of_the_caller_is_sent(
    servicer: Servicer, address: str, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    client.explain(pixels)
    assert "traceparent" not in servicer.metadata
    context = trace.SpanContext(
        0xAB, 0xCD, is_remote=False, trace_flags=trace.TraceFlags(1), trace_state=trace.TraceState([("vendor", "x")])
    )
    expected = {"traceparent": f"00-{0xAB:032x}-{0xCD:016x}-01", "tracestate": "vendor=x"}

    async def ask() -> None:
        async with camserve.aio.Client(address) as aio_client:
            await aio_client.explain(pixels)

    with trace.use_span(trace.NonRecordingSpan(context)):
        for call in (
            lambda: client.explain(pixels),
            lambda: [*client.explain_stream(pixels)],
            lambda: [*client.evaluate_many([pixels], methods="a")],
            lambda: asyncio.run(ask()),
        ):
            servicer.metadata = {}
            call()
            assert expected.items() <= servicer.metadata.items()


# ---- end of a connection ---------------------------------------------------------------------------------------------


def close_stream(client: camserve.Client) -> None:
    events = client.explain_stream(LARGE, model="slow")
    next(events)
    events.close()


def drop_stream(client: camserve.Client) -> None:
    next(client.explain_stream(LARGE, model="slow"))


def close_client_first(client: camserve.Client) -> None:
    events = client.explain_stream(LARGE, model="slow")
    next(events)
    client.close()
    events.close()


def run_out_of_time(client: camserve.Client) -> None:
    with pytest.raises(camserve.DeadlineExceeded):
        [*client.explain_stream(LARGE, model="slow", timeout=0.2)]


def leave_many(client: camserve.Client) -> None:
    next(client.explain_many([LARGE] * 3))


def close_stream_of_asyncio(client: camserve.Client) -> None:
    async def ask() -> None:
        async with (
            camserve.aio.Client(client.address) as other,
            contextlib.aclosing(other.explain_stream(LARGE, model="slow")) as events,
        ):
            await anext(events)

    asyncio.run(ask())


def drop_stream_of_asyncio(client: camserve.Client) -> None:
    async def ask() -> None:
        async with camserve.aio.Client(client.address) as other:
            await anext(other.explain_stream(LARGE, model="slow"))

    asyncio.run(ask())


@pytest.mark.slow
def test_closed_client_does_not_connect_again() -> None:
    """A connection that is left behind would also make later clients of the same server fail."""
    ways = (
        close_stream,
        drop_stream,
        close_client_first,
        run_out_of_time,
        leave_many,
        close_stream_of_asyncio,
        drop_stream_of_asyncio,
    )
    with contextlib.ExitStack() as ends:
        listeners = {}
        for leave in ways:
            # No other client has used this port, so that none of them connects again.
            with (
                listening(Servicer(), port=free_port()) as address,
                camserve.Client(address, timeout=WAIT_S) as client,
            ):
                leave(client)
            listener = ends.enter_context(socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))))
            listeners[leave.__name__] = listener
        time.sleep(3)  # gRPC connects again after at most 1.2 s.
        connected, _, _ = select.select([*listeners.values()], [], [], 0)
        assert [name for name, listener in listeners.items() if listener in connected] == []


def test_malformed_response_ends_the_call_at_once() -> None:
    """The server goes on with its call, of which the client reads nothing more."""
    ended = threading.Event()

    def malformed(request: bytes, context: Any) -> Any:
        context.add_callback(ended.set)
        yield b"\xff"
        ended.wait(WAIT_S)

    handler: Any = grpc.unary_stream_rpc_method_handler(malformed)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_registered_method_handlers(connection.SERVICE, {"ExplainStream": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with camserve.Client(f"127.0.0.1:{port}", timeout=None, health_checks=False) as client:
        with pytest.raises(camserve.CamserveError, match="deserializing"):
            [*client.explain_stream(LARGE)]
        assert not ended.is_set()
    server.stop(None).wait()
