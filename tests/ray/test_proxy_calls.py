"""Calls through the handlers of a proxy to the server of a replica, without Ray: metadata, and replicas that end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from camserve.v1 import explain_pb2 as pb
from camserve_ray.serving import proxy
from camserve_ray.serving.replica import _ProxiesOnly, _refuse
from camserve_ray.serving.services import CHECK, EXPLAIN, HOLD, RPCS, SECRET, WATCH, Rpc
from camserve_server.errors import Unavailable
from camserve_server.service import status
from camserve_server.service.bounds import MAX_OTHER_BYTES
from tests.ray.test_application import ReplicaHealth, running
from tests.server.service.test_errors import details
from tests.support import TIMEOUT_S

UNARY, STREAM = Rpc(f"/{EXPLAIN}/Explain", streaming=False), Rpc(f"/{EXPLAIN}/ExplainStream", streaming=True)
REQUESTS = {
    UNARY: pb.ExplainRequest(request_id="r-1").SerializeToString(),
    STREAM: pb.ExplainStreamRequest(request=pb.ExplainRequest(request_id="r-1")).SerializeToString(),
}
Context = grpc.aio.ServicerContext[bytes, bytes]


def explaining(behaviour: Callable[[Context], Any]) -> grpc.GenericRpcHandler:
    """Return handlers of both RPCs that await a function."""

    async def unary(request: bytes, context: Context) -> bytes:
        await behaviour(context)
        return b""

    async def stream(request: bytes, context: Context) -> AsyncIterator[bytes]:
        yield b""
        await behaviour(context)

    handlers: Any = {
        UNARY.name: grpc.unary_unary_rpc_method_handler(unary),
        STREAM.name: grpc.unary_stream_rpc_method_handler(stream),
    }
    return grpc.method_handlers_generic_handler(EXPLAIN, handlers)


@asynccontextmanager
async def proxied() -> AsyncIterator[grpc.aio.Channel]:
    """Run a gRPC server with the handlers of a proxy, and yield a channel to it."""

    async def hold(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0.01)
        return b""

    found, server = proxy._Services(), grpc.aio.server()
    found._method_handlers[HOLD.path] = grpc.unary_unary_rpc_method_handler(hold)
    server.add_generic_rpc_handlers((found,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def call(channel: grpc.aio.Channel, rpc: Rpc, request: bytes, metadata: Any = ()) -> list[bytes]:
    """Return the responses to a request."""
    send: Any = channel.unary_stream(rpc.path) if rpc.streaming else channel.unary_unary(rpc.path)
    sent = send(request, metadata=metadata)
    return [each async for each in sent] if rpc.streaming else [await sent]


async def refused(channel: grpc.aio.Channel, rpc: Rpc, request: bytes) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, rpc, request)
    return caught.value


def check_lost(error: grpc.aio.AioRpcError) -> None:
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    found: Any = details(error)
    assert found["ErrorInfo"].reason == "REPLICA_LOST"
    assert found["RequestInfo"].request_id == "r-1"
    assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0


@pytest.mark.parametrize("rpc", [UNARY, STREAM], ids=lambda rpc: rpc.name)
def test_call_of_a_replica_that_ends_is_lost(rpc: Rpc) -> None:
    async def run() -> None:
        arrived = asyncio.Event()

        async def wait(context: Context) -> None:
            arrived.set()
            await asyncio.Event().wait()

        async with proxied() as channel:
            async with running(ReplicaHealth(), explaining(wait)):
                ending = asyncio.create_task(refused(channel, rpc, REQUESTS[rpc]))
                await arrived.wait()
            check_lost(await ending)

    asyncio.run(run())


@pytest.mark.parametrize("rpc", [UNARY, STREAM], ids=lambda rpc: rpc.name)
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_error_of_the_server_passes_unchanged(rpc: Rpc, code: grpc.StatusCode) -> None:
    own = status.trailing_metadata(Unavailable("the server is draining", reason="DRAINING", retry_after_s=2), "r-1")

    async def fail(context: Context) -> None:
        await context.abort(code, "the server is draining", own)

    async def run() -> None:
        async with proxied() as channel, running(ReplicaHealth(), explaining(fail)):
            error = await refused(channel, rpc, REQUESTS[rpc])
        assert (error.code(), error.details()) == (code, "the server is draining")
        assert sorted(error.trailing_metadata()) == sorted(own)

    asyncio.run(run())


def test_new_replica_with_the_port_of_another_is_no_refusal() -> None:
    """The caller has no influence on the secret, so PERMISSION_DENIED would mislead it."""

    async def nothing(context: Context) -> None:
        raise AssertionError("the secret is wrong")

    async def run() -> None:
        async with proxied() as channel, running(ReplicaHealth(), explaining(nothing), secret="of the other"):
            for rpc, request in REQUESTS.items():
                check_lost(await refused(channel, rpc, request))

    asyncio.run(run())


@pytest.mark.parametrize("rpc", [UNARY, STREAM], ids=lambda rpc: rpc.name)
def test_replica_gets_the_metadata_that_it_uses(rpc: Rpc) -> None:
    kept = [("authorization", "Bearer a"), ("authorization", "Bearer b"), ("traceparent", "t"), ("tracestate", "s")]
    found: list[tuple[str, Any]] = []

    async def read(context: Context) -> None:
        found.extend(tuple(each) for each in context.invocation_metadata() or ())  # type: ignore[misc]

    async def run() -> None:
        async with proxied() as channel, running(ReplicaHealth(), explaining(read)):
            await call(channel, rpc, REQUESTS[rpc], ((SECRET, "of the caller"), ("application", "other"), *kept))

    asyncio.run(run())
    assert sorted(each for each in found if each[0] != "user-agent") == sorted([(SECRET, "secret"), *kept])


@pytest.mark.parametrize("error", [RuntimeError("Serve failed"), asyncio.CancelledError()], ids=repr)
def test_hold_is_called_again_if_serve_fails_while_a_call_runs(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "_HOLD_RETRY_S", 0.01)

    async def run() -> None:
        services, holds, held_again = proxy._Services(), 0, asyncio.Event()

        async def hold(request: bytes, context: Any) -> bytes:
            nonlocal holds
            holds += 1
            if holds == 1:
                raise error
            held_again.set()
            await asyncio.Event().wait()
            return b""

        services._method_handlers[HOLD.path] = grpc.unary_unary_rpc_method_handler(hold)
        with services._counted():  # a single call, so no other one starts the task again
            async with asyncio.timeout(TIMEOUT_S):
                await held_again.wait()
        holding: Any = services._holding
        holding.cancel()
        await asyncio.wait([holding])
        assert holding.cancelled(), "a cancelled task ends"

    asyncio.run(run())


def test_wrong_secret_may_contain_any_characters() -> None:
    """`hmac.compare_digest` refuses text with other characters than those of ASCII."""

    async def serve(call: Any) -> None:
        raise AssertionError("the secret is wrong")

    call: Any = SimpleNamespace(invocation_metadata=((SECRET, "sécret"),))
    assert asyncio.run(_ProxiesOnly("secret").intercept_service(serve, call)).unary_unary is _refuse


@pytest.mark.parametrize("rpc", [CHECK, WATCH], ids=lambda rpc: rpc.name)
@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"\xff" * 99, grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x00" * MAX_OTHER_BYTES, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["malformed", "large"],
)
def test_health_refuses_requests_that_it_would_not_parse(rpc: Rpc, request_bytes: bytes, code: grpc.StatusCode) -> None:
    async def run() -> None:
        async with proxied() as channel:
            assert (await refused(channel, rpc, request_bytes)).code() is code

    asyncio.run(run())


def test_identifier_of_a_message_with_many_fields_is_not_read() -> None:
    """The proxy would parse it for seconds."""
    many = pb.ExplainRequest(request_id="r-1", targets=[pb.Target()] * MAX_OTHER_BYTES).SerializeToString()
    assert proxy._request_id(UNARY, many) != "r-1"
    assert proxy._request_id(UNARY, REQUESTS[UNARY]) == "r-1"
    assert proxy._request_id(next(rpc for rpc in RPCS if rpc.name == "ListModels"), b"") != ""
