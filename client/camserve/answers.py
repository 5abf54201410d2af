"""The answers to requests, as Python sees them. Arrays are float32 copies that belong to the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from camserve import heatmaps, images, notebook, wire
from camserve.errors import InternalError
from camserve.receipt import Receipt, differences
from camserve.v1 import explain_pb2 as pb

__all__ = [
    "Cost",
    "Evaluation",
    "Explanation",
    "LeftOut",
    "Level",
    "Prediction",
    "Progress",
    "Randomised",
    "Replay",
    "SaliencyMap",
    "Score",
]

T = TypeVar("T")


# ---- maps and their scores ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A class and what the model thinks of it: `probability` in [0, 1], `label` empty where the model has no labels."""

    index: int
    label: str
    probability: float
    logit: float

    def __str__(self) -> str:
        return f"{self.label} ({self.index})" if self.label else f"class {self.index}"


class Score(float):
    """A metric's value: a float that knows its `unit` ("1" or "%") and, where it is taken from several, the `curve`.

    That is what an area lies under, the overlap at each threshold, or the similarity at each step, as the metric says.
    """

    unit: str
    curve: tuple[float, ...]

    def __new__(cls, value: float, unit: str = "1", curve: Sequence[float] = ()) -> Score:
        """`curve` holds its points, from the first to the last."""
        score = super().__new__(cls, value)
        score.unit, score.curve = unit, tuple(curve)
        return score


@dataclass(frozen=True)
class Cost:
    """What a request took: `rows` images seen by the model in `batches` device batches.

    `queue_ms` from arrival to the first batch, `compute_ms` from there to the answer, shared with others.
    """

    rows: int
    batches: int
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class LeftOut:
    """`channels` of a `layer` that a `tolerance` left out, which saved `rows`.

    `error` is how far the layer's sum S is off at most, at any position, in shares of the maximum of S.
    """

    layer: str
    channels: int
    rows: int
    error: float


@dataclass(frozen=True, eq=False, repr=False)
class SaliencyMap:
    """What speaks for one class: `saliency` float32 [H, W] in [0, 1], over the whole image.

    `raw` is the map at its own resolution, float32 [h, w], where it was asked for; `scores` are those asked for, by
    metric; `warnings` is what a reader of this map must know; `share` in [0, 1] is how much of the method's full sum
    was done, 1 unless a budget or a deadline cut it short; `left_out` is what a `tolerance` left out.
    """

    target: Prediction
    saliency: NDArray[np.float32]
    raw: NDArray[np.float32] | None
    scores: dict[str, Score]
    warnings: tuple[str, ...]
    share: float
    left_out: tuple[LeftOut, ...]
    _image: pb.Image

    @property
    def curves(self) -> dict[str, NDArray[np.float64]]:
        """The curves of those scores that have one, float64 [points], by metric."""
        return {metric: np.array(score.curve) for metric, score in self.scores.items() if score.curve}

    def image(self) -> PIL.Image.Image:
        """The image that was explained: RGB, upright, at its full resolution; a tensor scaled to [0, 255]."""
        return images.picture(self._image)

    def heatmap(self) -> PIL.Image.Image:
        """The map in colours, RGB, of the image's size."""
        return heatmaps.heatmap(self.saliency, self.image().size)

    def overlay(self, alpha: float = heatmaps.ALPHA) -> PIL.Image.Image:
        """The map over the image, RGB, of the image's size. Where the map is 0 the image shows as it is.

        `alpha` in [0, 1] is how much the colour covers where the map is 1. Raises ValueError outside that range.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], not {alpha}")
        return heatmaps.overlay(self.image(), self.saliency, alpha)

    def save(self, directory: str | Path, stem: str) -> tuple[Path, Path]:
        """Writes `stem`.npy (the map) and `stem`.png (the overlay), making the directory if need be; returns both."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        array, png = directory / f"{stem}.npy", directory / f"{stem}.png"
        np.save(array, self.saliency)
        self.overlay().save(png)
        return array, png

    def __repr__(self) -> str:
        height, width = self.saliency.shape
        return f"<{type(self).__name__} of {self.target}, p = {self.target.probability:.3f}, [{height}, {width}]>"


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(SaliencyMap):
    """The answer to `explain`. It is itself the map of the first target; `maps` holds those of all, in their order."""

    maps: tuple[SaliencyMap, ...]
    predictions: tuple[Prediction, ...]
    cost: Cost
    receipt: Receipt
    request_id: str

    def _repr_html_(self) -> str:
        return notebook.html(self.maps, self.receipt.model, self.receipt.method)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(SaliencyMap):
    """The answer to `evaluate`: the map that was scored, with its `scores` by metric."""

    cost: Cost
    receipt: Receipt
    request_id: str

    def _repr_html_(self) -> str:
        return notebook.html([self], self.receipt.model, self.receipt.method)


@dataclass(frozen=True, eq=False)
class Replay:
    """The answer to `replay`: whether all maps are the `same`, bit for bit, as those that the receipt is of.

    `explanation` holds the maps as they are now. `differences` holds what differs, as (then, now), from the entries of
    the receipt to those of the new one, such as "model_digest", "versions.torch" or "map_digests.281". Where
    "input_digest" is among them, the model saw another input: the image is another, or it was preprocessed in another
    way.
    """

    same: bool
    explanation: Explanation
    differences: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Progress:
    """How far a request is. `rows_total` may shrink as rows turn out not to be needed; `stage` is the work in hand."""

    rows_done: int
    rows_total: int
    stage: str


@dataclass(frozen=True, eq=False)
class Level:
    """A map on the way, from 0, the coarsest, to `count` − 1. `maps` are float32 [H, W] in [0, 1], one a target."""

    index: int
    count: int
    layer: str
    maps: tuple[NDArray[np.float32], ...] = field(repr=False)

    @property
    def saliency(self) -> NDArray[np.float32]:
        """The first target's map, float32 [H, W] in [0, 1]."""
        return self.maps[0]


@dataclass(frozen=True, eq=False)
class Randomised:
    """A map on the way of a metric of randomisation: by a network that has become a step more random.

    Step `index` of `count`, of the `layers` from the last one towards the input. With `order` "cascading", all those of
    earlier steps are random, too; with "independent" they are not. `saliency` float32 [H, W] in [0, 1] explains the
    class `target`; `spearman`, `ssim` and `hog` in [−1, 1] say how like the map of the network itself it is.
    """

    order: str
    index: int
    count: int
    layers: tuple[str, ...]
    target: int
    spearman: float
    ssim: float
    hog: float
    saliency: NDArray[np.float32] = field(repr=False)


# ---- from the wire --------------------------------------------------------------------------------------------------


def explanation(answer: pb.ExplainResponse, image: pb.Image) -> Explanation:
    """Raises InternalError for an answer without a map."""
    if not answer.maps:
        raise InternalError("the server answered without a saliency map", request_id=answer.request_id)
    maps = tuple(_map(each, image) for each in answer.maps)
    return Explanation(
        **vars(maps[0]),
        maps=maps,
        predictions=tuple(wire.read(Prediction, each) for each in answer.predictions),
        cost=wire.read(Cost, answer.cost),
        receipt=wire.read(Receipt, answer.receipt),
        request_id=answer.request_id,
    )


def evaluation(answer: pb.EvaluateResponse, image: pb.Image) -> Evaluation:
    """Raises InternalError for an answer without a map."""
    if not answer.HasField("map"):
        raise InternalError("the server answered without a saliency map", request_id=answer.request_id)
    return Evaluation(
        **vars(_map(answer.map, image)),
        cost=wire.read(Cost, answer.cost),
        receipt=wire.read(Receipt, answer.receipt),
        request_id=answer.request_id,
    )


def replay(receipt: Receipt, now: Explanation) -> Replay:
    """What became of the receipt's maps."""
    return Replay(
        same=now.receipt.map_digests == receipt.map_digests,
        explanation=now,
        differences=differences(receipt, now.receipt),
    )


def event(
    answer: pb.ExplainStreamResponse | pb.EvaluateStreamResponse, result: Callable[[Any], T]
) -> Progress | Level | Randomised | T | None:
    """One event of a stream, the last one read by `result`; None for a kind that this client does not know yet."""
    match answer.WhichOneof("event"):
        case "progress":
            return wire.read(Progress, answer.progress)
        case "level":
            level: pb.Level = answer.level  # type: ignore[union-attr] # only streams of `explain` have it
            return wire.read(Level, level, maps=tuple(images.from_wire(each) for each in level.saliency))
        case "randomised":
            randomised = answer.randomised
            return wire.read(Randomised, randomised, saliency=images.from_wire(randomised.saliency))
        case "result":
            return result(answer.result)
        case _:
            return None


def _map(answer: pb.SaliencyMap, image: pb.Image) -> SaliencyMap:
    return SaliencyMap(
        target=wire.read(Prediction, answer.target),
        saliency=images.from_wire(answer.saliency),
        raw=images.from_wire(answer.raw) if answer.HasField("raw") else None,
        scores={each.metric: Score(each.value, each.unit, each.curve) for each in answer.scores},
        warnings=tuple(answer.warnings),
        share=answer.share,
        left_out=tuple(wire.read(LeftOut, each) for each in answer.left_out),
        _image=image,
    )
