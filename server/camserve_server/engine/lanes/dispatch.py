"""Choice of the lane of a query, and the run of one batch.

A *lane* is a key: queries with the same lane can share a batch. Each lane has one fixed batch size, and incomplete
batches are filled with padding rows, so that the arithmetic of a row does not depend on the other rows.

A query with few rows has a lane with small batches. The number of its rows alone decides, not other requests.

On a CPU, only the engine's thread may have an OpenMP team (`torch_setup.threads.compute_alone`). With more threads than
cores, the waits of libgomp block in the kernel, and the process loses a third of its speed
(`docs/decisions/0009-one-thread-does-arithmetic.md`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointError

from camserve_server.engine.lanes.ascend import AscendQuery, run_ascend
from camserve_server.engine.lanes.forward import (
    CaptureAttentionQuery,
    CaptureQuery,
    PredictQuery,
    ScoreQuery,
    run_forward,
)
from camserve_server.engine.lanes.gradient import GradientQuery, run_gradient
from camserve_server.engine.lanes.lane_query import BatchSlice, Lane, LaneQuery
from camserve_server.errors import Unservable, describe
from camserve_server.models.model import SMALL_KINDS, LaneKind, Model, Passes
from camserve_server.plan import Ablate, Ascend, Capture, CaptureAttention, Gradient, Predict, Query, Score, Sum
from camserve_server.torch_setup.arithmetic import gpu_arithmetic

__all__ = ["BatchSlice", "Lane", "LaneQuery", "merged_sizes", "run_batch", "start_query"]


def merged_sizes(sizes: Mapping[LaneKind, int], requested: Mapping[LaneKind, int]) -> dict[LaneKind, int]:
    """Return batch sizes in which those of a request replace those of the model.

    A request that names the size of a lane, but not that of the small lane for the same passes, has no such small lane:
    the receipt that it replays comes from a server without one.

    Args:
        sizes: Batch size of each kind of lane of the model.
        requested: Batch sizes that the request names.
    """
    replaced = {SMALL_KINDS[kind] for kind in SMALL_KINDS if kind in requested}
    return {**{kind: size for kind, size in sizes.items() if kind not in replaced}, **requested}


def start_query(
    query: Query[Any], model: Model, sizes: Mapping[LaneKind, int], copy: int = 0, *, small_lanes: bool = True
) -> tuple[Lane, LaneQuery]:
    """Choose the lane of a query and prepare its run.

    Args:
        query: Query of a plan that costs rows.
        model: Network that answers it: the served model or a random copy.
        sizes: Batch size of each kind of lane, in rows. A small lane is used only if it has a size.
        copy: Job id of the request that owns the random copy; 0 for the served model.
        small_lanes: False to use no small lane, because batches have no padding rows.

    Returns:
        The lane and the query in progress.

    Raises:
        TypeError: The query is of no type that costs rows.
    """
    started: LaneQuery
    kind: Passes = "forward"
    match query:
        case Predict():
            started = PredictQuery(query, model)
        case Capture():
            started = CaptureQuery(query, model)
        case CaptureAttention():
            started = CaptureAttentionQuery(query, model)
        case Score() | Ablate():
            started = ScoreQuery(query, model)
        case Sum(query=Score() | Ablate() as scores):
            started = ScoreQuery(scores, model, query)
        case Gradient():
            kind, started = "gradient", GradientQuery(query, model)
        case Sum(query=Gradient() as gradients):
            kind, started = "gradient", GradientQuery(gradients, model, query)
        case Ascend():
            ascent = AscendQuery(query, model)
            return Lane(model.lane_key, "ascend", sizes["ascend"], copy=copy, ascent=ascent.lane_key), ascent
        case _:
            raise TypeError(
                f"the engine does not know the query {type(query).__name__}; expected one of camserve_server.plan"
            )
    # Gradient queries share a batch only if they differentiate the same layers.
    layers = started.layers if kind == "gradient" else ()
    small = SMALL_KINDS.get(kind) if small_lanes else None
    if small is not None and started.rows <= sizes.get(small, 0):
        return Lane(model.lane_key, small, sizes[small], layers, copy), started
    fast_forward = kind == "forward" and sizes[kind] == model.fast_forward_size and not started.layers
    # On a CPU, a smaller batch of the network is faster than a whole one of the fast forward pass.
    fast_forward &= model.device.type != "cpu" or started.rows >= sizes[kind]
    return Lane(model.lane_key, kind, sizes[kind], layers, copy, fast_forward), started


def run_batch(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
    """Run the slices as one batch and hand each query the results of its rows.

    Args:
        model: Network to run.
        lane: Lane of all the slices.
        slices: Rows of one or more queries.
        size: Number of rows of the batch; padding rows fill it up.
    """
    try:
        # Another server computes the rows of a remote model. Engines of this machine must not wait for it.
        with nullcontext() if model.remote else gpu_arithmetic(tf32=model.precision == "tf32"):
            match lane.passes:
                case "forward":
                    run_forward(model, slices, size, fast=lane.fast_forward)
                case "gradient":
                    run_gradient(model, slices, size)
                case "ascend":
                    run_ascend(model, lane, slices, size)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        # The warm-up found that the network cannot run these passes, or not for its default layer. Checkpoints without
        # reentrance cannot run if a layer inside of them is read.
        if lane.passes in model.unavailable or isinstance(error, CheckpointError):
            raise Unservable(
                f"{model.name} has no {lane.passes} passes for the requested layers: {describe(error)}; name other "
                "layers or choose a method without gradients",
                field="method.name",
            ) from error
        raise
