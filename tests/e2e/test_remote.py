"""Remote models: another server runs the network, and this server explains it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import skimage.data
import trustme

import camserve
from camserve.v1 import admin_pb2 as pb
from camserve.v1.admin_pb2_grpc import AdminServiceStub
from camserve_server.config import Config, ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models.remote import warnings_about
from camserve_server.service.server import Server
from tests import nets
from tests.conftest import serving
from tests.e2e.engines import wait_until
from tests.inference_server import InferenceServer, listening
from tests.processes import LIMIT_S, free_port, patient_client

IMAGE = skimage.data.chelsea()
ACTIVATIONS = {"r1": "r1", "r2": "r2", "r3": "r3"}
SMALL: dict[str, Any] = {"input_size": (32, 32), "batch_size": 4}
LOCAL = ModelConfig(name="local", source="python:tests.nets:tiny_cnn", **SMALL)
RISE: dict[str, Any] = {"method": "rise", "parameters": {"masks": 64}}
ENDLESS: dict[str, Any] = {"method": "rise", "parameters": {"masks": 100_000}}
FORWARD = {"rise", "occlusion", "fake-cam", "random", "center-gaussian"}
ACTIVATION_METHODS = {"score-cam", "poly-cam+", "poly-cam-", "poly-cam", "ss-cam", "is-cam", "eigen-cam"}


def config(address: str, *models: ModelConfig, **keys: Any) -> Config:
    remote = ModelConfig(name="remote", source=f"triton:{address}/net", **{**SMALL, **keys})
    return Config(
        listen="127.0.0.1:0", admin_listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", models=[remote, *models]
    )


@contextmanager
def running(remote: InferenceServer, *models: ModelConfig, **keys: Any) -> Iterator[tuple[Server, camserve.Client]]:
    """Run a server with the model "remote", and yield it with a client."""
    with (
        listening(remote) as address,
        serving(config(address, *models, **keys)) as server,
        patient_client(server.address) as client,
    ):
        try:
            yield server, client
        finally:
            remote.go_on.set()


def loading_error(remote: InferenceServer, **keys: Any) -> str:
    with (
        listening(remote) as address,
        pytest.raises(ConfigError) as caught,
        serving(config(address, **keys)),
    ):
        pass
    return str(caught.value).replace(address, "ADDRESS")


def engine_threads() -> set[str]:
    return {each.name for each in threading.enumerate() if each.name.startswith("engine-")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "properties",
    [{}, {"nhwc": True, "shape": (3, 32, 32), "raw": False}, {"batch": 6}],
    ids=["NCHW", "NHWC", "fixed batch"],
)
def test_maps_are_those_of_the_network_in_this_process(properties: dict[str, Any]) -> None:
    remote = InferenceServer(nets.tiny_cnn(), ACTIVATIONS, **properties)
    with running(remote, LOCAL) as (_, client):
        for method in ("rise", "occlusion", "score-cam", "poly-cam+", "poly-cam"):
            arguments = RISE if method == "rise" else {"method": method}
            there, here = (
                client.explain(IMAGE, model=m, metrics=["deletion"], **arguments) for m in ("remote", "local")
            )
            assert there.receipt.layers == here.receipt.layers
            np.testing.assert_allclose(there.saliency, here.saliency, atol=1e-5)
            assert there.maps[0].scores["deletion"] == pytest.approx(here.maps[0].scores["deletion"], abs=1e-5)


@pytest.mark.slow
def test_methods_that_a_remote_model_cannot_serve_are_refused_with_the_reason() -> None:
    remote = InferenceServer(nets.tiny_cnn(), ACTIVATIONS)
    with running(remote) as (_, client):
        [model] = client.models()
        assert set(model.methods) == FORWARD | ACTIVATION_METHODS
        with pytest.raises(camserve.FailedPrecondition, match="a remote server runs the network and returns no gradie"):
            client.explain(IMAGE, method="grad-cam")
        with pytest.raises(camserve.FailedPrecondition, match="does not have layers whose output can be changed"):
            client.explain(IMAGE, method="ablation-cam")
        for method in ("ablation-cam", "grad-cam"):
            with pytest.raises(camserve.FailedPrecondition, match="r2 of remote is an output of a remote server"):
                client.explain(IMAGE, method=method, layers=["r2"])
        with pytest.raises(camserve.FailedPrecondition, match="no weights that the server can make random"):
            client.explain(IMAGE, method="occlusion", metrics=["randomisation-ssim"])
        assert [layer.cut for layer in model.layers] == [None, None, None]
        assert any("cut values are not measured" in sentence for sentence in model.warnings)
        assert any("weights of a remote model are not verified" in sentence for sentence in model.warnings)


@pytest.mark.slow
def test_any_name_of_an_output_becomes_a_layer() -> None:
    """Some names are attributes of torch modules, or contain characters that torch does not accept."""
    names = ["half", "signature", "block.out#1", "block.out"]
    remote = InferenceServer(nets.tiny_cnn(), dict(zip(names, ("r1", "r2", "r3", "c3"), strict=True)))
    with running(remote) as (_, client):
        [model] = client.models()
        assert {each.name for each in model.named_layers} == {"half_", "signature_", "block.out_1", "block.out"}
        layer = client.explain(IMAGE, method="score-cam", layers=["half_"]).receipt.layers
        assert [*layer] == ["half_"]


@pytest.mark.slow
def test_model_without_activations_serves_methods_without_layers() -> None:
    with running(InferenceServer(nets.tiny_cnn())) as (_, client):
        assert set(client.models()[0].methods) == FORWARD
        with pytest.raises(camserve.FailedPrecondition, match="the remote server returns no activations"):
            client.explain(IMAGE, method="score-cam")


@pytest.mark.slow
def test_each_batch_is_one_request_for_the_outputs_that_it_needs() -> None:
    remote = InferenceServer(nets.tiny_cnn(), ACTIVATIONS)
    with running(remote) as (_, client):
        assert len(remote.rows) < 30, "a load sends few requests"
        remote.rows.clear()
        remote.requested.clear()
        assert client.explain(IMAGE, method="score-cam").maps
        assert set(remote.rows) == {4}
        assert set(remote.requested) == {("logits", "r3"), ("logits",)}
        assert remote.requested.count(("logits", "r3")) == 1


@pytest.mark.slow
def test_server_that_limits_batches_gets_smaller_ones() -> None:
    remote = InferenceServer(nets.tiny_cnn(), max_rows=8)
    with running(remote, batch_size=None) as (server, client):
        assert server.models["remote"].batch_sizes["forward"] in (1, 4)
        assert len(remote.rows) < 40, "a load sends few requests"
        assert client.explain(IMAGE, **RISE).maps


@pytest.mark.slow
def test_slow_remote_model_does_not_block_a_local_one() -> None:
    remote = InferenceServer(nets.tiny_cnn())
    with running(remote, LOCAL) as (_, client):
        remote.go_on.clear()
        stream = client.explain_stream(IMAGE, model="remote", **RISE)
        events: list[Any] = []
        waiter = threading.Thread(target=lambda: events.extend(stream))
        waiter.start()
        assert remote.waiting.wait(LIMIT_S)
        assert client.explain(IMAGE, model="local", method="score-cam").maps
        assert not any(isinstance(event, camserve.Explanation) for event in events)
        remote.go_on.set()
        waiter.join(LIMIT_S)
        assert isinstance(events[-1], camserve.Explanation)


@pytest.mark.slow
def test_cancellation_reaches_the_remote_server() -> None:
    remote = InferenceServer(nets.tiny_cnn())
    with running(remote) as (server, client):
        stream = client.explain_stream(IMAGE, **ENDLESS)
        next(event for event in stream if isinstance(event, camserve.Progress))
        remote.go_on.clear()
        assert remote.waiting.wait(LIMIT_S)
        stream.close()
        assert remote.cancelled.wait(LIMIT_S)
        wait_until(lambda: not server.engines.rows_owed())
        remote.go_on.set()
        assert client.explain(IMAGE, **RISE).maps


@pytest.mark.slow
def test_deadline_reaches_the_remote_server() -> None:
    remote = InferenceServer(nets.tiny_cnn())
    with running(remote) as (_, client):
        client.explain(IMAGE, method="occlusion", timeout=1000)
        assert remote.left_s is not None and 800 < remote.left_s <= 1000
        remote.go_on.clear()
        timeout_s = 1
        while not remote.waiting.is_set():  # on a busy machine, a deadline can pass before the first batch
            with pytest.raises(camserve.DeadlineExceeded):
                client.explain(IMAGE, timeout=timeout_s, **RISE)
            timeout_s *= 2
        assert remote.cancelled.wait(LIMIT_S), "the remote request ends with the deadline"


@pytest.mark.slow
def test_failures_of_the_remote_server_are_those_of_the_request() -> None:
    remote = InferenceServer(nets.tiny_cnn())
    with running(remote, LOCAL) as (_, client):
        remote.failure = grpc.StatusCode.INVALID_ARGUMENT, "bad shape\nsecond line"
        with pytest.raises(
            camserve.InternalError, match=r"net at 127.0.0.1:\d+ reports INVALID_ARGUMENT: bad shape;"
        ) as caught:
            client.explain(IMAGE, **RISE)
        assert (caught.value.reason, caught.value.metadata["remote_code"]) == ("REMOTE_FAILED", "INVALID_ARGUMENT")
        remote.failure = None
        remote.version = "2"
        with pytest.raises(camserve.FailedPrecondition, match="has the version '2' now, not '1'; reload"):
            client.explain(IMAGE, **RISE)
        remote.version = "1"
        assert client.explain(IMAGE, **RISE).maps


@pytest.mark.slow
def test_unavailable_remote_server_is_used_again_after_its_restart() -> None:
    remote = InferenceServer(nets.tiny_cnn())
    with ExitStack() as first:
        address = first.enter_context(listening(remote, f"127.0.0.1:{free_port()}"))
        with serving(config(address)) as server, camserve.Client(server.address, timeout=LIMIT_S) as client:
            expected = client.explain(IMAGE, **RISE)
            first.close()
            remote.rows.clear()
            with pytest.raises(
                camserve.Unavailable, match=f"the remote model net at {address} is unavailable"
            ) as caught:
                client.explain(IMAGE, **RISE)
            assert caught.value.retry_after_s is not None
            again: list[camserve.Explanation] = []

            def works_again() -> bool:
                with suppress(camserve.Unavailable):  # until the server has connected again
                    again.append(client.explain(IMAGE, **RISE))
                return bool(again)

            with listening(remote, address):
                wait_until(works_again)
            assert np.array_equal(again[0].saliency, expected.saliency)


@pytest.mark.slow
def test_unloading_closes_the_engine_and_keeps_its_counters() -> None:
    remote = InferenceServer(nets.tiny_cnn())
    with running(remote, LOCAL) as (server, client), grpc.insecure_channel(server.admin_address) as channel:
        admin = AdminServiceStub(channel)
        assert engine_threads() == {"engine-remote"}
        client.explain(IMAGE, **RISE)
        rows = {key: counted.rows for key, counted in server.engines.lanes().items()}
        assert rows["remote", "fp32", "forward"] == 65
        admin.UnloadModel(pb.UnloadModelRequest(model="remote"))
        assert not engine_threads()
        assert {key: counted.rows for key, counted in server.engines.lanes().items()} == rows
        admin.LoadModel(pb.LoadModelRequest(model="remote"))
        assert engine_threads() == {"engine-remote"}
        client.explain(IMAGE, **RISE)
        assert server.engines.lanes()["remote", "fp32", "forward"].rows == 130
    assert not engine_threads()


@pytest.mark.slow
def test_shutdown_interrupts_a_remote_request() -> None:
    remote = InferenceServer(nets.tiny_cnn())
    errors: list[camserve.CamserveError] = []
    with ExitStack() as stack:
        address = stack.enter_context(listening(remote))
        with serving(config(address)) as server:
            client = stack.enter_context(camserve.Client(server.address, timeout=LIMIT_S))
            remote.go_on.clear()

            def explain() -> None:
                with pytest.raises(camserve.CamserveError) as caught:
                    client.explain(IMAGE, **RISE)
                errors.append(caught.value)

            waiter = threading.Thread(target=explain)
            waiter.start()
            assert remote.waiting.wait(LIMIT_S)
        assert remote.cancelled.wait(LIMIT_S)
        waiter.join(LIMIT_S)
    [error] = errors
    assert isinstance(error, camserve.Unavailable)


@pytest.mark.slow
def test_failure_of_a_remote_engine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(InferenceServer(nets.tiny_cnn())) as (server, client):
        [engine] = server.engines._remote
        monkeypatch.setattr(engine._loop, "_run_batch", lambda batch: 1 / 0)
        with pytest.raises(camserve.InternalError):
            client.explain(IMAGE, **RISE)
        assert isinstance(server.engines.failed.exception(LIMIT_S), ZeroDivisionError)


@pytest.mark.slow
def test_tls() -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    credentials = grpc.ssl_server_credentials(
        [(certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())]
    )
    remote = InferenceServer(nets.tiny_cnn())
    with authority.cert_pem.tempfile() as ca, listening(remote, credentials=credentials) as address:
        with serving(config(address, remote_ca=ca)) as server, patient_client(server.address) as client:
            assert client.explain(IMAGE, **RISE).maps
        with (
            trustme.CA().cert_pem.tempfile() as other,
            pytest.raises(ConfigError, match="is unavailable"),
            serving(config(address, remote_ca=other)),
        ):
            pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("properties", "keys", "message"),
    [
        ({"ready": False}, {}, r"source: the remote model net at ADDRESS is not ready; load it"),
        ({"inputs": 2}, {}, r"source: the inputs of the remote model are in0 FP32 .*, in1 .*; expected one, FP32"),
        ({"inputs": 0}, {}, r"source: the inputs of the remote model are not described; expected one"),
        (
            {"datatype": "UINT8"},
            {},
            r"source: the inputs of the remote model are in0 UINT8 \[-1, 3, -1, -1\]; expected",
        ),
        ({"drop_logits": True}, {}, r"outputs of the remote model net at ADDRESS are r1 FP32 .*; expected exactly one"),
        ({"shape": (3, 32, 48)}, {}, r"input_size: the remote model has a fixed input of 32x48 pixels, not 32x32"),
        ({"shape": (1, -1, -1)}, {"mean": (0, 0, 0)}, r"mean: the input of the remote model has 1 channels, but mean"),
        ({"batch": 2}, {}, r"batch_size: the remote model takes 2 images in a request, not 4"),
        (
            {},
            {"remote_ca": "/nowhere/ca.pem"},
            r"remote_ca: /nowhere/ca.pem: No such file or directory; expected a file",
        ),
        ({"failure": (grpc.StatusCode.NOT_FOUND, "no model")}, {}, r"source: .*reports NOT_FOUND: no model; .*check"),
    ],
)
def test_model_that_cannot_be_served_is_refused(properties: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    remote = InferenceServer(nets.tiny_cnn(), ACTIVATIONS, **properties)
    error = loading_error(remote, **keys)
    assert re.match(rf"models\.remote\..*{message}", error), error


@pytest.mark.slow
def test_unreachable_server_is_named() -> None:
    with listening(InferenceServer(nets.tiny_cnn())) as address:
        pass
    with (
        pytest.raises(ConfigError, match=rf"models\.remote\.source: the remote model net at {address} is unavailable"),
        serving(config(address)),
    ):
        pass


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "triton:localhost/net"}, "source: 'localhost' is not HOST:PORT"),
        ({"source": "triton:localhost:8001"}, "source: the name of the model is missing"),
        ({"source": "triton:localhost:8001/net", "precision": "bf16"}, "precision: a remote server chooses"),
        ({"source": "triton:localhost:8001/net", "weights": "a.pt"}, "weights: the source triton: contains"),
        ({"source": "python:a:b", "remote_ca": "ca.pem"}, "remote_ca: only the source triton:"),
    ],
)
def test_invalid_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(name="m", **keys)


def test_images_in_plaintext_over_a_network_cause_a_warning() -> None:
    there: dict[str, Any] = {"name": "m", "source": "triton:models.example:8001/net"}
    network: Any = SimpleNamespace(output_modules=["r1"])
    sentence = "images travel to the remote server without encryption; set remote_ca"
    assert sentence in warnings_about(network, {}, ModelConfig(**there))
    assert sentence not in warnings_about(network, {}, ModelConfig(**there, remote_ca="ca.pem"))
    assert sentence not in warnings_about(network, {}, ModelConfig(name="m", source="triton:127.0.0.1:8001/net"))
