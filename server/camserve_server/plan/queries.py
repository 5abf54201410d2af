"""Queries that a plan can yield. Each docstring says how many rows the query takes and what its answer is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from camserve_server.plan.events import PlanEvent
from camserve_server.plan.protocol import Plan, Query
from camserve_server.plan.values import Ascent, AscentStep, Attentions, Gradients, Image, Rows, Scores, Sums, Targets

if TYPE_CHECKING:  # plans and methods can be imported without torch
    from torch import Tensor

T = TypeVar("T")
C = TypeVar("C", bound="tuple[Tensor, ...]")


# ---- queries that take rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Predict(Query["Tensor"]):
    """One row. The answer is the logits [classes] of the image, float64.

    Attributes:
        x: The image.
    """

    x: Image


@dataclass(frozen=True, eq=False)
class Capture(Query["tuple[Tensor, ...]"]):
    """One row. The answer is the activations [K, h, w] of each layer for the image.

    Attributes:
        x: The image.
        layers: Names of the layers.
    """

    x: Image
    layers: Sequence[str]


@dataclass(frozen=True, eq=False)
class Score(Query[Scores]):
    """`len(rows)` rows. The answer is the model's output for each row and target.

    The number of rows does not depend on the number of targets: one forward pass scores all classes.

    Attributes:
        rows: The rows.
        c: The targets.
        min_rows: Minimum number of rows in the answer. If it is set, a budget or a deadline may cut the answer to the
            first n ≥ `min_rows` rows.
        stop: Function that the engine calls with the index of the first row and the scores of each finished batch.
            If it returns True, the query is answered and its other rows are not run.
    """

    rows: Rows
    c: Targets
    min_rows: int | None = None
    stop: Callable[[int, Scores], bool] | None = None


@dataclass(frozen=True, eq=False)
class Ablate(Query[Scores]):
    """`len(channels)` rows. The answer is the model's output with one channel of a layer set to zero in each row.

    Attributes:
        x: The image of all rows.
        c: The targets.
        layer: Name of the layer.
        channels: Index of the channel that is set to zero, for each row.
        min_rows: As for `Score`.
    """

    x: Image
    c: Targets
    layer: str
    channels: Sequence[int]
    min_rows: int | None = None


@dataclass(frozen=True, eq=False)
class Gradient(Query[Gradients]):
    """`len(rows)` rows, each with a forward and a backward pass. The answer is activations and gradients of the layers.

    Attributes:
        rows: The rows.
        index: Class index whose logit is differentiated, for each row.
        layers: Names of the layers. `INPUT` stands for the rows themselves.
        min_rows: As for `Score`.
    """

    rows: Rows
    index: Sequence[int]
    layers: Sequence[str]
    min_rows: int | None = None


@dataclass(frozen=True, eq=False)
class Sum(Query[Sums], Generic[T]):
    """The rows of another query. The answer is Σ_i `term(i, answer)` over the rows i ≡ g mod `groups`, for each g.

    The engine adds rows one by one in their order, as they finish. The sum therefore does not depend on the batches,
    and the engine keeps only the sum in memory.

    Attributes:
        query: The query whose rows are summed.
        term: Function of the index of a row and the answer for that row alone, [1, …], that returns its term.
        groups: Number G of groups.
    """

    query: Query[T]
    term: Callable[[int, T], Tensor]
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Ascend(Query[Ascent], Generic[C]):
    """T·`steps` rows, each with a forward and a backward pass. The answer is the result of a gradient ascent by Adam.

    The ascent maximises `step.objectives(y, constants)` over the variables, where y [T, classes] are the logits of
    the rows `step.rows(u, constants)`. One iteration follows the other, and the T variables advance side by side, also
    with those of other queries whose step is equal.

    Attributes:
        u0: Initial variables [T, K].
        step: Rows and objectives of variables.
        constants: Constants of the variables, each [T, …]: a tuple, or a named tuple, which `step` then receives.
        steps: Number of iterations.
        rate: Learning rate of Adam.
        stop: Function of the objective's values so far. If it returns True, the ascent of this variable ends before
            the update of the current step.
        stop_period: Number of steps from one call of `stop` to the next; the first call is at the first step. Each call
            waits for a GPU.
        min_rows: As for `Score`.
    """

    u0: Tensor
    step: AscentStep[C]
    constants: C
    steps: int
    rate: float
    stop: Callable[[Sequence[float]], bool] | None = None
    stop_period: int = 1
    min_rows: int | None = None


@dataclass(frozen=True, eq=False)
class CaptureAttention(Query[Attentions]):
    """One row. The answer is the attention of each block of a transformer for the image.

    Attributes:
        x: The image.
    """

    x: Image


@dataclass(frozen=True, eq=False)
class Cached(Query[T]):
    """`rows` rows at most. The answer is the result of `plan`, computed once for each key while one map is scored.

    Metrics share the rows of a curve or of a masked image by using the same key.

    Attributes:
        key: Key of the result.
        rows: Maximum number of rows of the plan.
        plan: Function that returns the plan. It is called only if the key has no result yet.
    """

    key: Hashable
    rows: int
    plan: Callable[[], Plan[T]]


# ---- queries without rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassWeights(Query["tuple[str, Tensor]"]):
    """No rows. The answer is the weights of a linear layer behind global average pooling.

    The answer contains the name of the layer that is pooled, and the weights [T, K] of the classes.

    Attributes:
        index: T class indices.
    """

    index: Sequence[int]


@dataclass(frozen=True)
class WeightedLayers(Query[tuple[str, ...]]):
    """No rows. The answer is the names of the layers that have their own weights, in the order of the forward pass."""


@dataclass(frozen=True)
class Randomise(Query[None]):
    """No rows. From this query on, a copy of the network with random layers answers the queries of the plan.

    An empty list of layers restores the original network and deletes the copy. If too many requests hold a copy, the
    plan waits until one of them is deleted.

    Attributes:
        layers: Names of the layers that get random weights. All other layers keep their weights.
        seed: Seed of the random weights.
    """

    layers: Sequence[str]
    seed: int = 0


@dataclass(frozen=True, eq=False)
class OnHost(Query[T]):
    """No rows. The answer is the result of a function that the engine calls on another thread.

    All requests wait while a plan computes on the engine's thread. A plan uses this query for work on the host that
    takes longer than about 10 ms, for example loops over pixels. The engine runs batches of other requests meanwhile.

    The function runs to its end even if the request is cancelled. Divide work of more than a few tenths of a second
    into several queries.

    Attributes:
        function: The function. It copies tensors of the device with `Tensor.cpu`. It runs without gradients, and torch
            uses one CPU core for it. If it raises an exception, the exception is raised inside the plan.
    """

    function: Callable[[], T]


@dataclass(frozen=True)
class ReleaseRows(Query[None]):
    """No rows. Tells the engine that the plan needs fewer rows than its method or metric announced.

    The scheduler and the progress of the request use the lower number.

    Attributes:
        rows: Number of announced rows that the plan does not need.
    """

    rows: int


@dataclass(frozen=True, eq=False)
class Report(Query[None]):
    """No rows. Sends an event to the caller of the request.

    Attributes:
        event: The event.
    """

    event: PlanEvent
