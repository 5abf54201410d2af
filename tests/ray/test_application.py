"""Parts of the application without a cluster: options, the configuration, the policy, and callers on other machines."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from google.rpc import status_pb2
from typer.testing import CliRunner

from camserve_cli.app import app
from camserve_ray.serving.application import checked
from camserve_ray.serving.autoscaling import ROWS_OWED, RowsOwed
from camserve_ray.serving.command import summary
from camserve_ray.serving.replica import Replica
from camserve_ray.serving.services import EXPLAIN, INFERENCE, RPCS, Rpc
from camserve_server import open_inference
from camserve_server.config import Config, TLSConfig
from camserve_server.errors import ConfigError
from camserve_server.open_inference import inference_pb2


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


class Context:
    """Records the status, like the context of Serve."""

    def __init__(self, peer: str) -> None:
        self.status: dict[str, Any] = {}
        self.peer = lambda: peer

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.status.update({name.removeprefix("set_"): value})


@pytest.mark.parametrize("peer", ["ipv4:192.0.2.7:4711", "ipv6:%5B2001:db8::7%5D:4711"])
def test_callers_on_other_machines_are_refused_if_listen_is_a_loopback_address(peer: str) -> None:
    """Serve's proxies listen on all addresses."""
    replica: Any = Replica.__new__(Replica)
    replica.__class__ = type("WithoutServer", (Replica,), {"__del__": lambda self: None})
    replica._local_callers_only = True
    context: Any = Context(peer)
    asyncio.run(replica.Explain(b"", grpc_context=context))
    assert context.status["code"].name == "PERMISSION_DENIED"
    assert "listen of the server is a loopback address" in context.status["details"]
    details = dict(context.status["trailing_metadata"])["grpc-status-details-bin"]
    assert status_pb2.Status.FromString(details).details


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711", "unix:"])
def test_callers_on_the_machine_of_the_proxy_are_accepted(peer: str) -> None:
    replica: Any = SimpleNamespace(_local_callers_only=True)
    context: Any = Context(peer)
    Replica._check_peer(replica, context)


def test_all_rpcs_of_the_open_inference_protocol_are_passed_on() -> None:
    """The proxies name them without importing the stubs."""
    assert INFERENCE == open_inference.SERVICE
    service = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    expected = {Rpc(f"/{INFERENCE}/{rpc.name}", rpc.server_streaming) for rpc in service.methods}
    assert {rpc for rpc in RPCS if INFERENCE in rpc.path} == expected
    assert sum(rpc.path.startswith(f"/{EXPLAIN}/") for rpc in RPCS) == 7
