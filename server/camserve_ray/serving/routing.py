"""Selection of the replica that gets a call."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class AnyNodeRouter(FIFOMixin, RequestRouter):
    """Selects the replica with fewer calls of two random ones, on any node.

    Serve's default router uses replicas on other nodes only if those on the proxy's node are full. Replicas of camserve
    are never full, because their engines refuse requests themselves.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return two random replicas, of which Serve takes the one with fewer calls."""
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
