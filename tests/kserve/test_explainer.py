"""`camserve kserve` with a real server, the client of KServe's SDK, and HTTP clients."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
import requests
import trustme
from structlog.testing import capture_logs

import camserve
from camserve_server.config import Config, ModelConfig, TLSConfig, TokenConfig
from camserve_server.errors import QueueFull
from camserve_server.service import status
from camserve_server.service.server import Server
from tests.client.fake_server import Servicer, listening
from tests.conftest import serving
from tests.credentials import certify, hashed
from tests.e2e.engines import engine_of, wait_until, wait_until_idle
from tests.processes import CAMSERVE, LIMIT_S, completed, environment, free_port, patient_client, started

pytestmark = pytest.mark.slow

CALLS = Path(__file__).parent / "sdk_calls.py"
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
RISE: dict[str, Any] = {"method": "rise", "masks": 8, "seed": 3, "metrics": ["insertion", "average-drop"]}
FOREVER: dict[str, Any] = {"method": "rise", "masks": 1_000_000}


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


B64 = {"b64": base64.b64encode(png(IMAGE)).decode()}


@dataclass
class Running:
    """A `camserve kserve` process that has reported that it is ready."""

    process: Any
    http: str
    grpc: str
    log: Path

    def get(self, path: str) -> requests.Response:
        return requests.get(self.http + path, timeout=LIMIT_S)

    def post(self, path: str, body: Any, **headers: str) -> requests.Response:
        return requests.post(self.http + path, json=body, headers=headers, timeout=LIMIT_S)

    def explain(self, *instances: Any, headers: dict[str, str] | None = None, **parameters: Any) -> Any:
        body = {"instances": instances, "parameters": parameters}
        return self.post("/v1/models/net:explain", body, **(headers or {}))

    def infer(self, datatype: str, shape: list[int], data: Any, **parameters: Any) -> Any:
        tensor = {"name": "image", "datatype": datatype, "shape": shape, "data": data}
        return self.post("/v2/models/net/infer", {"inputs": [tensor], "parameters": parameters, "id": "mine"})


@contextmanager
def explainer(address: str, folder: Path, *options: str, **variables: str) -> Iterator[Running]:
    log = folder / "explainer.log"
    # KServe adds the last options to the arguments of the container.
    added = ["--model_name", "net", "--predictor_host", "net-predictor.default", "--http_port", "0", "--workers", "2"]
    command = [*CAMSERVE, "kserve", "--address", address, "--grpc_port", "0", *options, *added]
    with (
        log.open("w", encoding="utf-8") as stderr,
        started(command, stderr=stderr, env=environment(**variables)) as process,
    ):
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.fullmatch(r"camserve kserve is ready on (\S+), gRPC on (\S+)\n", ready)
        assert found, ready + log.read_text(encoding="utf-8")
        yield Running(process, found[1], found[2], log)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Server]:
    other = TINY.model_copy(update={"name": "other"})
    with serving(Config(listen="127.0.0.1:0", models=[other, TINY])) as running:
        yield running


@pytest.fixture(scope="module")
def running(tiny: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with explainer(tiny.address, tmp_path_factory.mktemp("explainer"), "--model", "tiny") as process:
        yield process


@pytest.fixture(scope="module")
def direct(tiny: Server) -> Iterator[camserve.Client]:
    with patient_client(tiny.address) as client:
        yield client


def rise(direct: camserve.Client, image: Any = IMAGE, **arguments: Any) -> camserve.Explanation:
    return direct.explain(
        image,
        model="tiny",
        method="rise",
        parameters={"masks": 8},
        seed=3,
        metrics=["insertion", "average-drop"],
        **arguments,
    )


# ---- v1 --------------------------------------------------------------------------------------------------------------


def test_v1_returns_map_scores_target_and_receipt(running: Running, direct: camserve.Client) -> None:
    response = running.explain(B64, headers={"x-request-id": "mine", "authorization": "Bearer secret"}, **RISE)
    assert response.status_code == 200, response.text
    assert "authorization" not in response.headers
    [found] = response.json()["explanations"]
    there = rise(direct)
    [one] = found["maps"]
    np.testing.assert_array_equal(np.array(one["saliency"], np.float32), there.saliency)
    assert one["scores"] == pytest.approx(there.maps[0].scores)
    assert one["target"] == pytest.approx(vars(there.target))
    assert (found["request_id"], found["model"], found["method"]) == ("mine", "tiny", "rise")
    receipt = camserve.Receipt.from_json(json.dumps(found))
    assert receipt.map_digests == there.receipt.map_digests
    assert direct.replay(receipt, png(IMAGE)).same
    [predictions] = response.json()["predictions"]
    assert predictions[0]["index"] == there.predictions[0].index


def test_v1_accepts_files_pixels_and_tensors(running: Running, direct: camserve.Client) -> None:
    tensor = np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(3, 32, 32)
    instances = [
        {"image": B64, "parameters": {"targets": [2]}},
        IMAGE.tolist(),
        {"image": IMAGE.tolist()},
        tensor.tolist(),
    ]
    response = running.explain(*instances, **RISE, saliency_format="base64", targets=1)
    found = response.json()["explanations"]
    images = [(IMAGE, 2), (IMAGE, 1), (IMAGE, 1), (tensor, 1)]
    for each, (image, target) in zip(found, images, strict=True):
        [one] = each["maps"]
        assert one["target"]["index"] == target
        saliency = np.frombuffer(base64.b64decode(one["saliency"]["b64"]), "<f4").reshape(one["saliency"]["shape"])
        np.testing.assert_array_equal(saliency, rise(direct, image, target=target).saliency)


def test_v1_does_not_depend_on_the_content_type(running: Running) -> None:
    body = json.dumps({"instances": [B64], "parameters": {"method": "grad-cam"}})
    for content_type in ("application/json; charset=utf-8", "text/plain", None):
        headers = {"content-type": content_type} if content_type else {}
        response = requests.post(f"{running.http}/v1/models/net:explain", body, headers=headers, timeout=LIMIT_S)
        assert response.status_code == 200, response.text


WRONG = {
    "no instances": ({}, "instances", "at least one image"),
    "unknown key": ({"instances": [B64], "method": "rise"}, "", "unknown keys method"),
    "no base64": ({"instances": [{"b64": "?"}]}, "instances[0].b64", "not valid base64"),
    "number as base64": ({"instances": [B64, {"b64": 1}]}, "instances[1].b64", "expected a string"),
    "text": ({"instances": ["dog.jpg"]}, "instances[0]", "is no image"),
    "key of an instance": ({"instances": [{"url": "x"}]}, "instances[0]", "unknown keys url"),
    "ragged": ({"instances": [[[1], [1, 2]]]}, "instances[0]", "different lengths"),
    "text in a list": ({"instances": [[["a"]]]}, "instances[0]", "other values than numbers"),
    "long text in a list": ({"instances": [["x" * 10**6, *[1] * 10**6]]}, "instances[0]", "other values than numbers"),
    "large number": ({"instances": [[[[2**64 - 1, 0, 0]]]]}, "instances[0]", "decimal point"),
    "many images": ({"instances": [B64] * 1025}, "instances", "1025 images; expected at most 1024"),
    "large pixel": ({"instances": [[[[256, 0, 0]]]]}, "instances[0]", "decimal point"),
    "shape": ({"instances": [[[1.5]]]}, "image", "expected uint8 [H, W, 3]"),
    "no image file": ({"instances": [{"b64": "AAAA"}]}, "image.encoded", "cannot be read"),
    "seed": ({"instances": [B64], "parameters": {"seed": 1.5}}, "parameters[seed]", "expected an integer"),
    "budget": ({"instances": [B64], "parameters": {"budget": 0}}, "budget", "expected 1 to"),
    "targets": ({"instances": [B64], "parameters": {"targets": {}}}, "parameters[targets]", "expected an integer"),
    "parameter": ({"instances": [B64], "parameters": {"masks": 8}}, "method.parameters.masks", "no parameter"),
    "no number": ({"instances": [B64], "parameters": {"method": "rise", "masks": None}}, "method.parameters", ""),
    "format": ({"instances": [B64], "parameters": {"saliency_format": "png"}}, "parameters[saliency_format]", "list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_v1_errors_name_the_field(name: str, running: Running) -> None:
    body, field, text = WRONG[name]
    response = running.post("/v1/models/net:explain", body)
    answer = response.json()
    assert response.status_code == 400, answer
    assert answer["code"] == "INVALID_ARGUMENT"
    assert answer.get("field", "").startswith(field), answer
    assert text in answer["error"]


def test_errors_have_the_http_status_of_their_code(running: Running) -> None:
    response = running.explain(B64, B64, method="no-cam")
    assert response.status_code == 404
    assert response.json()["field"] == "method.name"
    assert response.json()["error"].startswith("instances[0]: there is no method 'no-cam'")
    assert running.post("/v1/models/other:explain", {"instances": [B64]}).status_code == 404
    assert running.post("/v1/models/net:predict", {"instances": [B64]}).status_code == 501
    assert running.post("/v2/repository/models/net/unload", {}).status_code == 501
    assert running.get("/v1/models/net").status_code == 200, "the model is still there"
    assert requests.post(f"{running.http}/v1/models/net:explain", b"{", timeout=LIMIT_S).status_code == 400
    late = running.explain(B64, headers={"x-envoy-expected-rq-timeout-ms": "1"}, method="score-cam")
    assert (late.status_code, late.json()["code"]) == (504, "DEADLINE_EXCEEDED")
    for digits in (400, 5000):  # more than Python converts to a float, and to an integer
        unlimited = running.explain(B64, headers={"x-envoy-expected-rq-timeout-ms": "9" * digits}, method="grad-cam")
        assert unlimited.status_code == 200


# ---- v2 --------------------------------------------------------------------------------------------------------------


def test_v2_returns_the_tensors_of_the_open_inference_protocol(running: Running, direct: camserve.Client) -> None:
    parameters = {**RISE, "metrics": "insertion", "triton_enable_empty_final_response": True}  # perf_analyzer sends it
    response = running.infer("UINT8", [1, *IMAGE.shape], IMAGE.ravel().tolist(), **parameters)
    answer = response.json()
    assert response.status_code == 200, answer
    outputs = {each["name"]: np.reshape(each["data"], each["shape"]) for each in answer["outputs"]}
    there = rise(direct)
    np.testing.assert_array_equal(outputs["saliency"].astype(np.float32), there.saliency[None])
    assert outputs["target"].tolist() == [there.target.index]
    assert outputs["probability"].tolist() == [there.target.probability]
    assert outputs["scores"].tolist() == [[there.maps[0].scores["insertion"]]]
    assert answer["id"] == "mine"
    assert answer["parameters"]["metrics"] == "insertion"
    assert answer["parameters"]["share"] == 1
    assert camserve.Receipt.from_json(answer["parameters"]["receipt"]).map_digests == there.receipt.map_digests


def test_v2_accepts_and_returns_binary_data(running: Running, direct: camserve.Client) -> None:
    file = png(IMAGE)
    data = len(file).to_bytes(4, "little") + file
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    outputs = [{"name": "saliency", "parameters": {"binary_data": True}}, {"name": "target"}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs, "parameters": {"method": "grad-cam"}}).encode()
    length = "inference-header-content-length"
    headers = {length: str(len(head)), "content-type": "application/octet-stream"}
    url = f"{running.http}/v2/models/net/infer"
    response = requests.post(url, head + data, headers=headers, timeout=LIMIT_S)
    assert response.status_code == 200, response.text
    size = int(response.headers[length])
    there = direct.explain(IMAGE, model="tiny", method="grad-cam")
    assert json.loads(response.content[:size])["outputs"][1]["data"] == [there.target.index]
    assert response.content[size:] == there.saliency.tobytes()
    for wrong in (head[:-1], b"[]", json.dumps({"inputs": [{}]}).encode()):
        response = requests.post(url, wrong, headers={**headers, length: str(len(wrong))}, timeout=LIMIT_S)
        assert response.status_code == 400
    response = requests.post(url, head + data, headers={"content-type": "application/octet-stream"}, timeout=LIMIT_S)
    assert response.status_code == 400
    assert length in response.json()["error"]
    response = requests.post(url, json.dumps({"inputs": []}), timeout=LIMIT_S)
    assert response.status_code == 400
    assert "content-type: application/json" in response.json()["error"]


def test_v2_errors_name_the_field(running: Running) -> None:
    def fails(response: requests.Response) -> tuple[int, str]:
        return response.status_code, response.json().get("field", "")

    data = IMAGE.ravel().tolist()
    assert fails(running.infer("UINT8", [2, 20, 30, 3], data)) == (400, "inputs[0].shape")
    assert fails(running.infer("UINT8", [1, 40, 40, 3], data)) == (400, "inputs[0].data")
    assert fails(running.infer("UINT8", [1], [300])) == (400, "inputs[0].data")
    assert fails(running.infer("INT8", [1], [3])) == (400, "inputs[0].datatype")
    assert fails(running.infer("BYTES", [1], ["?"])) == (400, "inputs[0].data")
    assert fails(running.infer("BYTES", [2], [B64["b64"]] * 2))[0] == 400
    assert fails(running.infer("BYTES", [1], [B64["b64"]], seed="x")) == (400, "parameters[seed]")
    assert fails(running.post("/v2/models/net/infer", {"inputs": []})) == (400, "inputs")
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [B64["b64"]]}
    body = {"inputs": [tensor], "outputs": [{"name": "logits"}]}
    assert fails(running.post("/v2/models/net/infer", body)) == (400, "outputs[0].name")
    response = running.post("/v2/models/net/infer", {"inputs": [{**tensor, "shape": B64["b64"]}]})
    assert fails(response) == (400, "inputs.0.shape")
    assert B64["b64"] not in response.text


def test_client_of_the_sdk(running: Running, direct: camserve.Client, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png(IMAGE))
    ran = completed([sys.executable, str(CALLS), running.grpc, "net", str(tmp_path), TRACEPARENT])
    assert ran.returncode == 0, ran.stderr
    report, found = json.loads((tmp_path / "report.json").read_text()), np.load(tmp_path / "all.npz")
    there = rise(direct, target=[1, 2])
    np.testing.assert_array_equal(found["saliency"], [each.saliency for each in there.maps])
    assert found["target"].tolist() == [1, 2]
    assert found["scores"].tolist() == [[*each.scores.values()] for each in there.maps]
    np.testing.assert_array_equal(found["from_file"], [direct.explain(IMAGE, model="tiny", method="grad-cam").saliency])
    assert (report["live"], report["ready"], report["model_ready"], report["id"]) == (True, True, True, "mine")
    assert report["parameters"]["metrics"] == "insertion,average-drop"
    assert report["parameters"]["share"] == "1.0"
    codes = {name: code for name, (code, _) in report["failures"].items()}
    assert codes == {
        "method": "NOT_FOUND",
        "parameter": "INVALID_ARGUMENT",
        "type": "INVALID_ARGUMENT",
        "late": "DEADLINE_EXCEEDED",
        "model": "NOT_FOUND",
    }
    log = running.log.read_text()
    assert "Traceback" not in log and "\nforged" not in log
    assert "field method.parameters.mask" in report["failures"]["parameter"][1]


# ---- operation -------------------------------------------------------------------------------------------------------


def test_metadata_and_metrics(running: Running) -> None:
    assert running.get("/v2").json()["name"] == "camserve"
    assert running.get("/v2/models/net").json()["inputs"][0]["name"] == "image"
    running.explain(B64, method="grad-cam")
    assert 'request_explain_seconds_count{model_name="net"}' in running.get("/metrics").text


def test_logs_contain_no_image_and_no_text_of_the_caller(running: Running) -> None:
    running.explain(B64, method="grad-cam", targets=["Wintersohn"])
    parameters = {"Wintersohn\nforged": 1}
    running.post("/v1/models/net:explain", {"instances": [B64], "parameters": parameters})
    running.post("/v1/models/net:explain", {"instances": [B64], "Wintersohn\nforged": 1})
    running.explain(B64, method="grad-cam", headers={"x-request-id": "Wintersohn\tforged"})
    running.infer("Wintersohn\nforged", [1], [1])
    running.get("/v2/models/Wintersohn%0Aforged/ready")
    running.explain(B64, method="no-cam")
    running.infer("BYTES", [1], [B64["b64"]], method="no-cam")
    running.infer("BYTES", [1], B64["b64"])
    wait_until(lambda: "NOT_FOUND" in running.log.read_text())
    log = running.log.read_text()
    assert B64["b64"][40:80] not in log
    assert repr(png(IMAGE))[2:10] not in log
    assert "Traceback" not in log
    assert not re.search(r"^forged|Wintersohn(?!\\tforged'|%0Aforged/ready )", log, re.MULTILINE)


def test_large_bodies_are_refused(tiny: Server, tmp_path: Path) -> None:
    with explainer(tiny.address, tmp_path, "--model", "tiny", "--max-body-mib", "1") as small:
        assert small.explain({"b64": "A" * 2**20}).status_code == 413
        chunks = (b"x" * 2**16 for _ in range(17))
        response = requests.post(f"{small.http}/v1/models/net:explain", chunks, timeout=LIMIT_S)
        assert response.status_code == 413
        assert "--max-body-mib" in response.json()["error"]
        assert small.explain(B64, method="grad-cam").status_code == 200


def test_caller_that_disconnects_cancels_the_work(running: Running, tiny: Server) -> None:
    body = json.dumps({"instances": [B64], "parameters": FOREVER}).encode()
    host, _, port = running.http.removeprefix("http://").rpartition(":")
    head = f"POST /v1/models/net:explain HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    wait_until_idle(tiny)
    with capture_logs() as logs:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}X-Request-Id: leaves\r\n\r\n".encode() + body)
            wait_until(lambda: working(tiny))
        wait_until(lambda: any(each.get("request_id") == "leaves" for each in logs))
    [call] = [each for each in logs if each.get("request_id") == "leaves"]
    assert call["code"] == "CANCELLED"
    wait_until(lambda: not working(tiny))


def working(server: Server) -> bool:
    return bool(engine_of(server).rows_owed())


def test_trace_context_request_id_and_busy_server(tmp_path: Path) -> None:
    servicer = Servicer()
    with listening(servicer) as address, explainer(address, tmp_path) as process:
        headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=x", "x-request-id": "mine"}
        assert process.explain(B64, headers=headers).status_code == 200
        assert (servicer.metadata["traceparent"], servicer.metadata["tracestate"]) == (TRACEPARENT, "vendor=x")
        assert servicer.requests[-1].request_id == "mine"
        process.explain(B64, B64, headers={"x-request-id": "two"})
        assert {each.request_id for each in servicer.requests[-2:]} == {"two/0", "two/1"}
        assert "traceparent" not in servicer.metadata

        def refuse(context: grpc.ServicerContext) -> None:
            error = QueueFull("the queue is full", retry_after_s=2.5)
            context.set_trailing_metadata(status.trailing_metadata(error, "r"))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)

        servicer.before = refuse
        busy = process.explain(B64)
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "3")
        assert busy.json() == {
            "error": "the queue is full",
            "code": "RESOURCE_EXHAUSTED",
            "reason": "QUEUE_FULL",
            "request_id": "r",
            "retry_after_s": 2.5,
        }


def test_readiness_follows_the_server(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with explainer(address, tmp_path) as waiting:
        paths = ("/v2/health/ready", "/v2/models/net/ready", "/v1/models/net")
        assert {waiting.get(path).status_code for path in paths} == {503}
        assert waiting.get("/v2/health/live").status_code == 200
        assert waiting.get("/").status_code == 200
        refused = waiting.explain(B64, method="grad-cam", headers={"x-envoy-expected-rq-timeout-ms": "3000"})
        assert refused.status_code in (503, 504)
        with serving(Config(listen=address, models=[TINY])):
            wait_until(lambda: waiting.get("/v2/health/ready").status_code == 200)
            assert waiting.get("/v1/models/net").json() == {"name": "net", "ready": True}
            # The connection for requests may still wait for its next attempt, and the response 503 says so.
            wait_until(lambda: waiting.explain(B64, method="grad-cam").status_code == 200)
        assert waiting.get("/v2/health/ready").status_code == 503


def test_tls_and_token_of_the_server(tmp_path: Path) -> None:
    ca = trustme.CA()
    for name in ("server", "client"):
        certify(ca, tmp_path, name)
    tls = TLSConfig(
        certificate=str(tmp_path / "server.pem"),
        key=str(tmp_path / "server.key"),
        client_ca=str(tmp_path / "ca.pem"),
    )
    tokens = [TokenConfig(name="explainer", sha256=hashed("b"))]
    files = {"CA": "ca.pem", "CERT": "client.pem", "KEY": "client.key"}
    variables = {f"CAMSERVE_{name}": str(tmp_path / file) for name, file in files.items()}
    with serving(Config(listen="127.0.0.1:0", tls=tls, tokens=tokens, models=[TINY])) as secured:
        with explainer(secured.address, tmp_path, CAMSERVE_TOKEN="b", **variables) as process:
            assert process.get("/v2/health/ready").status_code == 200
            assert process.explain(B64, method="grad-cam").status_code == 200
        with explainer(secured.address, tmp_path, CAMSERVE_TOKEN="wrong", **variables) as process:
            refused = process.explain(B64, method="grad-cam")
            assert (refused.status_code, refused.json()["code"]) == (502, "UNAUTHENTICATED")


def test_a_stopped_process_finishes_its_requests(tiny: Server, tmp_path: Path) -> None:
    with explainer(tiny.address, tmp_path, "--model", "tiny") as process:
        body = json.dumps({"instances": [B64], "parameters": {"method": "rise", "masks": 4000}}).encode()
        host, _, port = process.http.removeprefix("http://").rpartition(":")
        head = f"POST /v1/models/net:explain HTTP/1.0\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: working(tiny))
            process.process.send_signal(signal.SIGTERM)
            connection.settimeout(LIMIT_S)
            answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"receipt" in answer
        assert process.process.wait(LIMIT_S) == 0


SIGNALLED_WHEN_READY = """
import os, sys
from camserve import aio
from camserve_kserve import Settings, run

settings = Settings("net", None, "127.0.0.1", http_port=0, grpc_port=0, max_body_bytes=1 << 20)
run(settings, aio.Client("127.0.0.1:1"), None, lambda *_: os.kill(os.getpid(), int(sys.argv[1])))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_at_the_end_of_the_start_is_not_lost(number: signal.Signals) -> None:
    ran = completed([sys.executable, "-c", SIGNALLED_WHEN_READY, str(int(number))])
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("option", ["--http_port", "--grpc_port"])
def test_port_in_use_is_named(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        ran = completed([*CAMSERVE, "kserve", "--http_port", "0", "--grpc_port", "0", option, port])
    assert ran.returncode == 1
    assert f"error: cannot listen on port {port} of 127.0.0.1: " in ran.stderr


def test_plaintext_for_other_machines_needs_an_option() -> None:
    ran = completed([*CAMSERVE, "kserve", "--host", "0.0.0.0"])
    assert ran.returncode == 2
    assert "--insecure" in ran.stderr
