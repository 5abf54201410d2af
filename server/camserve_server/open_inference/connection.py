"""Connection to one model of a server that implements the Open Inference Protocol."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from camserve_server.errors import CamserveError, Cancelled, Expired, RemoteFailed, Unavailable
from camserve_server.open_inference import inference_pb2 as pb
from camserve_server.open_inference.inference_pb2_grpc import GRPCInferenceServiceStub

# Longest time of a request while no batch runs, which is the case while the model is loaded.
DEFAULT_TIMEOUT_S = 60.0
RETRY_AFTER_S = 1.0
MAX_DETAILS = 300  # characters of a message of the server

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The default of two minutes would delay the reconnection to a restarted server.
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Finds servers that have disappeared during a request without a deadline. By default, servers refuse more than one
    # ping in five minutes.
    ("grpc.keepalive_time_ms", 310_000),
]


@dataclass(frozen=True)
class TensorInfo:
    """Name, datatype and shape of an input. A size that can vary is -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.datatype} {list(self.shape)}"


@dataclass(frozen=True, eq=False)
class Answer:
    """Outputs of a model for one batch.

    Attributes:
        version: Version of the model that computed them; empty if the server does not tell.
        outputs: Outputs of the datatype FP32 by name, in the order of the server.
        others: Outputs of other datatypes.
    """

    version: str
    outputs: dict[str, NDArray[np.float32]]
    others: tuple[TensorInfo, ...]


class RemoteModel:
    """One model of a server that implements the Open Inference Protocol.

    One thread sends requests; any thread may call `interrupt`.

    Args:
        address: HOST:PORT of the server.
        model: Name of the model.
        roots: Root certificates (PEM) that the certificate of the server must have. If None, the connection is in
            plaintext.
        proxy: Use the HTTP proxy of the environment, if there is one.

    Attributes:
        model: As above.
        name: Model and address, for messages.
    """

    def __init__(self, address: str, model: str, roots: bytes | None = None, *, proxy: bool = True) -> None:
        self.model = model
        self.name = f"{model} at {address}"
        options = [*_OPTIONS, ("grpc.enable_http_proxy", int(proxy))]
        if roots is None:
            channel = grpc.insecure_channel(address, options=options)
        else:
            channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options=options)
        self._stub = GRPCInferenceServiceStub(channel)
        self._lock = threading.Lock()
        self._call: grpc.Future[Any] | None = None
        self._interruption: CamserveError | None = None
        self._timeout_from = _default_timeout
        weakref.finalize(self, channel.close)

    def ready(self) -> bool:
        """Return True if the server and the model accept requests. Raises as `infer` does."""
        server = self._send(self._stub.ServerReady, pb.ServerReadyRequest()).ready
        return server and bool(self._send(self._stub.ModelReady, pb.ModelReadyRequest(name=self.model)).ready)

    def metadata(self) -> tuple[str, tuple[TensorInfo, ...]]:
        """Return the platform and the inputs of the model. Raises as `infer` does."""
        found = self._send(self._stub.ModelMetadata, pb.ModelMetadataRequest(name=self.model))
        return found.platform, tuple(TensorInfo(each.name, each.datatype, tuple(each.shape)) for each in found.inputs)

    def infer(self, name: str, rows: NDArray[np.float32], outputs: Sequence[str] = ()) -> Answer:
        """Run the model on one batch, in one request.

        Args:
            name: Name of the input.
            rows: Values of the input, in its layout.
            outputs: Names of the outputs to return; all of them if it is empty.

        Raises:
            Unavailable: The server cannot be reached or refuses the request for now.
            Expired: The deadline of the batch has passed.
            Cancelled: The server has cancelled the request.
            CamserveError: The error of `interrupt`.
            RemoteFailed: The server reports another error, or its answer is malformed.
        """
        request = pb.ModelInferRequest(
            model_name=self.model,
            inputs=[pb.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=rows.shape)],
            outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=each) for each in outputs],
            raw_input_contents=[rows.astype("<f4", copy=False).tobytes()],
        )
        return self._answer(self._send(self._stub.ModelInfer, request))

    # ---- the batch that runs -----------------------------------------------------------------------------------------

    def begin(self, deadline: float | None) -> None:
        """Let the requests that follow end at the deadline, a time on the clock of `time.monotonic()`, if there is one.

        Args:
            deadline: The time, or None for no limit.
        """
        with self._lock:
            self._interruption = None
            self._timeout_from = lambda: None if deadline is None else max(0.0, deadline - time.monotonic())

    def end(self) -> None:
        """Undo `begin` and `interrupt`."""
        with self._lock:
            self._interruption, self._timeout_from = None, _default_timeout

    def interrupt(self, error: CamserveError) -> None:
        """Cancel the running request and those that follow until `end`; they raise the error. Any thread may call it.

        Args:
            error: The reason.
        """
        with self._lock:
            self._interruption = error
            if self._call is not None:
                self._call.cancel()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _send(self, method: Any, request: Any) -> Any:
        with self._lock:
            if self._interruption is not None:
                raise self._interruption
            self._call = call = method.future(request, timeout=self._timeout_from())
        try:
            return call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            with self._lock:
                raise self._interruption or self._error(error) from None
        finally:
            with self._lock:
                self._call = None

    def _error(self, error: Exception) -> CamserveError:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.CANCELLED
        text = (error.details() or "") if isinstance(error, grpc.Call) else ""
        details = (text.strip().splitlines() or ["no message"])[0][:MAX_DETAILS]
        metadata = {"remote_code": code.name}
        match code:
            case grpc.StatusCode.UNAVAILABLE:
                return Unavailable(
                    f"the remote model {self.name} is unavailable: {details}",
                    metadata=metadata,
                    retry_after_s=RETRY_AFTER_S,
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return Expired(
                    f"the deadline passed while the remote model {self.name} computed; allow more time or request "
                    "fewer rows",
                    metadata=metadata,
                )
            case grpc.StatusCode.CANCELLED:
                return Cancelled(f"the server of the remote model {self.name} cancelled the request", metadata=metadata)
        return self._failed(f"reports {code.name}: {details}", code.name)

    def _failed(self, problem: str, code: str = "OK") -> RemoteFailed:
        return RemoteFailed(
            f"the remote model {self.name} {problem}; the log of its server may contain the cause",
            metadata={"remote_code": code},
        )

    def _answer(self, response: pb.ModelInferResponse) -> Answer:
        outputs: dict[str, NDArray[np.float32]] = {}
        others: list[TensorInfo] = []
        raw = [*response.raw_output_contents]
        if raw and len(raw) != len(response.outputs):
            raise self._failed(f"returns {len(response.outputs)} outputs and the values of {len(raw)}")
        for i, each in enumerate(response.outputs):
            shape = tuple(each.shape)
            if each.datatype != "FP32":
                others.append(TensorInfo(each.name, each.datatype, shape))
                continue
            values: NDArray[np.float32]
            if raw:
                # A copy, because torch needs memory that it may write to.
                values = np.array(np.frombuffer(raw[i][: len(raw[i]) // 4 * 4], "<f4"), np.float32)
            else:
                values = np.array(each.contents.fp32_contents, np.float32)
            if min(shape, default=0) < 0 or values.size != math.prod(shape):
                raise self._failed(f"returns {values.size} numbers for the output {each.name} {list(shape)}")
            outputs[each.name] = values.reshape(shape)
        return Answer(response.model_version, outputs, tuple(others))


def _default_timeout() -> float | None:
    return DEFAULT_TIMEOUT_S


def described(outputs: Mapping[str, NDArray[np.float32]], others: Sequence[TensorInfo] = ()) -> str:
    """Return the outputs of an answer as a text for errors."""
    found = [f"{name} FP32 {list(value.shape)}" for name, value in outputs.items()]
    return ", ".join([*found, *map(str, others)]) or "none"
