"""A server on a loopback port that answers with known numbers: a real channel, without models."""

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

import camserve
from camserve.images import MAX_MESSAGE_BYTES
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceServicer, add_ExplainServiceServicer_to_server

RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
LABELS = {7: "cock", 8: "hen", 281: "tabby, cat"}


def tensor(array: np.ndarray) -> pb.Tensor:
    return pb.Tensor(shape=array.shape, data=array.astype("<f4").tobytes())


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def prediction(index: int) -> pb.Prediction:
    return pb.Prediction(index=index, label=LABELS.get(index, ""), probability=0.75, logit=4.5)


class Servicer(ExplainServiceServicer):
    """Explains with a ramp. `requests` holds what came in; `before` may abort; the model "slow" never answers.

    `now` changes what the receipts say, and `ramp` the map.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.now: dict[str, Any] = {}
        self.ramp = RAMP
        self.before: Callable[[grpc.ServicerContext], None] = lambda context: None
        self.started = threading.Event()
        self.cancelled = threading.Event()

    def _received(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.before(context)
        if getattr(request, "model", "") == "slow":
            if not context.add_callback(self.cancelled.set):
                self.cancelled.set()  # it had been cancelled before it got here
            self.started.set()
            self.cancelled.wait(20)

    def _map(self, target: pb.Target, metrics: Any, raw: bool = False) -> pb.SaliencyMap:
        index = {label: i for i, label in LABELS.items()}.get(target.label, target.index)
        scores = [pb.Score(metric=m.name, value=0.25, unit="%" if m.name == "average-gain" else "1") for m in metrics]
        for score in scores:
            if score.metric == "insertion":
                score.curve.extend([0.0, 0.25, 0.5])
        answer = pb.SaliencyMap(target=prediction(index), saliency=tensor(self.ramp), scores=scores, share=1)
        if raw:
            answer.raw.CopyFrom(tensor(RAMP[:2, :3] * 10))
        return answer

    def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        self._received(request, context)
        likeliest = [pb.Target(index=index) for index in (281, 8, 7)]
        targets = list(request.targets) or likeliest[: request.target_top_k or 1]
        answer = pb.ExplainResponse(
            request_id=request.request_id or "given",
            maps=[self._map(target, request.metrics, request.raw) for target in targets],
            predictions=[prediction(281), prediction(8)][: request.top_k],
            cost=pb.Cost(rows=12, batches=3, queue_ms=1.5, compute_ms=20.25),
        )
        receipt = {
            "request_id": answer.request_id,
            "model": request.model or "first",
            "model_digest": digest(b"weights"),
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
        answer.receipt.CopyFrom(pb.Receipt(**receipt | self.now))
        if request.budget:
            answer.maps[0].share = 0.25
        answer.maps[0].warnings.append("degenerate: the map is a ramp")
        return answer

    def ExplainStream(self, request: pb.ExplainStreamRequest, context: Any) -> Iterator[pb.ExplainStreamResponse]:
        yield pb.ExplainStreamResponse(progress=pb.Progress(rows_done=0, rows_total=20, stage="explain"))
        answer = self.Explain(request.request, context)
        for index, layer in enumerate(["deep", "shallow"]):
            saliency = [tensor(RAMP * (index + 1) / 2)] * len(answer.maps)
            yield pb.ExplainStreamResponse(level=pb.Level(index=index, count=2, layer=layer, saliency=saliency))
        yield pb.ExplainStreamResponse(progress=pb.Progress(rows_done=12, rows_total=12, stage="explain"))
        yield pb.ExplainStreamResponse()  # an event of a later contract
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
        yield pb.EvaluateStreamResponse(progress=pb.Progress(rows_done=1, rows_total=9, stage="insertion"))
        step = pb.Randomised(
            order="independent", index=1, count=3, layers=["fc", "conv"], target=7, spearman=0.5, hog=-1
        )
        step.saliency.CopyFrom(tensor(self.ramp))
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
    return Servicer()


class Health(HealthServicer):
    """The state of all services. grpcio's own may wait for ever for a watcher that has just left."""

    def __init__(self) -> None:
        self.state = HealthCheckResponse.SERVING

    def Check(self, request: object, context: grpc.ServicerContext) -> HealthCheckResponse:
        return HealthCheckResponse(status=self.state)

    def Watch(self, request: object, context: grpc.ServicerContext) -> Iterator[HealthCheckResponse]:
        told = None
        while context.is_active():
            if self.state != told:
                told = self.state
                yield HealthCheckResponse(status=told)
            time.sleep(0.02)


@contextmanager
def listening(
    servicer: Servicer,
    credentials: grpc.ServerCredentials | None = None,
    health: Health | None = None,
) -> Iterator[str]:
    """The address of a server that answers with the servicer."""
    # A watcher of health takes a thread.
    server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    add_ExplainServiceServicer_to_server(servicer, server)
    add_HealthServicer_to_server(health or Health(), server)
    anywhere = "127.0.0.1:0"
    port = server.add_secure_port(anywhere, credentials) if credentials else server.add_insecure_port(anywhere)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        servicer.cancelled.set()
        server.stop(None).wait()


@pytest.fixture
def address(servicer: Servicer) -> Iterator[str]:
    with listening(servicer) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[camserve.Client]:
    with camserve.Client(address, timeout=20) as client:
        yield client


@pytest.fixture
def ramp() -> np.ndarray:
    """The map that the server explains with, float32 [8, 8]."""
    return RAMP


@pytest.fixture
def pixels() -> np.ndarray:
    """uint8 [6, 4, 3], no two pixels alike."""
    return np.arange(72, dtype=np.uint8).reshape(6, 4, 3) * 3


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photograph in a file, "cat.jpg"."""
    path = tmp_path / "cat.jpg"
    PIL.Image.fromarray(skimage.data.chelsea()).save(path)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another one, beside the first."""
    path = tmp_path / "cup.jpg"
    PIL.Image.fromarray(skimage.data.coffee()).save(path)
    return path


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA) -> tuple[bytes, bytes]:
    """The key and the certificate, PEM, of the server and of its caller."""
    made = authority.issue_cert("127.0.0.1", "localhost")
    return made.private_key_pem.bytes(), b"".join(each.bytes() for each in made.cert_chain_pems)
