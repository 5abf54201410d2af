"""Forward pass that OpenVINO runs on the CPU."""

from __future__ import annotations

import copy
import sys
import warnings
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from camserve_server.models.model import Model, Precision

__all__ = ["OpenVinoForward"]

_HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoForward:
    """Forward pass of a model, converted to OpenVINO with weights of its own.

    Only one thread may call it.

    Args:
        model: Model on a CPU, in fp32 or bf16.
        X: Example of the rows [N, C, H, W]. All calls have this shape.

    Attributes:
        version: Version of OpenVINO.

    Raises:
        ValueError: The device or the precision is not supported.
        Exception: OpenVINO cannot convert the network.
    """

    def __init__(self, model: Model, X: Tensor) -> None:
        if model.device.type != "cpu" or model.precision not in _HINTS:
            raise ValueError(
                f"OpenVINO runs networks on CPUs in fp32 and bf16, not on {model.device} in {model.precision}"
            )
        if model.device_name:  # the speeds of the copies differ, so that only some of them might use OpenVINO
            raise ValueError("OpenVINO is not used on one of several devices, because all must give the same bits")
        # Without this, the import would send usage statistics to the internet.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        network, example = copy.deepcopy(model.module).float(), X.float().contiguous()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about shapes, which are constant here, and about the function
            trace: Any = torch.jit.trace
            traced = trace(network, example, strict=False, check_trace=False)
        decoder = TorchScriptPythonDecoder(traced)  # the reader does not keep it
        reader = FrontEndManager().load_by_framework("pytorch")
        converted = reader.convert(reader.load(decoder))
        converted.reshape([*example.shape])
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[model.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # other processes may use the same cores
        }
        self._request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()
        self.version = metadata.version("openvino")

    def __call__(self, X: Tensor) -> Tensor:
        """Return the logits [N, classes] of X [N, C, H, W]."""
        answers = self._request.infer([X.float().contiguous().numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(answers[0]).to(X.dtype, copy=True)  # the next call overwrites the answers
