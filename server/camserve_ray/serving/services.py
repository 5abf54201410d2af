"""The RPCs that proxies pass on, and those of proxies themselves. Requests and responses stay encoded."""

from __future__ import annotations

from typing import NamedTuple

from grpc_health.v1 import health_pb2

from camserve.v1 import explain_pb2

# The name of the application and of its only deployment.
NAME = "camserve"
EXPLAIN = explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
# The stubs are not imported: see camserve_server.open_inference.
INFERENCE = "inference.GRPCInferenceService"
_INFERENCE_RPCS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelConfig",
)
# Metadata by which a replica recognises proxies.
SECRET = "camserve-replica-secret"


class Rpc(NamedTuple):
    """One RPC.

    Attributes:
        path: The path of gRPC, /SERVICE/NAME.
        streaming: True if there are several responses.
    """

    path: str
    streaming: bool

    @property
    def name(self) -> str:
        """The name without the service."""
        return self.path.rpartition("/")[2]


CHECK = Rpc(f"/{HEALTH}/Check", streaming=False)
WATCH = Rpc(f"/{HEALTH}/Watch", streaming=True)
# The only method of replicas that proxies call by means of Serve, while they pass on calls. No caller can call it.
HOLD = Rpc(f"/{HEALTH}/Hold", streaming=False)
# The RPCs that proxies pass on.
RPCS = (
    *(
        Rpc(f"/{EXPLAIN}/{rpc.name}", rpc.server_streaming)
        for rpc in explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].methods
    ),
    *(Rpc(f"/{INFERENCE}/{name}", streaming=False) for name in _INFERENCE_RPCS),
)
