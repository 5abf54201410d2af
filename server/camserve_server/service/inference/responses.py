"""Responses of ExplainService and models → responses of the Open Inference Protocol."""

from __future__ import annotations

import numpy as np

from camserve.v1 import explain_pb2 as explain
from camserve_server.models.model import Model
from camserve_server.open_inference import inference_pb2 as pb
from camserve_server.service.inference.requests import OUTPUTS, VERSION

TensorMetadata = pb.ModelMetadataResponse.TensorMetadata


def infer_response(request: pb.ModelInferRequest, explained: explain.ExplainResponse) -> pb.ModelInferResponse:
    """Return the response to ModelInfer.

    Args:
        request: The message of the caller, which names the outputs.
        explained: The response to the same request to Explain, with T maps [H, W] and M scores each.

    Returns:
        The outputs in the requested order: saliency FP32 [T, H, W], target INT64 [T], probability FP64 [T] and scores
        FP64 [T, M].
    """
    maps = explained.maps
    targets = [each.target for each in maps]
    scores = np.array([[score.value for score in each.scores] for each in maps], "<f8")
    outputs = {
        "saliency": ("FP32", [len(maps), *maps[0].saliency.shape], b"".join(each.saliency.data for each in maps)),
        "target": ("INT64", [len(maps)], np.array([each.index for each in targets], "<i8").tobytes()),
        "probability": ("FP64", [len(maps)], np.array([each.probability for each in targets], "<f8").tobytes()),
        "scores": ("FP64", scores.shape, scores.tobytes()),
    }
    response = pb.ModelInferResponse(model_name=explained.receipt.model, model_version=VERSION, id=explained.request_id)
    response.parameters["method"].string_param = explained.receipt.method
    response.parameters["metrics"].string_param = ",".join(score.metric for score in maps[0].scores)
    response.parameters["share"].double_param = maps[0].share
    response.parameters["cached"].bool_param = explained.cost.cached
    warnings = dict.fromkeys(warning for each in maps for warning in each.warnings)
    response.parameters["warnings"].string_param = "\n".join(warnings)
    for name in [each.name for each in request.outputs] or OUTPUTS:
        datatype, shape, data = outputs[name]
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(data)
    return response


def metadata(model: Model) -> pb.ModelMetadataResponse:
    """Return the description of a model."""
    channels, size = model.preprocessing.channels, model.preprocessing.size
    image = (
        TensorMetadata(name="image", datatype="UINT8", shape=[1, -1, -1, 3])
        if channels in (1, 3)
        else TensorMetadata(name="image", datatype="FP32", shape=[1, channels, *size])
    )
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[VERSION],
        platform="camserve",
        inputs=[image],
        outputs=[
            TensorMetadata(name="saliency", datatype="FP32", shape=[-1, *size]),
            TensorMetadata(name="target", datatype="INT64", shape=[-1]),
            TensorMetadata(name="probability", datatype="FP64", shape=[-1]),
            TensorMetadata(name="scores", datatype="FP64", shape=[-1, -1]),
        ],
    )


def config(model: Model) -> pb.ModelConfig:
    """Return the description of a model in the form of Triton."""
    described = metadata(model)
    return pb.ModelConfig(
        name=described.name,
        platform=described.platform,
        input=[pb.ModelInput(name=each.name, data_type=_data_type(each), dims=each.shape) for each in described.inputs],
        output=[
            pb.ModelOutput(name=each.name, data_type=_data_type(each), dims=each.shape) for each in described.outputs
        ],
    )


def _data_type(tensor: pb.ModelMetadataResponse.TensorMetadata) -> pb.DataType.ValueType:
    return pb.DataType.Value(f"TYPE_{tensor.datatype}")
