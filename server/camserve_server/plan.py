"""The vocabulary in which methods and metrics ask the model questions. The one file that owns the bottom `yield`.

A *plan* is a generator that yields queries and returns its result. It never touches the model, the device or a
thread: the engine answers each query with a callable, which gives the answer or raises, inside the plan, at the line
that asked:

    logits = yield from Predict(x)

A plan is stepped under `torch.no_grad()` on the engine's thread. It holds nothing open across a `yield`: no `with`,
no lock, no grad mode; its randomness comes from generators that it seeds itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

Answer = Callable[[], T]
Plan = Generator["Query[Any]", Answer[Any], T]

# Stands for the model's input [3, H, W] where a layer is named.
INPUT = "<input>"

# Maps [..., h, w] and a size (H, W) → maps [..., H, W].
Resize = Callable[["Tensor", tuple[int, int]], "Tensor"]


class Query(Generic[T]):
    """A question to the engine; `yield from` it to have the answer."""

    def __iter__(self) -> Generator[Query[Any], Answer[T], T]:
        answer = yield self
        return answer()


# ---- what plans speak of ---------------------------------------------------------------------------------------------


class Rows(Protocol):
    """N inputs of the model."""

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def make(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as [stop − start, 3, H, W], normalised."""
        ...


@dataclass(frozen=True, eq=False)
class Image:
    """The model's input.

    `tensor` [3, H, W] is normalised and lies on the model's device; `mean` and `std` [3, 1, 1] are those of the
    normalisation, so that `tensor * std + mean` are the pixels in [0, 1].
    """

    tensor: Tensor
    mean: Tensor
    std: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.tensor.shape[-2], self.tensor.shape[-1])


@dataclass(frozen=True, eq=False)
class Targets:
    """The classes to be explained, with what the model says of them on the unmasked image.

    `index` T class indices; `p` [T] probabilities p_c(x) in [0, 1], `y` [T] logits y_c(x), both float64.
    """

    index: tuple[int, ...]
    p: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class SaliencyMaps:
    """What a method returns: `raw` [T, h, w], a map for each target at the method's own resolution, unitless.

    `finish` brings them to the input's size and into [0, 1]; None stands for n(up(·)), the default of all papers.
    `share` in [0, 1] says how much of the full sum they hold: 1 unless a budget or a deadline cut it short. `left_out`
    is what was not asked for because it could not matter much.
    """

    raw: Tensor
    finish: Resize | None = None
    share: float = 1.0
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """`channels` of `layer`, and so `rows`, that were left out of a sum S for a tolerance.

    `error` has for each target how far S is off at most, in shares of the maximum of S.
    """

    layer: str
    channels: int
    rows: int
    error: tuple[float, ...]


# (left, top, right, bottom) in pixels, half-open; a side may lie between two pixels.
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Truth:
    """Where the target is in the model's input: `mask` [H, W] bool, on the host, and `boxes`, at least one.

    Metrics of mass look at the mask, those of overlap at the boxes.
    """

    mask: Tensor
    boxes: tuple[Box, ...]


@dataclass(frozen=True, eq=False)
class Remake:
    """`remake(x)` plans the map [H, W] in [0, 1] of another image, made as the one that is being scored.

    It takes at most so many `rows`.
    """

    plan: Callable[[Image], Plan[Tensor]]
    rows: int

    def __call__(self, x: Image) -> Plan[Tensor]:
        return self.plan(x)


@dataclass(frozen=True)
class Measured:
    """What a metric returns: its `value` and, where the value is taken from a curve, the curve's points."""

    value: float
    curve: tuple[float, ...] = ()


# ---- questions that cost rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Predict(Query["Tensor"]):
    """One row. Answer: the logits [classes] of the image, float64."""

    x: Image


@dataclass(frozen=True, eq=False)
class Capture(Query["tuple[Tensor, ...]"]):
    """One row. Answer: the activations [K, h, w] of each layer on the image."""

    x: Image
    layers: Sequence[str]


@dataclass(frozen=True, eq=False)
class Scores:
    """`logits` and `probabilities` [N, T], float64: of N rows, for the T targets asked about."""

    logits: Tensor
    probabilities: Tensor


@dataclass(frozen=True, eq=False)
class Score(Query[Scores]):
    """`len(rows)` rows. Answer: what the model says of the targets on each of them.

    Answered whatever the number of targets: a row costs one forward pass, not one a class. If `least` is given, it may
    be answered for the first n ≥ `least` rows only, where a budget or a deadline cuts the request short. And it is
    answered once `enough(start, scores)` is true, which is told of the rows from `start` on as they are done.
    """

    rows: Rows
    c: Targets
    least: int | None = None
    enough: Callable[[int, Scores], bool] | None = None


@dataclass(frozen=True, eq=False)
class Ablate(Query[Scores]):
    """`len(channels)` rows. Answer: what the model says of the targets with one channel of the layer set to zero.

    Row i is the image, and `channels[i]` the channel. `least` as in `Score`.
    """

    x: Image
    c: Targets
    layer: str
    channels: Sequence[int]
    least: int | None = None


@dataclass(frozen=True, eq=False)
class Gradients:
    """For each layer asked for: `activations` and `gradients` ∂y_c/∂A, both [N, K, h, w]."""

    activations: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Gradient(Query[Gradients]):
    """`len(rows)` rows, each forward and backward. Row i is differentiated for the class `index[i]`.

    `INPUT` among the layers stands for the rows themselves. `least` as in `Score`.
    """

    rows: Rows
    index: Sequence[int]
    layers: Sequence[str]
    least: int | None = None


@dataclass(frozen=True, eq=False)
class Summed:
    """`total` [G, …], the sum of each group, and `counts` [G], the rows that are in it."""

    total: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Sum(Query[Summed], Generic[T]):
    """The rows of `of`. Answer: Σ_i `term(i, answer)` over the rows i ≡ g mod `groups`, for each group g.

    `answer` is that of row i alone, [1, …]. Rows are added one by one in their order, as they are done, so the sum does
    not depend on the batches, and nothing but the sum is kept.
    """

    of: Query[T]
    term: Callable[[int, T], Tensor]
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Ascent:
    """`u` [T, K] after the last update; `history` the objective before each update, for each of the T.

    `ended` says which have come to their end, and were not cut short.
    """

    u: Tensor
    history: tuple[tuple[float, ...], ...]
    ended: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Ascend(Query[Ascent]):
    """T·`steps` rows, each forward and backward; one iteration after the other, the T variables side by side.

    Maximises `objective(t, y)` by Adam over `u0[t]` [K], where y [classes] are the logits of `row(u)` [3, H, W].
    Both callables are differentiated. `halt(history)` may end a variable's ascent before the update of the step it
    has just seen. `least` as in `Score`.
    """

    u0: Tensor
    row: Callable[[Tensor], Tensor]
    objective: Callable[[int, Tensor], Tensor]
    steps: int
    rate: float
    halt: Callable[[Sequence[float]], bool] | None = None
    least: int | None = None


@dataclass(frozen=True, eq=False)
class Attentions:
    """Of a transformer: the attention [heads, L, L] of each block, each row a distribution over the L tokens.

    The first `prefix` tokens are not of the image (the very first is the class token); the others are a `grid` (h, w).
    """

    blocks: tuple[Tensor, ...]
    prefix: int
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Attend(Query[Attentions]):
    """One row. Answer: what the tokens of the image attend to."""

    x: Image


# ---- what costs nothing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassWeights(Query["tuple[str, Tensor]"]):
    """Answer: the layer that global average pooling and one linear layer turn into logits, and its weights [T, K]."""

    index: Sequence[int]


@dataclass(frozen=True)
class WeightedLayers(Query[tuple[str, ...]]):
    """Answer: the names of the layers that have weights of their own, in the order in which they run."""


@dataclass(frozen=True)
class Randomise(Query[None]):
    """From here on, a copy of the network answers the plan's questions, in which just these layers are random.

    With no layers the network itself answers again, and the copy is gone. Where too many requests have a copy already,
    the plan waits for one of theirs.
    """

    layers: Sequence[str]
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Once(Query[T]):
    """Answer: the result of `plan`, of so many `rows`, run at most once for each `key` while one map is being scored.

    Metrics that look at the same curve or the same masked image share its rows.
    """

    key: Hashable
    rows: int
    plan: Callable[[], Plan[T]]


@dataclass(frozen=True)
class Spare(Query[None]):
    """So many of the rows that were announced will not be asked for; the scheduler and the progress take note."""

    rows: int


@dataclass(frozen=True, eq=False)
class Report(Query[None]):
    """Hands an event to whoever watches the request."""

    event: Level | Randomised | Stage | Remark


@dataclass(frozen=True)
class Stage:
    """What the plan works on from here on, such as "insertion"."""

    name: str


@dataclass(frozen=True)
class Remark:
    """What a reader of the result must know; it is returned among the map's warnings."""

    text: str


@dataclass(frozen=True, eq=False)
class Level:
    """A map on the way: level `index` of `count` from coarse to fine, made of `layer`."""

    index: int
    count: int
    layer: str
    maps: SaliencyMaps


@dataclass(frozen=True)
class Alike:
    """How alike two maps are, each in [−1, 1]: by rank correlation, local structure, oriented gradients."""

    spearman: float
    ssim: float
    hog: float


@dataclass(frozen=True, eq=False)
class Randomised:
    """The map `saliency` [H, W] in [0, 1] of the class `target`, by a network that has become a step more random.

    Step `index` of `count`, in which the `layers` lost their weights; `alike` compares it with the map of the network
    itself.
    """

    order: str
    index: int
    count: int
    layers: tuple[str, ...]
    target: int
    alike: Alike
    saliency: Tensor
