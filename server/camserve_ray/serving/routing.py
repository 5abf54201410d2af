"""The router that Serve creates in proxies. Serve copies the code of this module, so it has no state of its own."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from camserve_ray.serving.endpoints import Endpoint, learn


class EndpointRouter(FIFOMixin, RequestRouter):
    """Learns the endpoints of replicas, of whose changes Serve informs it.

    It selects replicas for `Hold` only: proxies select those for the calls of callers themselves.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over the running replicas."""
        super().update_replicas(replicas)
        learn(self, [Endpoint(**each.replica_metadata) for each in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return a random replica. Serve's default router would prefer those on the node of the proxy."""
        return [[random.choice(candidate_replicas)]] if candidate_replicas else []
