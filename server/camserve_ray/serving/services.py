"""The RPCs that proxies and replicas pass on. Requests and responses stay encoded."""

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
# Metadata that a proxy adds: the milliseconds until the caller's deadline. Serve itself does not pass the deadline on.
TIMEOUT_MS = "camserve-timeout-ms"
# Trailing metadata that a replica adds to a status, because Serve itself also ends calls with errors.
FROM_REPLICA = "camserve-from-replica"


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
# The RPCs of replicas. Proxies implement Watch by means of Check.
RPCS = (
    *(
        Rpc(f"/{EXPLAIN}/{rpc.name}", rpc.server_streaming)
        for rpc in explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].methods
    ),
    *(Rpc(f"/{INFERENCE}/{name}", streaming=False) for name in _INFERENCE_RPCS),
    CHECK,
)
