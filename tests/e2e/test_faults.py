"""Networks that fail: the request gets an error, and the server survives or ends with an error status."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor, nn

import camserve
from camserve_server.config import Config, ModelConfig
from tests import nets
from tests.conftest import serving
from tests.processes import LIMIT_S, patient_client, served

SOURCE = "python:tests.e2e.test_faults:tricky"
CONFIG = f"""
listen = "127.0.0.1:0"
device = "cpu"

[[models]]
name = "tricky"
source = "{SOURCE}"
input_size = [32, 32]
batch_size = 4
"""
VALID, LETHAL, BROKEN = (np.full((3, 32, 32), value, np.float32) for value in (0.5, 1e6, -1e6))


class Tricky(nn.Module):
    """A network that ends its thread for LETHAL inputs and raises an exception for BROKEN ones."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        if x.amax() >= 1e6:
            raise SystemExit("stands for a bug of the server: nothing catches SystemExit")
        if x.amin() <= -1e6:
            raise ZeroDivisionError("stands for a bug of the network")
        return self.net(x)  # type: ignore[no-any-return]


def tricky() -> nn.Module:
    """Return the network; the configuration names this factory."""
    return Tricky()


@pytest.mark.slow
def test_process_ends_when_the_device_thread_dies(tmp_path: Path) -> None:
    """Waiting requests get an error, and the exit status is 1."""
    config = tmp_path / "camserve.toml"
    config.write_text(CONFIG)
    with served(config) as server, patient_client(server.address) as client:
        waiting = client.explain_stream(VALID, method="rise", parameters={"masks": 1_000_000})
        next(waiting)
        with pytest.raises(camserve.InternalError):
            client.explain(LETHAL, method="grad-cam")
        with pytest.raises((camserve.InternalError, camserve.Unavailable)):
            list(waiting)
        assert server.process.wait(LIMIT_S) == 1
        assert "the engine's thread failed; the server ends" in server.stderr()


@pytest.mark.slow
def test_exception_in_the_network_fails_one_request(tmp_path: Path) -> None:
    model = ModelConfig(name="tricky", source=SOURCE, input_size=(32, 32), batch_size=4)
    config = Config(listen="127.0.0.1:0", device="cpu", models=[model])
    with serving(config) as server, patient_client(server.address) as client:
        alone = client.explain(VALID, method="rise", parameters={"masks": 800})
        *_, together = _explain_with_broken_requests(client)
        assert np.array_equal(together.saliency, alone.saliency)
        with grpc.insecure_channel(server.address) as channel:
            request = health_pb2.HealthCheckRequest(service="camserve.v1.ExplainService")
            assert health_pb2_grpc.HealthStub(channel).Check(request).status == health_pb2.HealthCheckResponse.SERVING
        assert server.engine is not None
        assert not server.engine.ended.done()


def _explain_with_broken_requests(client: camserve.Client) -> Iterator[camserve.Explanation]:
    """Send the same request, and meanwhile requests that fail in its batches."""
    refused = 0
    for event in client.explain_stream(VALID, method="rise", parameters={"masks": 800}):
        if isinstance(event, camserve.Explanation):
            assert refused, "no other request ran meanwhile"
            yield event
        elif isinstance(event, camserve.Progress) and refused < 5:
            with pytest.raises(camserve.InternalError):
                client.explain(BROKEN, method="score-cam")
            refused += 1
