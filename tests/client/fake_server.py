"""Fake server with known responses on a loopback port, and fixtures for the tests that use it.

The tests use a real channel, but the server has no models.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
import skimage.data
import trustme
from google.protobuf import struct_pb2
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer, add_HealthServicer_to_server
from numpy.typing import NDArray

import camserve
from camserve.images import MAX_MESSAGE_BYTES
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceServicer, add_ExplainServiceServicer_to_server
from camserve_server.service.load_reports.orca_pb2 import LoadReport
from camserve_server.service.load_reports.reports import SERVICE

# Timeout of every wait for an event, in seconds. Tests reach it only if they fail.
WAIT_S = 60.0

RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
LABELS = {7: "cock", 8: "hen", 281: "tabby, cat"}


def tensor(array: NDArray[np.float32]) -> pb.Tensor:
    return pb.Tensor(shape=array.shape, data=array.astype("<f4").tobytes())


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def prediction(index: int) -> pb.Prediction:
    return pb.Prediction(index=index, label=LABELS.get(index, ""), probability=0.75, logit=4.5)


class Servicer(ExplainServiceServicer):
    """Implementation of the service whose saliency map is a ramp.

    Requests for the model "slow" do not return before they are cancelled.

    Attributes:
        requests: All requests so far.
        metadata: Metadata of the last request.
        receipt_overrides: Fields of the receipts that differ from their usual values.
        saliency: The map of all explanations.
        before: Function that runs before each response. It may abort the call.
        started: Event that is set when a request for the model "slow" arrives.
        cancelled: Event that is set when a request for the model "slow" is cancelled.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.receipt_overrides: dict[str, Any] = {}
        self.saliency: NDArray[np.float32] = RAMP
        self.before: Callable[[grpc.ServicerContext], None] = lambda context: None
        self.started = threading.Event()
        self.cancelled = threading.Event()

    def _received(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.before(context)
        if getattr(request, "model", "") == "slow":
            if not context.add_callback(self.cancelled.set):
                self.cancelled.set()  # The call was cancelled before it arrived here.
            self.started.set()
            self.cancelled.wait(WAIT_S)

    def _map(self, target: pb.Target, metrics: Any, raw: bool = False) -> pb.SaliencyMap:
        index = {label: i for i, label in LABELS.items()}.get(target.label, target.index)
        scores = [pb.Score(metric=m.name, value=0.25, unit="%" if m.name == "average-gain" else "1") for m in metrics]
        for score in scores:
            if score.metric == "insertion":
                score.curve.extend([0.0, 0.25, 0.5])
        answer = pb.SaliencyMap(target=prediction(index), saliency=tensor(self.saliency), scores=scores, share=1)
        if raw:
            answer.raw.CopyFrom(tensor(RAMP[:2, :3] * 10))
        return answer

    def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        self._received(request, context)
        most_probable = [pb.Target(index=index) for index in (281, 8, 7)]
        targets = list(request.targets) or most_probable[: request.target_top_k or 1]
        answer = pb.ExplainResponse(
            request_id=request.request_id or "given",
            maps=[self._map(target, request.metrics, request.raw) for target in targets],
            predictions=[prediction(281), prediction(8)][: request.top_k],
            cost=pb.Cost(rows=12, batches=3, queue_ms=1.5, compute_ms=20.25),
        )
        receipt: dict[str, Any] = {
            "request_id": answer.request_id,
            "model": request.model or "first",
            "model_digest": "sha256:0",
            "method": request.method.name,
            "parameters": request.method.parameters,
            "layers": request.method.layers,
            "targets": [each.target.index for each in answer.maps],
            "seed": request.method.seed,
            "precision": "fp32",
            "device": "cpu",
            "batch_sizes": request.batch_sizes or {"score": 16},
            "preprocessing": "squash 8x8",
            "versions": {"camserve": "0", "torch": "2"},
            "budget": request.budget,
            "input_digest": digest(request.image.SerializeToString()),
            "map_digests": [digest(each.saliency.data) for each in answer.maps],
        }
        answer.receipt.CopyFrom(pb.Receipt(**receipt | self.receipt_overrides))
        if request.budget:
            answer.maps[0].share = 0.25
        answer.maps[0].warnings.append("degenerate: the map is a ramp")
        return answer

    def ExplainStream(self, request: pb.ExplainStreamRequest, context: Any) -> Iterator[pb.ExplainStreamResponse]:
        if not request.heartbeats_only:
            yield pb.ExplainStreamResponse(progress=pb.Progress(rows_done=0, rows_total=20, stage="explain"))
        answer = self.Explain(request.request, context)
        if request.heartbeats_only:
            yield pb.ExplainStreamResponse(progress=pb.Progress(rows_done=6, rows_total=12, stage="explain"))
            yield pb.ExplainStreamResponse(result=answer)
            return
        for index, layer in enumerate(["deep", "shallow"]):
            saliency = [tensor(RAMP * np.float32((index + 1) / 2))] * len(answer.maps)
            yield pb.ExplainStreamResponse(level=pb.Level(index=index, count=2, layer=layer, saliency=saliency))
        yield pb.ExplainStreamResponse(progress=pb.Progress(rows_done=12, rows_total=12, stage="explain"))
        yield pb.ExplainStreamResponse()  # An event that this version of the client does not know.
        yield pb.ExplainStreamResponse(result=answer)

    def Evaluate(self, request: pb.EvaluateRequest, context: Any) -> pb.EvaluateResponse:
        self._received(request, context)
        return pb.EvaluateResponse(
            request_id="given",
            map=self._map(request.target, request.metrics),
            cost=pb.Cost(rows=9),
            receipt=pb.Receipt(model="first", method=request.method.name),
        )

    def EvaluateStream(self, request: pb.EvaluateStreamRequest, context: Any) -> Iterator[pb.EvaluateStreamResponse]:
        if request.heartbeats_only:
            yield pb.EvaluateStreamResponse(result=self.Evaluate(request.request, context))
            return
        yield pb.EvaluateStreamResponse(progress=pb.Progress(rows_done=1, rows_total=9, stage="insertion"))
        step = pb.Randomised(
            order="independent", index=1, count=3, layers=["fc", "conv"], target=7, spearman=0.5, hog=-1
        )
        step.saliency.CopyFrom(tensor(self.saliency))
        yield pb.EvaluateStreamResponse(randomised=step)
        yield pb.EvaluateStreamResponse(result=self.Evaluate(request.request, context))

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._received(request, context)
        shallow = pb.Layer(name="shallow", channels=2, height=4, width=6, prefix_tokens=1)
        deep = pb.Layer(name="deep[1]", channels=4, height=2, width=3)
        model = pb.Model(
            name="first",
            source="embedded:first",
            digest="sha256:0",
            state="ready",
            input_size=[8, 9],
            classes=3,
            labels=["a", "b", "c"],
            layers=[shallow, deep],
            layer=deep.name,
            batch_sizes={"score": 16},
            methods=["opti-cam"],
            input_channels=3,
            head="softmax",
            unavailable={"gradient": "RuntimeError: no gradients"},
            warnings=["camserve runs it with batch size 1"],
            named_layers=[pb.Layer(name="stem", channels=2048, height=8, width=9, signed=True), shallow, deep],
        )
        return pb.ListModelsResponse(models=[model])

    def ListMethods(self, request: pb.ListMethodsRequest, context: Any) -> pb.ListMethodsResponse:
        self._received(request, context)
        steps = pb.Parameter(
            name="steps", type="integer", default=struct_pb2.Value(number_value=50), minimum=1, description="How many."
        )
        norm = pb.Parameter(
            name="norm", type="string", default=struct_pb2.Value(string_value="max"), choices=["max", "range"]
        )
        methods = [
            pb.Method(
                name="opti-cam",
                title="Opti-CAM",
                paper="arXiv:0",
                summary="A mask that is optimised.",
                layers="one",
                parameters=[steps, norm],
                rows=1101 if request.model else 0,
                rows_per_target=1050 if request.model else 0,
                anytime=True,
                seeded=True,
                equations="S = n( Σ_k A_k [k] )\nu = argmax F(x ⊙ S)",
                advice="Where time is plenty.",
            ),
            pb.Method(name="poly-cam", title="Poly-CAM", paper="arXiv:1", layers="many", unavailable="no such layers"),
            pb.Method(name="fake-cam", title="Fake-CAM", layers="none", needs="a class", rows=1, class_agnostic=True),
        ]
        return pb.ListMethodsResponse(methods=methods)

    def ListMetrics(self, request: pb.ListMetricsRequest, context: Any) -> pb.ListMetricsResponse:
        self._received(request, context)
        return pb.ListMetricsResponse(
            metrics=[pb.Metric(name="insertion", title="Insertion", unit="1", higher_is_better=True, rows=100)]
        )


@pytest.fixture
def servicer() -> Servicer:
    """The service implementation of the server at `address`."""
    return Servicer()


class Health(HealthServicer):  # type: ignore[misc] # The package has no types.
    """Health service with one state for all services.

    The implementation of grpcio-health-checking can block forever on a watcher that has disconnected.
    """

    def __init__(self) -> None:
        self.state = HealthCheckResponse.SERVING

    def Check(self, request: object, context: grpc.ServicerContext) -> HealthCheckResponse:
        return HealthCheckResponse(status=self.state)

    def Watch(self, request: object, context: grpc.ServicerContext) -> Iterator[HealthCheckResponse]:
        sent = None
        while context.is_active():
            if self.state != sent:
                sent = self.state
                yield HealthCheckResponse(status=sent)
            time.sleep(0.02)


def _load_report(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    """Report once. Without the service, gRPC would write a line to stderr."""
    yield LoadReport(rps_fractional=1, application_utilization=1).SerializeToString()
    while context.is_active():
        time.sleep(0.02)


LOAD_REPORTS = grpc.method_handlers_generic_handler(
    SERVICE, {"StreamCoreMetrics": grpc.unary_stream_rpc_method_handler(_load_report)}
)


@contextmanager
def listening(
    servicer: Servicer,
    credentials: grpc.ServerCredentials | None = None,
    health: Health | None = None,
    port: int = 0,
) -> Iterator[str]:
    """Yield the address of a server with this servicer. Without a port, the kernel chooses one."""
    # Each watcher of the health service occupies a thread, and so does each reader of load reports.
    server = grpc.server(ThreadPoolExecutor(64), options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    add_ExplainServiceServicer_to_server(servicer, server)
    add_HealthServicer_to_server(health or Health(), server)
    server.add_generic_rpc_handlers((LOAD_REPORTS,))
    address = f"127.0.0.1:{port}"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        servicer.cancelled.set()
        server.stop(None).wait()


@pytest.fixture
def address(servicer: Servicer) -> Iterator[str]:
    """Address of a running fake server."""
    with listening(servicer) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[camserve.Client]:
    """Client of the fake server."""
    with camserve.Client(address, timeout=WAIT_S) as client:
        yield client


@pytest.fixture
def ramp() -> NDArray[np.float32]:
    """The map of all explanations, float32 [8, 8]."""
    return RAMP


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    """uint8 [6, 4, 3]. All pixels are different."""
    return np.arange(72, dtype=np.uint8).reshape(6, 4, 3) * np.uint8(3)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Path of a photograph of a cat."""
    path = tmp_path / "cat.jpg"
    PIL.Image.fromarray(skimage.data.chelsea()).save(path)
    return path


@pytest.fixture
def other_photo(tmp_path: Path) -> Path:
    """Path of a photograph of a cup, in the same folder."""
    path = tmp_path / "cup.jpg"
    PIL.Image.fromarray(skimage.data.coffee()).save(path)
    return path


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Certificate authority."""
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA) -> tuple[bytes, bytes]:
    """Private key and certificate chain of localhost in PEM format."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    return issued.private_key_pem.bytes(), b"".join(each.bytes() for each in issued.cert_chain_pems)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that no event announces. Fail after `WAIT_S` seconds."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.02)
