"""Queries that methods and metrics yield, and the values that plans exchange with the engine.

A *plan* is a generator that yields queries and returns its result. The engine runs plans. It answers each query with a
callable that returns the answer or raises inside the plan, at the line of the query:

    logits = yield from Predict(x)

Rules for plans:

- A plan uses no model, device or thread. It sends queries, and the engine runs the rows.
- The engine steps plans on its own thread, under `torch.no_grad()`. A plan does work on the host
  of more than about 10 ms through the query `OnHost`.
- A plan holds nothing open across a `yield`: no `with` block, no lock and no grad mode.
- A plan draws random numbers only from generators that it seeds itself (`camserve_server.rows.generator`).

Modules:

- `protocol`: `Query`, `Plan` and `Answer`, with the only bare `yield` of the project.
- `values`: inputs, results and the types that answers contain.
- `events`: events that a plan reports while it runs.
- `queries`: the queries.
"""

from camserve_server.plan.events import Level, MapWarning, PlanEvent, Randomised, Similarity, Stage
from camserve_server.plan.protocol import Answer, Plan, Query
from camserve_server.plan.queries import (
    Ablate,
    Ascend,
    Cached,
    Capture,
    CaptureAttention,
    ClassWeights,
    Gradient,
    OnHost,
    Predict,
    Randomise,
    ReleaseRows,
    Report,
    Score,
    Sum,
    WeightedLayers,
)
from camserve_server.plan.values import (
    INPUT,
    Ascent,
    AscentStep,
    Attentions,
    Box,
    Explainer,
    Gradients,
    Image,
    LeftOut,
    MetricResult,
    Resize,
    Rows,
    SaliencyMaps,
    Scores,
    Sums,
    Targets,
    Truth,
    as_row,
)

__all__ = [
    "INPUT",
    "Ablate",
    "Answer",
    "Ascend",
    "Ascent",
    "AscentStep",
    "Attentions",
    "Box",
    "Cached",
    "Capture",
    "CaptureAttention",
    "ClassWeights",
    "Explainer",
    "Gradient",
    "Gradients",
    "Image",
    "LeftOut",
    "Level",
    "MapWarning",
    "MetricResult",
    "OnHost",
    "Plan",
    "PlanEvent",
    "Predict",
    "Query",
    "Randomise",
    "Randomised",
    "ReleaseRows",
    "Report",
    "Resize",
    "Rows",
    "SaliencyMaps",
    "Score",
    "Scores",
    "Similarity",
    "Stage",
    "Sum",
    "Sums",
    "Targets",
    "Truth",
    "WeightedLayers",
    "as_row",
]
