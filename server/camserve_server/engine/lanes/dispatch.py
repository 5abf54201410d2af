"""Runs one batch: makes its rows, pads it, hooks the layers, goes forward and, where asked, backward.

On a CPU, only the engine's thread may do arithmetic on tensors of any size. A second thread would get an OpenMP team of
its own, and with more threads than cores libgomp's waits go to sleep: a third of the speed is lost, for good.

A *work* is a question under way. It belongs to a lane: works of one lane can share a batch. Each lane runs one fixed
batch size, the last rows being padding, so that the arithmetic of a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from camserve_server.engine.lanes.ascend import Ascending, run_ascend
from camserve_server.engine.lanes.forward import Attending, Capturing, Predicting, Scoring, run_forward
from camserve_server.engine.lanes.gradient import Differentiating, run_gradient
from camserve_server.engine.lanes.work import Lane, Part, Work, arithmetic
from camserve_server.models.model import LaneKind, Model
from camserve_server.plan import Ablate, Ascend, Capture, CaptureAttention, Gradient, Predict, Query, Score, Sum

__all__ = ["Lane", "Part", "Work", "run", "start_work"]


def start_work(query: Query[Any], model: Model, sizes: Mapping[LaneKind, int], copy: int = 0) -> tuple[Lane, Work]:
    """The lane that answers the query, and the work that it means.

    `sizes` are the lanes' batch sizes; `copy` is the request that the model is a copy for, if it is one.
    """
    work: Work
    kind: LaneKind = "forward"
    match query:
        case Predict():
            work = Predicting(query, model)
        case Capture():
            work = Capturing(query, model)
        case CaptureAttention():
            work = Attending(query, model)
        case Score() | Ablate():
            work = Scoring(query, model)
        case Sum(query=Score() | Ablate() as scores):
            work = Scoring(scores, model, query)
        case Gradient():
            kind, work = "gradient", Differentiating(query, model)
        case Sum(query=Gradient() as gradients):
            kind, work = "gradient", Differentiating(gradients, model, query)
        case Ascend():
            kind, work = "ascend", Ascending(query, model)
        case _:
            raise TypeError(f"the engine does not know the query {type(query).__name__}")
    # Works that differentiate share a batch only if they look at the same layers.
    layers = work.layers if kind == "gradient" else ()
    bare = kind == "forward" and sizes[kind] == model.bare_size and not work.layers
    return Lane(model.lane, kind, sizes[kind], layers, copy, bare), work


_RUN: dict[LaneKind, Callable[[Model, Sequence[Part], int], None]] = {
    "forward": run_forward,
    "gradient": run_gradient,
    "ascend": run_ascend,
}


def run(model: Model, lane: Lane, parts: Sequence[Part], size: int) -> None:
    """Runs the parts as one batch of `size` rows, the last of them padding. Each work has its rows' share after."""
    with arithmetic(model):
        _RUN[lane.kind](model, parts, size)
