"""The processes of a server with front ends: how they start, end, and are restarted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

import camserve
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.service.listeners import SERVICE
from tests.credentials import certify, hashed
from tests.gated import GATE
from tests.processes import (
    CAMSERVE,
    LIMIT_S,
    ROOT,
    TINY,
    Served,
    children,
    completed,
    environment,
    free_port,
    patient_client,
    served,
    started,
)

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
CONFIG = 'listen = "127.0.0.1:0"\ndevice = "cpu"\nthreads = 1\n'
pytestmark = pytest.mark.slow  # each test starts several processes


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a server with two front ends; the link is in the folder `run` beside it."""
    path = tmp_path / "camserve.toml"
    path.write_text(f"frontends = 2\n{CONFIG}{TINY.replace('nets:tiny_cnn', 'gated:Gated')}")
    (tmp_path / "run").mkdir()
    return path


@pytest.fixture
def gate(config: Path) -> Path:
    """The file that holds the batches of the server while it exists."""
    return config.parent / "gate"


@contextmanager
def serving(config: Path) -> Iterator[Served]:
    with served(config, TMPDIR=str(config.parent / "run"), **{GATE: str(config.parent / "gate")}) as server:
        yield server


def wait_until(condition: Callable[[], bool], message: str) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until, message
        time.sleep(0.02)


def front_ends(server: Served) -> set[int]:
    """Return the identifiers of the front ends that run."""
    return children(server.process.pid)


def exists(pid: int) -> bool:
    """Return True if a process runs. One that nobody waits for does not count."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def connections(pid: int, address: str) -> int:
    """Return the number of connections of callers that a front end serves."""
    port, established, inodes = f":{int(address.rpartition(':')[2]):04X}", "01", set()
    for table in ("tcp", "tcp6"):  # gRPC listens on IPv6 sockets that also accept IPv4
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if local.endswith(port) and state == established:
                inodes.add(rest[5])
    count = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found = re.fullmatch(r"socket:\[(\d+)\]", str(file.readlink()))
            count += found is not None and found[1] in inodes
    return count


def accepts_connections(address: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=LIMIT_S).close()
    except ConnectionRefusedError:
        return False
    return True


def request(method: str = "grad-cam", **parameters: float) -> pb.ExplainRequest:
    spec = pb.MethodSpec(name=method)
    spec.parameters.update(parameters)
    pixels = pb.Pixels(height=40, width=30, data=IMAGE.tobytes())
    return pb.ExplainRequest(image=pb.Image(pixels=pixels), method=spec)


def stream(stub: ExplainServiceStub) -> Any:
    """Start a request and return its stream when the server has admitted it."""
    running = stub.ExplainStream(pb.ExplainStreamRequest(request=request("opti-cam", steps=20)), timeout=LIMIT_S)
    running.initial_metadata()
    return running


def test_dead_front_end_fails_its_own_calls_and_is_replaced(config: Path, gate: Path) -> None:
    metrics = f"127.0.0.1:{free_port()}"
    config.write_text(f'metrics_listen = "{metrics}"\n{config.read_text()}')

    def counts() -> tuple[int, int]:
        """Return the numbers of running front ends and of restarts that Prometheus reads."""
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=LIMIT_S) as answer:
            found = dict(re.findall(r"^(camserve_frontend\w+) (\d+)", answer.read().decode(), re.MULTILINE))
        return int(found["camserve_frontends"]), int(found["camserve_frontend_restarts_total"])

    with serving(config) as server, ExitStack() as stack:
        assert counts() == (2, 0)
        before = front_ends(server)
        assert len(before) == 2
        stubs: list[ExplainServiceStub] = []
        while min(connections(pid, server.address) for pid in before) < 1:
            assert len(stubs) < 64, "the kernel does not distribute connections"
            channel = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
            stack.callback(channel.close)
            stubs.append(ExplainServiceStub(channel))
            assert stubs[-1].Explain(request(), timeout=LIMIT_S).maps
        gate.touch()
        streams = [stream(stub) for stub in stubs]
        victim = min(before)
        lost = connections(victim, server.address)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: counts() == (2, 1), "the front end is not replaced")
        gate.unlink()
        outcomes = []
        for each in streams:
            try:
                *_, last = each
                outcomes.append(last.WhichOneof("event"))
            except grpc.RpcError as error:
                outcomes.append(error.code().name)
        assert sorted(outcomes) == ["UNAVAILABLE"] * lost + ["result"] * (len(stubs) - lost)
        for stub in stubs:
            assert stub.Explain(request(), timeout=LIMIT_S, wait_for_ready=True).maps
        (line,) = [json.loads(line) for line in server.stderr().splitlines() if "front end ended" in line]
        assert (line["pid"], line["exit_code"]) == (victim, -signal.SIGKILL)
        wait_until(lambda: server.stderr().count('"CANCELLED"') >= lost, "a lost call is not cancelled")
        assert server.stderr().count('"CANCELLED"') == lost
        assert counts() == (2, 1)


def test_signals_to_the_group_are_ignored_and_the_log_has_the_trace_of_the_caller(config: Path) -> None:
    with serving(config) as server, grpc.insecure_channel(server.address) as channel:
        for pid in front_ends(server):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        metadata = (("traceparent", f"00-{trace}-00f067aa0ba902b7-01"),)
        assert ExplainServiceStub(channel).Explain(request(), timeout=LIMIT_S, metadata=metadata).maps
        (line,) = [json.loads(line) for line in server.stderr().splitlines() if '"Explain"' in line]
        assert line["trace_id"] == trace
        assert "front end ended" not in server.stderr()


def test_nothing_is_left_when_the_engine_process_is_killed(config: Path) -> None:
    with serving(config) as server:
        before = front_ends(server)
        (folder,) = (config.parent / "run").iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        server.process.kill()
        server.process.wait(LIMIT_S)
        wait_until(lambda: not any(map(exists, before)), "a front end goes on without its engine")
        assert not folder.exists()


def test_folder_is_removed_also_if_front_ends_notice_the_lost_link_first(config: Path) -> None:
    with serving(config) as server:
        before = front_ends(server)
        (folder,) = (config.parent / "run").iterdir()
        with ExitStack() as held:
            for each in before:  # a second writer of the standard input of each front end keeps it open
                held.enter_context(Path(f"/proc/{each}/fd/0").open("w"))
            server.process.kill()
            server.process.wait(LIMIT_S)
            wait_until(lambda: not accepts_connections(server.address), "a front end goes on serving")
            assert folder.exists()
        wait_until(lambda: not any(map(exists, before)), "a front end goes on without its engine")
        assert not folder.exists()


def test_second_signal_ends_everything_at_once(config: Path, gate: Path) -> None:
    with serving(config) as server, grpc.insecure_channel(server.address) as channel:
        before = front_ends(server)
        gate.touch()
        running = stream(ExplainServiceStub(channel))
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in server.stderr(), "the server does not drain")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == -signal.SIGTERM
        wait_until(lambda: not any(map(exists, before)), "a front end goes on without its engine")
        with pytest.raises(grpc.RpcError):
            list(running)


def test_drain_finishes_running_calls_and_refuses_new_ones(config: Path, gate: Path) -> None:
    with serving(config) as server, grpc.insecure_channel(server.address) as channel:
        before = front_ends(server)
        stub, health = ExplainServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=LIMIT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        gate.touch()
        running = stream(stub)
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        wait_until(lambda: "draining" in server.stderr(), "the server does not drain")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Explain(request(), timeout=LIMIT_S)
        refused: Any = caught.value
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in refused.details()
        assert ("grpc-retry-pushback-ms", "1000") in {(each.key, each.value) for each in refused.trailing_metadata()}
        gate.unlink()
        *_, last = running
        assert last.HasField("result")
        assert server.process.wait(LIMIT_S) == 0
        assert not any(map(exists, before))
        assert not [*(config.parent / "run").iterdir()]


@pytest.mark.parametrize(("first", "others"), [(1, [2]), (2, [1, 2])])
def test_second_server_on_the_port_exits(tmp_path: Path, first: int, others: list[int]) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(f"frontends = {first}\n{CONFIG}{TINY}")
    with served(one) as server:
        for second in others:
            other.write_text(f"frontends = {second}\n{CONFIG.replace('127.0.0.1:0', server.address, 1)}{TINY}")
            result = completed([*CAMSERVE, "serve", "--config", other])
            assert result.returncode == 2
            assert result.stderr.splitlines()[-1].startswith(f"error: listen: cannot bind {server.address}")
        with patient_client(server.address) as client:
            assert client.explain(IMAGE, method="grad-cam").maps


def test_server_without_a_folder_for_the_socket_does_not_start(config: Path) -> None:
    too_long = config.parent / ("d" * 100)
    too_long.mkdir()
    result = completed([*CAMSERVE, "serve", "--config", config], env=environment(TMPDIR=str(too_long)))
    assert result.returncode == 2
    assert "error: frontends: cannot create a socket in" in result.stderr
    assert not [*too_long.iterdir()]


WAITING = """
import time
from pathlib import Path
from tests import nets

def network():
    while not (Path(__file__).parent / "go").exists():
        time.sleep(0.05)
    return nets.tiny_cnn()
"""


def test_front_ends_answer_while_the_models_are_loaded(config: Path) -> None:
    (config.parent / "waiting.py").write_text(WAITING)
    config.write_text(config.read_text().replace("tests.gated:Gated", "waiting:network"))
    port = free_port()
    config.write_text(config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}", 1))
    variables = environment(PYTHONPATH=f"{ROOT}:{config.parent}", TMPDIR=str(config.parent / "run"))
    with (
        started([*CAMSERVE, "serve", "--config", config], env=variables, stderr=subprocess.DEVNULL) as process,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        check = health_pb2_grpc.HealthStub(channel).Check
        for service, status in (("", "SERVING"), (SERVICE, "NOT_SERVING")):
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=LIMIT_S, wait_for_ready=True)
            assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == status
        with pytest.raises(grpc.RpcError) as caught:
            ExplainServiceStub(channel).Explain(request(), timeout=LIMIT_S)
        assert "still loading its models" in str(caught.value)
        (config.parent / "go").touch()
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        assert ExplainServiceStub(channel).Explain(request(), timeout=LIMIT_S).maps


def test_tls_tokens_and_log(config: Path) -> None:
    """The log names the caller and the request; it contains neither the token nor the image."""
    ca, secret = trustme.CA(), "camserve_triage-0123456789"
    certify(ca, config.parent)
    config.write_text(
        f"frontends = 2\n{CONFIG}"
        '[tls]\ncertificate = "server.pem"\nkey = "server.key"\nclient_ca = "ca.pem"\nallowed_subjects = ["pacs"]\n'
        f'[[tokens]]\nname = "triage"\nsha256 = "{hashed(secret)}"\n{TINY}'
    )

    def options(name: str) -> dict[str, Any]:
        certificate = ca.issue_cert("any.example", common_name=name)
        return {
            "ca": config.parent / "ca.pem",
            "certificate": certificate.cert_chain_pems[0].bytes(),
            "key": certificate.private_key_pem.bytes(),
        }

    with serving(config) as server:
        with patient_client(server.address, **options("pacs"), token=secret) as client:
            client.explain(IMAGE, method="grad-cam", request_id="mine")
            with pytest.raises(camserve.InvalidArgument):
                client.explain(b"no image", method="grad-cam", request_id="broken")
        for name, token, error in (
            ("pacs", "guessed", camserve.Unauthenticated),
            ("other", secret, camserve.PermissionDenied),
        ):
            with patient_client(server.address, **options(name), token=token) as client, pytest.raises(error):
                client.models()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 0
        lines = [json.loads(line) for line in server.stderr().splitlines()]
        calls = [line for line in lines if line["event"] == "call"]
        assert [(line["rpc"], line["code"], line.get("caller")) for line in calls] == [
            ("ExplainStream", "OK", "triage"),
            ("ExplainStream", "INVALID_ARGUMENT", "triage"),
            ("ListModels", "UNAUTHENTICATED", None),
            ("ListModels", "PERMISSION_DENIED", None),
        ]
        assert [line["request_id"] for line in calls[:2]] == ["mine", "broken"]
        assert all(re.fullmatch("[0-9a-f]{32}", line["request_id"]) for line in calls[2:])
        for hidden in (secret, hashed(secret), "guessed", "no image"):
            assert hidden not in server.stderr()
