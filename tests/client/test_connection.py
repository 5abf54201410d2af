"""The connection: what is tried again, which server is asked, how it is secured, and what goes along."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1.health_pb2 import HealthCheckResponse

import camserve
from camserve import connection
from camserve_server.errors import QueueFull, TooLarge, Unavailable
from camserve_server.service import status
from tests.client.fake_server import Health, Servicer, listening

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING

# More than gRPC keeps by itself for another try.
LARGE = np.zeros((700, 700, 3), np.uint8)


# ---- trying again ----------------------------------------------------------------------------------------------------


def refuse(servicer: Servicer, error: Any, times: int) -> None:
    """The first requests are refused as our server refuses them."""
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
def test_a_busy_server_is_asked_four_times_in_all(servicer, address, client, error):
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


def test_it_is_asked_when_it_says(servicer, client, pixels):
    refuse(servicer, QueueFull("too many rows are owed", retry_after_s=0.7), 1)
    start = time.monotonic()
    client.explain(pixels)
    assert time.monotonic() - start >= 0.7
    assert len(servicer.requests) == 2


def test_where_it_says_nothing_the_wait_is_our_own(servicer, client, pixels):
    left = iter(range(1))
    servicer.before = lambda context: (
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone") if next(left, None) is not None else None
    )
    start = time.monotonic()
    client.explain(pixels)
    assert time.monotonic() - start >= 0.05
    assert len(servicer.requests) == 2


def test_what_is_of_no_use_is_not_tried_again(servicer, client, pixels):
    refuse(servicer, TooLarge("the image has too many pixels"), 9)
    with pytest.raises(camserve.ResourceExhausted) as caught:
        client.explain(pixels)
    assert caught.value.retry_after_s is None
    assert len(servicer.requests) == 1
    servicer.before = lambda context: context.abort(grpc.StatusCode.INTERNAL, "a bug")
    with pytest.raises(camserve.InternalError):
        client.explain(pixels)
    assert len(servicer.requests) == 2


def test_no_try_outlives_the_timeout(servicer, client, pixels):
    refuse(servicer, QueueFull("too many rows are owed", retry_after_s=60), 9)
    start = time.monotonic()
    with pytest.raises(camserve.DeadlineExceeded):
        client.explain(pixels, timeout=0.3)
    assert time.monotonic() - start < 20
    assert len(servicer.requests) == 1


def test_each_of_many_waits_outside_of_its_timeout(servicer, address, client, pixels):
    """And is not tried again in two ways at once: each refusal is one request."""
    full = QueueFull("too many rows are owed", retry_after_s=0.4)
    refuse(servicer, full, 3)
    [result] = client.evaluate_many([pixels], methods="a", timeout=1)
    assert (result.error, len(servicer.requests)) == (None, 4)

    async def ask() -> list[camserve.Result]:
        async with camserve.aio.Client(address) as client:
            return [result async for result in client.evaluate_many([pixels], methods="a", timeout=1)]

    refuse(servicer, full, 3)
    assert [result.error for result in asyncio.run(ask())] == [None]
    assert len(servicer.requests) == 4
    refuse(servicer, LOADING, 3)
    [result] = client.evaluate_many([pixels], methods="a")
    assert (result.error, len(servicer.requests)) == (None, 4)


# ---- several servers -------------------------------------------------------------------------------------------------


def until(holds: Any) -> None:
    """Waits, for a health that changes is told by a message."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_calls_go_in_turn_to_the_servers_that_are_ready():
    servicers, healths = [Servicer(), Servicer()], [Health(), Health()]
    with contextlib.ExitStack() as stack:
        addresses = [
            stack.enter_context(listening(servicer, health=health))
            for servicer, health in zip(servicers, healths, strict=True)
        ]
        client = stack.enter_context(camserve.Client("ipv4:" + ",".join(addresses)))

        def asked() -> list[int]:
            for servicer in servicers:
                servicer.requests.clear()
            for _ in range(10):
                client.models()
            return [len(servicer.requests) for servicer in servicers]

        until(lambda: asked() == [5, 5])
        healths[0].state = NOT_SERVING
        until(lambda: asked() == [0, 10])

        async def ask() -> None:
            async with camserve.aio.Client(client.address) as awaited:
                for _ in range(10):
                    await awaited.models()

        servicers[1].requests.clear()
        asyncio.run(ask())
        assert len(servicers[1].requests) == 10
        healths[1].state = NOT_SERVING
        time.sleep(0.3)
        with pytest.raises(camserve.Unavailable, match="loading its models or shutting down"):
            client.models(timeout=10)
        healths[0].state = SERVING
        until(lambda: [*map(bool, asked())] == [True, False])


def test_a_name_is_resolved():
    with listening(Servicer()) as address:
        port = address.rpartition(":")[2]
        for name in (f"dns:///localhost:{port}", f"localhost:{port}"):
            with camserve.Client(name) as client:
                assert client.models()


@contextlib.contextmanager
def forwarding(address: str, silent: threading.Event) -> Iterator[str]:
    """The address of a wire to the other one; once it is `silent` it carries nothing, and nobody can connect."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    if not silent.is_set():
                        sink.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while not silent.is_set():
                    near, _ = listener.accept()
                    far = socket.create_connection(address.split(":"))
                    for each in (near, far):
                        stack.callback(each.close)
                        stack.callback(each.shutdown, socket.SHUT_RDWR)
                    for pair in ((near, far), (far, near)):
                        threading.Thread(target=carry, args=pair, daemon=True).start()

        accepting = threading.Thread(target=accept)
        accepting.start()

        def end() -> None:
            silent.wait()
            listener.shutdown(socket.SHUT_RDWR)

        ending = threading.Thread(target=end)
        ending.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        silent.set()
        for thread in (accepting, ending):
            thread.join(10)


def test_a_connection_that_is_gone_is_noticed_long_before_the_timeout(servicer, address, monkeypatch):
    monkeypatch.setattr(connection, "KEEPALIVE_MS", 200)
    monkeypatch.setattr(connection, "KEEPALIVE_TIMEOUT_MS", 300)
    silent = threading.Event()
    with forwarding(address, silent) as wire, camserve.Client(wire, timeout=None) as client:

        def cut() -> None:
            servicer.started.wait(10)
            silent.set()

        threading.Thread(target=cut).start()
        with pytest.raises(camserve.Unavailable):
            client.explain(LARGE, model="slow")


def test_our_server_allows_as_many_pings():
    from camserve_server.service import server

    options = dict(server.KEEPALIVE)
    assert options["grpc.http2.min_recv_ping_interval_without_data_ms"] < connection.KEEPALIVE_MS
    assert options["grpc.keepalive_permit_without_calls"] == 1


# ---- TLS and tokens --------------------------------------------------------------------------------------------------


def test_tls_with_a_token(servicer, authority, certificate, tmp_path, pixels):
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    with listening(servicer, grpc.ssl_server_credentials([certificate])) as address:
        for given in (ca, str(ca), ca.read_bytes()):
            with camserve.Client(address, ca=given, token="secret") as client:
                client.explain(pixels)
                assert servicer.metadata["authorization"] == "Bearer secret"
                assert "secret" not in repr(client)

        async def ask() -> None:
            async with camserve.aio.Client(address, ca=ca, token="other") as client:
                await client.explain(pixels)
                assert [type(event) async for event in client.explain_stream(pixels)][-1] is camserve.Explanation

        asyncio.run(ask())
        assert servicer.metadata["authorization"] == "Bearer other"


def test_mutual_tls(servicer, authority, certificate, pixels):
    key, chain = certificate
    ca = authority.cert_pem.bytes()
    asked = grpc.ssl_server_credentials([certificate], ca, require_client_auth=True)
    with listening(servicer, asked) as address:
        with camserve.Client(address, ca=ca, certificate=chain, key=key) as client:
            assert client.explain(pixels).cost.rows == 12
        with (
            camserve.Client(address, ca=ca) as client,
            pytest.raises(camserve.Unavailable, match="or a client certificate"),
        ):
            client.explain(pixels)


def test_a_handshake_that_fails_says_what_to_do(servicer, authority, certificate, address):
    ca = authority.cert_pem.bytes()
    other_name = trustme.CA()
    named = other_name.issue_cert("elsewhere.example")
    elsewhere = named.private_key_pem.bytes(), b"".join(each.bytes() for each in named.cert_chain_pems)

    def said(address: str, **given: Any) -> str:
        with camserve.Client(address, **given) as client, pytest.raises(camserve.Unavailable) as caught:
            client.models()
        return caught.value.message

    assert "the server does not use TLS" in said(address, ca=ca)
    with listening(servicer, grpc.ssl_server_credentials([certificate])) as tls:
        assert "the server may require TLS" in said(tls)
        assert "does not trust the authority" in said(tls, tls=True)
    with listening(servicer, grpc.ssl_server_credentials([elsewhere])) as tls:
        assert "not valid for this address" in said(tls, ca=other_name.cert_pem.bytes())
    assert not servicer.requests


def test_a_token_goes_to_this_machine_in_plaintext(servicer, address, pixels):
    with camserve.Client(address, token="secret") as client:
        client.explain(pixels)
        assert servicer.metadata["authorization"] == "Bearer secret"
        _ = [*client.evaluate_many([pixels], methods="a")]
        assert servicer.metadata["authorization"] == "Bearer secret"


def test_what_goes_to_this_machine_takes_no_detour(servicer, address, pixels, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with camserve.Client(address, token="secret", timeout=20) as client:
        assert client.explain(pixels).maps


@pytest.mark.parametrize(
    ("address", "may"),
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
def test_a_token_goes_nowhere_else_in_plaintext(address, may):
    if may:
        camserve.Client(address, token="secret").close()
        return
    with pytest.raises(camserve.InvalidArgument, match="requires TLS") as caught:
        camserve.Client(address, token="secret")
    assert caught.value.field == "token"
    assert "secret" not in str(caught.value)
    camserve.Client(address, token="secret", tls=True).close()


def test_what_does_not_go_together_is_refused(certificate, tmp_path):
    for wrong in ({"certificate": certificate[1]}, {"key": certificate[0]}):
        with pytest.raises(camserve.InvalidArgument, match="expected both certificate and key"):
            camserve.Client(**wrong)
    key, chain = certificate
    path = tmp_path / "other.pem"
    path.write_bytes(trustme.CA().issue_cert("localhost").private_key_pem.bytes())
    for wrong, field in [
        ({"ca": b"no certificate"}, "ca"),
        ({"ca": key}, "ca"),
        ({"certificate": key, "key": key}, "certificate"),
        ({"certificate": chain, "key": path}, "certificate"),
        ({"certificate": chain, "key": b"\xff"}, "certificate"),
    ]:
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


def test_the_callers_span_goes_along(servicer, address, client, pixels):
    trace = pytest.importorskip("opentelemetry.trace")
    client.explain(pixels)
    assert "traceparent" not in servicer.metadata
    context = trace.SpanContext(
        0xAB, 0xCD, is_remote=False, trace_flags=trace.TraceFlags(1), trace_state=trace.TraceState([("vendor", "x")])
    )
    expected = {"traceparent": f"00-{0xAB:032x}-{0xCD:016x}-01", "tracestate": "vendor=x"}

    async def ask() -> None:
        async with camserve.aio.Client(address) as awaited:
            await awaited.explain(pixels)

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
