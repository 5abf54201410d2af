"""The autoscaling policy. Serve's controller runs it, so this module imports nothing of camserve."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

# The name of the metric that replicas report.
ROWS_OWED = "rows_owed"


class RowsOwed:
    """Sets the number of replicas so that each owes at most a given number of rows on average.

    Serve limits the number to the configured range and waits before it removes replicas.

    Args:
        rows_per_replica: The rows that a replica may owe.
    """

    def __init__(self, rows_per_replica: int) -> None:
        self._rows_per_replica = rows_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the wanted number of replicas, and the state for the next call."""
        reported = (context.aggregated_metrics or {}).get(ROWS_OWED, {})
        if not reported:  # no replica has reported yet
            return context.target_num_replicas, {}
        return max(1, math.ceil(sum(reported.values()) / self._rows_per_replica)), {}
