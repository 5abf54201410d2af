"""Parts of the application without a cluster: options, the configuration, the policy, and callers on other machines."""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from typer.testing import CliRunner

from camserve_cli.app import app
from camserve_ray.serving import command, proxy
from camserve_ray.serving.application import Scale, application, checked
from camserve_ray.serving.autoscaling import ROWS_OWED, RowsOwed
from camserve_ray.serving.command import summary
from camserve_ray.serving.connections import Connections
from camserve_ray.serving.endpoints import Endpoint, learn
from camserve_ray.serving.replica import _ProxiesOnly
from camserve_ray.serving.services import CHECK, EXPLAIN, HEALTH, HOLD, INFERENCE, RPCS, SECRET, Rpc
from camserve_server import open_inference
from camserve_server.config import Config, TLSConfig, read_config
from camserve_server.errors import ConfigError, PermissionDenied
from camserve_server.open_inference import inference_pb2
from tests.processes import LIMIT_S, TINY, environment, free_port

SERVING, UNKNOWN = HealthCheckResponse.SERVING, HealthCheckResponse.SERVICE_UNKNOWN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--autoscale", "2"], "expected MIN:MAX, such as 1:8"),
        (["--autoscale", "3:2"], "not above MAX"),
        (["--autoscale", "0:2"], "MIN of at least 1"),
        (["--autoscale", "1:2", "--replicas", "2"], "give either --replicas or --autoscale"),
        (["--rows-per-replica", "9"], "give it together with --autoscale"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str) -> None:
    ran = CliRunner().invoke(app, ["ray", "serve", *options], env={"COLUMNS": "200"})
    assert ran.exit_code == 2
    assert message in ran.stderr


def test_port_of_another_server_is_refused() -> None:
    """Ray's proxies would share the port, as those of the other server permit it, and each would get some calls."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ran = CliRunner().invoke(app, ["ray", "serve", "--listen", f"127.0.0.1:{port}"])
    assert ran.exit_code == 2
    assert f"listen: cannot bind 0.0.0.0:{port}; check that" in ran.stderr


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(signal.SIGTERM)], ids=repr)
def test_signal_while_the_command_connects_ends_it(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(address: str | None) -> None:
        raise raised

    monkeypatch.setattr(command, "connect", interrupted)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # so that the test does not leave it
    assert command.serve(Scale(), listen=f"127.0.0.1:{free_port()}") == 0


def test_settings_that_serve_cannot_have_are_refused_or_named() -> None:
    tls = TLSConfig(certificate="server.pem", key="server.key")
    with pytest.raises(ConfigError) as caught:
        checked(Config(listen="127.0.0.1:0", tls=tls))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["tls", "listen"]
    with pytest.raises(ConfigError, match="expected HOST:PORT with a fixed port"):
        checked(Config(listen="unix:///run/camserve.sock"))
    warnings = checked(Config(metrics_listen="127.0.0.1:9464", frontends=2))
    assert [line.partition(":")[0] for line in warnings] == ["metrics_listen", "frontends"]
    assert checked(Config()) == []


@pytest.mark.parametrize(
    ("owed", "replicas"), [({}, 3), ({"a": 0}, 1), ({"a": 1_000}, 1), ({"a": 1_001}, 2), ({"a": 900, "b": 1_200}, 3)]
)
def test_number_of_replicas_follows_the_rows_that_all_owe(owed: dict[str, float], replicas: int) -> None:
    context: Any = SimpleNamespace(aggregated_metrics={ROWS_OWED: owed} if owed else None, target_num_replicas=3)
    assert RowsOwed(1_000)(context) == (replicas, {})


def test_message_of_serve_is_shown_without_the_traceback() -> None:
    message = (
        "The deployment failed to start 3 times in a row. Error:\n"
        "\x1b[36mray::ServeReplica\nRuntimeError: Traceback (most recent call last):\n  File ...\n"
        "camserve_server.errors.ConfigError: models.tiny.weights: there is no file x.pt\n"
    )
    assert summary(message) == (
        "The deployment failed to start 3 times in a row. Error: "
        "camserve_server.errors.ConfigError: models.tiny.weights: there is no file x.pt"
    )
    assert summary("2 replicas wait.\nThey need 1 GPU each.") == "2 replicas wait. They need 1 GPU each."
    assert summary("") == ""


def test_configuration_of_replicas_has_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas have another working directory, and the class of the driver's object does not exist there."""
    monkeypatch.chdir(tmp_path)
    Path("camserve.toml").write_text(f'{TINY}weights = "net.pt"\n')
    bound: Any = application(read_config(Path("camserve.toml")), Scale())
    config = pickle.loads(pickle.dumps(bound._bound_deployment.init_args[0]))
    assert config.models[0].resolve("net.pt") == tmp_path / "net.pt"


class ServeWithCalls:
    """Ray Serve with an application whose calls end after some looks at the state."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.done: list[str] = []

    def delete(self, name: str, _blocking: bool = True) -> None:
        assert not _blocking, "Serve raises TimeoutError after a minute"
        self.done.append(name)

    def status(self) -> Any:
        self.looks -= 1
        if self.looks == 0:
            self.done.append("end of calls")
        return SimpleNamespace(applications={"camserve": None} if self.looks > 0 else {})

    def shutdown(self) -> None:
        self.done.append("shutdown")


def ended(serve: ServeWithCalls, monkeypatch: pytest.MonkeyPatch, *, deployed: bool) -> list[str]:
    """Return what the end of a deployment does."""
    monkeypatch.setattr(command, "ray_serve", serve)
    monkeypatch.setattr(command, "ray", SimpleNamespace(shutdown=lambda: serve.done.append("disconnect")))
    monkeypatch.setattr(command, "_POLL_S", 0)
    deployment = command._Deployment(Config(), Scale())
    deployment._started, deployment._deployed = True, deployed
    deployment.end()
    return serve.done


def test_end_waits_for_running_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    done = ended(ServeWithCalls(5), monkeypatch, deployed=True)
    assert done == ["camserve", "end of calls", "shutdown", "disconnect"]


def test_end_after_the_grace_period_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_END_S", -Config().grace_s)
    assert ended(ServeWithCalls(1_000_000), monkeypatch, deployed=True) == ["camserve", "disconnect"]
    assert "still ends" in capsys.readouterr().err


def test_end_keeps_the_application_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(ServeWithCalls(1_000_000), monkeypatch, deployed=False) == ["disconnect"]


FAILING_REPLICA = """
import asyncio
from camserve_ray.serving.replica import Replica
from camserve_server.config import Config

async def main():
    replica = Replica.__new__(Replica)
    await replica.__init__(Config(device="cpu"))
    print("started", flush=True)
    replica._server.engines.failed.set_exception(RuntimeError("a defect"))
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_replica_ends_if_its_engine_fails() -> None:
    """Serve would send calls to it until several health checks have failed."""
    command = [sys.executable, "-c", FAILING_REPLICA]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment(), check=False)
    assert ran.stdout == "started\n", ran.stderr
    assert ran.returncode == 1
    assert "the engine's thread failed; the replica ends" in ran.stderr


# ---- proxies ---------------------------------------------------------------------------------------------------------


class ReplicaHealth:
    """The server of a replica. Its Health answers when `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked: list[bytes] = []
        self.codes: list[grpc.StatusCode] = []

    async def check(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.asked.append(request)
        await self.go.wait()
        if self.codes:
            await context.abort(self.codes.pop())
        return bytes(HealthCheckResponse(status=SERVING).SerializeToString())


@asynccontextmanager
async def running(health: ReplicaHealth, *others: grpc.GenericRpcHandler, secret: str = "secret") -> AsyncIterator[str]:
    """Run the server of a replica, tell the proxies of this process its endpoint, and yield its address."""
    server = grpc.aio.server(interceptors=[_ProxiesOnly("secret")])
    handler: Any = grpc.unary_unary_rpc_method_handler(health.check)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH, {CHECK.name: handler}), *others))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    learn(health, [Endpoint(address, secret, local_callers_only=True)])
    try:
        yield address
    finally:
        learn(health, [])
        await server.stop(None)


async def watched(found: Any, request: bytes = b"") -> int:
    """Return the first state that Watch reports."""
    context: Any = None
    watch = found._watch(request, context)
    try:
        return int(HealthCheckResponse.FromString(await anext(watch)).status)
    finally:
        await watch.aclose()


def test_cancelled_watcher_does_not_decide_for_others() -> None:
    async def run() -> None:
        replica, found = ReplicaHealth(), proxy._Services()
        async with running(replica):
            first, second = (asyncio.create_task(watched(found)) for _ in range(2))
            while not replica.asked:
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait([first])
            replica.go.set()
            assert await second == SERVING
            assert first.cancelled()
            assert replica.asked == [b""], "both share one question"
            # Unknown fields make a different message for the same service.
            assert await watched(found, b"\x78\x01") == SERVING
            assert len(replica.asked) == 1
            assert await watched(found, HealthCheckRequest(service="other").SerializeToString()) == UNKNOWN
            assert [*found._states] == [""]

    asyncio.run(run())


def test_health_asks_again_if_a_replica_does_not_answer() -> None:
    async def run() -> None:
        replica = ReplicaHealth()
        replica.go.set()
        replica.codes = [grpc.StatusCode.UNAVAILABLE]
        async with running(replica):
            assert await watched(proxy._Services()) == SERVING
        assert len(replica.asked) == 2

    asyncio.run(run())


def test_health_asks_another_replica_if_one_does_not_respond(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to a node that has lost its power stays open for some time."""
    monkeypatch.setattr(proxy, "_CHECK_S", LIMIT_S)
    monkeypatch.setattr(proxy, "_NEXT_S", 0.1)

    async def run() -> None:
        hung, other = ReplicaHealth(), ReplicaHealth()
        other.go.set()
        async with running(hung):
            watching = asyncio.create_task(watched(proxy._Services()))
            while not hung.asked:
                await asyncio.sleep(0)
            async with running(other):
                assert await watching == SERVING
            hung.go.set()

    asyncio.run(run())


def test_health_without_a_replica_is_not_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_CHECK_S", 0.2)
    assert asyncio.run(watched(proxy._Services())) == HealthCheckResponse.NOT_SERVING


def test_port_of_a_replica_is_for_proxies_only() -> None:
    async def run() -> None:
        replica = ReplicaHealth()
        replica.go.set()
        async with running(replica) as address, grpc.aio.insecure_channel(address) as channel:
            check: Any = channel.unary_unary(CHECK.path)
            for metadata in ((), ((SECRET, "wrong"),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await check(b"", metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            await check(b"", metadata=((SECRET, "secret"),))
        assert len(replica.asked) == 1

    asyncio.run(run())


def test_connections_follow_the_replicas_and_close_after_their_calls() -> None:
    async def run() -> None:
        replica, connections = ReplicaHealth(), Connections()
        replica.go.set()
        async with running(replica):
            first = await connections.pick()
            first.running += 1
        other = ReplicaHealth()
        async with running(other):
            second = await connections.pick()
            assert second is not first
            assert set(connections._all.values()) == {first, second}, "a call runs on the first one"
            first.running -= 1
            assert await connections.pick() is second
            assert [*connections._all.values()] == [second]

    asyncio.run(run())


def test_failure_of_hold_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_HOLD_RETRY_S", 0)

    async def run() -> None:
        found, held = proxy._Services(), asyncio.Event()

        async def hold(request: bytes, context: Any) -> bytes:
            await asyncio.sleep(0)
            if failures:
                raise failures.pop()
            held.set()
            return b""

        failures = [RuntimeError("the router of Serve has ended"), RuntimeError("the router of Serve has ended")]
        found._method_handlers[HOLD.path] = grpc.unary_unary_rpc_method_handler(hold)
        with found._counted():
            await held.wait()

    asyncio.run(run())


def test_serve_counts_a_call_while_the_proxy_passes_on_calls() -> None:
    """It would end the proxy of a node without replicas otherwise."""

    async def run() -> None:
        found, ended = proxy._Services(), list[bool]()

        async def hold(request: bytes, context: Any) -> bytes:
            assert context.invocation_metadata() == (("application", "camserve"),)
            await asyncio.sleep(0)
            ended.append(True)
            return b""

        found._method_handlers[HOLD.path] = grpc.unary_unary_rpc_method_handler(hold)
        with found._counted(), found._counted():
            while len(ended) < 3:
                await asyncio.sleep(0)
        holding = found._holding
        assert holding is not None
        await holding
        with found._counted():
            assert found._holding is not holding

    asyncio.run(run())


@pytest.mark.parametrize("peer", ["ipv4:192.0.2.7:4711", "ipv6:%5B2001:db8::7%5D:4711"])
def test_callers_on_other_machines_are_refused_if_listen_is_a_loopback_address(peer: str) -> None:
    """Serve's proxies listen on all addresses."""
    with pytest.raises(PermissionDenied, match="listen of the server is a loopback address"):
        check_peer(peer, local_callers_only=True)
    check_peer(peer, local_callers_only=False)


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711", "unix:"])
def test_callers_on_the_machine_of_the_proxy_are_accepted(peer: str) -> None:
    check_peer(peer, local_callers_only=True)


def check_peer(peer: str, *, local_callers_only: bool) -> None:
    connection: Any = SimpleNamespace(endpoint=Endpoint("127.0.0.1:1", "secret", local_callers_only))
    context: Any = SimpleNamespace(peer=lambda: peer)
    proxy._check_peer(connection, context)


def test_all_rpcs_of_the_open_inference_protocol_are_passed_on() -> None:
    """The proxies name them without importing the stubs."""
    assert INFERENCE == open_inference.SERVICE
    service = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    expected = {Rpc(f"/{INFERENCE}/{rpc.name}", rpc.server_streaming) for rpc in service.methods}
    assert {rpc for rpc in RPCS if INFERENCE in rpc.path} == expected
    assert sum(rpc.path.startswith(f"/{EXPLAIN}/") for rpc in RPCS) == 7
