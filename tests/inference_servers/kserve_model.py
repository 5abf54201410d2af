"""KServe's gRPC server with one model. Arguments: weights and port.

`kserve.ModelServer` listens on all addresses, so this file puts its parts together for the loopback address.
"""

import asyncio
import sys

import grpc
import kserve
from kserve import InferOutput, InferRequest, InferResponse, ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from numpy_net import NumpyNet


class Net(kserve.Model):
    def __init__(self, weights: str) -> None:
        super().__init__("net")
        self.net = NumpyNet(weights)
        self.ready = True

    async def get_input_types(self) -> list[dict[str, object]]:
        return [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]

    async def get_output_types(self) -> list[dict[str, object]]:
        return [{"name": "logits", "datatype": "FP32", "shape": [-1, 7]}]

    async def predict(self, payload: InferRequest, *args: object) -> InferResponse:
        outputs = []
        for name, value in self.net(payload.inputs[0].as_numpy()).items():
            outputs.append(InferOutput(name, list(value.shape), "FP32"))
            outputs[-1].set_data_from_numpy(value, binary_data=True)
        return InferResponse(payload.id, "net", outputs)


async def serve(weights: str, port: str) -> None:
    models = ModelRepository()
    models.update(Net(weights))
    servicer = InferenceServicer(DataPlane(model_registry=models), ModelRepositoryExtension(models))
    server = grpc.aio.server(interceptors=(ExceptionToStatusInterceptor(),))
    add_GRPCInferenceServiceServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
