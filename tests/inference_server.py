"""A server of the Open Inference Protocol for tests: a torch network behind gRPC on the loopback address."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import torch
from torch import Tensor, nn

from camserve_server.open_inference import inference_pb2 as pb
from camserve_server.open_inference.inference_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)
from tests.processes import LIMIT_S


@dataclass(eq=False)
class InferenceServer(GRPCInferenceServiceServicer):
    """Serves the model "net", and records what callers do.

    Attributes:
        network: [N, C, H, W] → logits.
        activations: Outputs of further modules that the server returns: name of the output → name of the module.
        shape: Shape of the input in the metadata, without the batch.
        batch: Batch dimension in the metadata.
        nhwc: Take images as [N, H, W, C].
        raw: Return the values in `raw_output_contents`.
        max_rows: Refuse larger batches.
        metadata: Fields of the metadata to replace.
        inputs, datatype, ready, version: Further properties of the model.
        failure: Status of all requests, if it is set.
        go_on: Requests wait until it is set.
        rows: Number of rows of each request.
        requested: Names of the outputs of each request.
        waiting: Set when a request waits for `go_on`.
        cancelled: Set when a caller has cancelled a request that waited.
        left_s: The remaining time of the latest request.
    """

    network: nn.Module
    activations: Mapping[str, str] = field(default_factory=dict)
    shape: tuple[int, int, int] = (3, -1, -1)
    batch: int = -1
    nhwc: bool = False
    raw: bool = True
    max_rows: int = 1000
    inputs: int = 1
    datatype: str = "FP32"
    ready: bool = True
    version: str = "1"
    failure: tuple[grpc.StatusCode, str] | None = None
    drop_logits: bool = False
    go_on: threading.Event = field(default_factory=threading.Event)
    rows: list[int] = field(default_factory=list)
    requested: list[tuple[str, ...]] = field(default_factory=list)
    waiting: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    left_s: float | None = None

    def __post_init__(self) -> None:
        self.go_on.set()

    def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="test")

    def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=True)

    def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self.ready and request.name == "net")

    def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        tensor = pb.ModelMetadataResponse.TensorMetadata
        shape = (*self.shape[1:], self.shape[0]) if self.nhwc else self.shape
        return pb.ModelMetadataResponse(
            name="net",
            versions=[self.version],
            platform="test",
            inputs=[
                tensor(name=f"in{i}", datatype=self.datatype, shape=[self.batch, *shape]) for i in range(self.inputs)
            ],
        )

    def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse()

    def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        [given] = request.inputs
        self.rows.append(given.shape[0])
        self.requested.append(tuple(each.name for each in request.outputs))
        self.left_s = context.time_remaining()
        if not self.go_on.is_set():
            ended = threading.Event()
            context.add_callback(ended.set)
            self.waiting.set()
            while not self.go_on.wait(0.01):
                if ended.is_set():
                    self.cancelled.set()
                    return pb.ModelInferResponse()
        if self.failure is not None:
            context.abort(*self.failure)
        if self.batch > 0 and given.shape[0] != self.batch:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"expected {self.batch} rows")
        if given.shape[0] > self.max_rows:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"at most {self.max_rows} rows\nsecond line")
        outputs = self._run(np.frombuffer(request.raw_input_contents[0], "<f4").reshape(given.shape))
        wanted = self.requested[-1] or tuple(outputs)
        tensor = pb.ModelInferResponse.InferOutputTensor
        response = pb.ModelInferResponse(model_name="net", model_version=self.version)
        for name in wanted:
            values = outputs[name].numpy()
            each = tensor(name=name, datatype="FP32", shape=values.shape)
            if self.raw:
                response.raw_output_contents.append(values.tobytes())
            else:
                each.contents.fp32_contents.extend(values.reshape(-1))
            response.outputs.append(each)
        return response

    def _run(self, values: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Tensor]:
        x = torch.from_numpy(values.copy())
        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, args, output: outputs.__setitem__(name, output.clone())

        modules = dict(self.network.named_modules())
        handles = [modules[each].register_forward_hook(keep(name)) for name, each in self.activations.items()]
        with torch.no_grad():
            y = self.network(x.permute(0, 3, 1, 2) if self.nhwc else x)
        for handle in handles:
            handle.remove()
        return outputs if self.drop_logits else {**outputs, "logits": y}


@contextmanager
def listening(servicer: InferenceServer, address: str = "127.0.0.1:0", credentials: Any = None) -> Iterator[str]:
    """Run a server, and yield its address."""
    server = grpc.server(
        futures.ThreadPoolExecutor(8),
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ],
    )
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    assert port
    server.start()
    try:
        yield f"localhost:{port}" if credentials else f"127.0.0.1:{port}"
    finally:
        servicer.go_on.set()
        server.stop(0).wait(LIMIT_S)
