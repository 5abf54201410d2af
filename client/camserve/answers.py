"""Responses of the server as Python objects. All arrays are float32 copies that the caller may modify."""

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


# ---- maps and scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Class with the output of the model for it.

    Attributes:
        index: Class index, from 0.
        label: Class label. Empty if the model has no labels.
        probability: Softmax or sigmoid of the logit, in [0, 1].
        logit: Output of the model.
    """

    index: int
    label: str
    probability: float
    logit: float

    def __str__(self) -> str:
        return f"{self.label} ({self.index})" if self.label else f"class {self.index}"


class Score(float):
    """Value of a metric: a float with a unit and, for some metrics, a curve.

    Attributes:
        unit: "1" for a value without a unit, "%" for a percentage in [0, 100].
        curve: Values from which the score is computed, in order: the points of the curve whose area is the score, the
            overlap at each threshold, or the similarity at each step. Empty for other metrics.
    """

    unit: str
    curve: tuple[float, ...]

    def __new__(cls, value: float, unit: str = "1", curve: Sequence[float] = ()) -> Score:
        """Create a score with a unit and a curve."""
        score = super().__new__(cls, value)
        score.unit, score.curve = unit, tuple(curve)
        return score


@dataclass(frozen=True)
class Cost:
    """Work and time that a request took.

    Attributes:
        rows: Number of model inputs that were processed for the request.
        batches: Number of device batches that contained these rows.
        queue_ms: Milliseconds from the arrival of the request to its first batch.
        compute_ms: Milliseconds from the first batch to the response. Other requests may have shared the batches.
    """

    rows: int
    batches: int
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class LeftOut:
    """Channels of a layer that a method skipped because of its `tolerance`.

    Attributes:
        layer: Name of the layer.
        channels: Number of skipped channels.
        rows: Number of rows that were saved.
        error: Upper bound of the error of the layer's sum S at any position, as a fraction of the maximum of S.
    """

    layer: str
    channels: int
    rows: int
    error: float


@dataclass(frozen=True, eq=False, repr=False)
class SaliencyMap:
    """Saliency map of one class.

    Attributes:
        target: The explained class.
        saliency: The map, float32 [H, W] in [0, 1], at the model's input size. It covers the whole image.
        raw: The map at its original resolution, float32 [h, w]. None unless the request asked for it.
        scores: Scores of the requested metrics by name.
        warnings: Warnings about the map, such as "degenerate: the map is constant".
        share: Completed part of the method's full sum, in [0, 1]. It is less than 1 if a budget or a deadline stopped
            the method early.
        left_out: Channels that a `tolerance` skipped, for each layer.
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
        """The curves of all scores that have one, float64 [points], by metric."""
        return {metric: np.array(score.curve) for metric, score in self.scores.items() if score.curve}

    def image(self) -> PIL.Image.Image:
        """Return the explained image.

        Returns:
            Upright RGB image at its full resolution. The values of a tensor are scaled to [0, 255].
        """
        return images.to_pillow(self._image)

    def heatmap(self) -> PIL.Image.Image:
        """Return the map in colours as an RGB image of the size of the explained image."""
        return heatmaps.heatmap(self.saliency, self.image().size)

    def overlay(self, alpha: float = heatmaps.ALPHA) -> PIL.Image.Image:
        """Return the explained image with the coloured map on top.

        Args:
            alpha: Opacity of the colour where the map is 1, in [0, 1]. Where the map is 0, the image is unchanged.

        Returns:
            RGB image of the size of the explained image.

        Raises:
            ValueError: `alpha` is out of range.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; expected 0 to 1")
        return heatmaps.overlay(self.image(), self.saliency, alpha)

    def save(self, directory: str | Path, stem: str) -> tuple[Path, Path]:
        """Write the map to `stem`.npy and the overlay to `stem`.png.

        Args:
            directory: Directory of the files. It is created if it does not exist.
            stem: Name of the files without extension.

        Returns:
            Paths of the map and of the overlay.

        Raises:
            OSError: A file or directory cannot be written.
        """
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
    """Result of `explain`. The attributes inherited from `SaliencyMap` are those of the first target.

    Attributes:
        maps: Map of each target, in the order of the targets.
        predictions: Most probable classes, the most probable first.
        cost: Rows, batches and times of the request, metrics included.
        receipt: Receipt that reproduces the maps.
        request_id: Name of the request.
    """

    maps: tuple[SaliencyMap, ...]
    predictions: tuple[Prediction, ...]
    cost: Cost
    receipt: Receipt
    request_id: str

    def _repr_html_(self) -> str:
        return notebook.html(self.maps, self.receipt.model, self.receipt.method)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(SaliencyMap):
    """Result of `evaluate`: the map that was scored, with its scores.

    Attributes:
        cost: Rows, batches and times of the request.
        receipt: Receipt of the request. Its `method` is empty if the caller supplied the map.
        request_id: Name of the request.
    """

    cost: Cost
    receipt: Receipt
    request_id: str

    def _repr_html_(self) -> str:
        return notebook.html([self], self.receipt.model, self.receipt.method)


@dataclass(frozen=True, eq=False)
class Replay:
    """Result of `replay`: comparison of new maps with the maps of a receipt.

    Attributes:
        same: True if all maps are bitwise identical.
        explanation: Explanation with the new maps.
        differences: Entries that differ between the receipt and the new receipt, as (then, now) by name, such as
            "model_digest", "versions.torch" or "map_digests.281". The entry "input_digest" means that the model
            received another input: the image is different, or it was preprocessed differently.
    """

    same: bool
    explanation: Explanation
    differences: dict[str, tuple[Any, Any]]


# ---- events of a stream ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Progress of a request.

    Attributes:
        rows_done: Number of rows that are done.
        rows_total: Expected number of rows. It decreases if the method does not need all of them.
        stage: Current stage: "predict", "explain", or the name of a metric.
    """

    rows_done: int
    rows_total: int
    stage: str


@dataclass(frozen=True, eq=False)
class Level:
    """Intermediate maps of a coarse-to-fine method.

    Attributes:
        index: Number of the level, from 0 (the coarsest) to `count` − 1.
        count: Number of levels.
        layer: Name of the layer of this level.
        maps: Map of each target, float32 [H, W] in [0, 1].
    """

    index: int
    count: int
    layer: str
    maps: tuple[NDArray[np.float32], ...] = field(repr=False)

    @property
    def saliency(self) -> NDArray[np.float32]:
        """The map of the first target, float32 [H, W] in [0, 1]."""
        return self.maps[0]


@dataclass(frozen=True, eq=False)
class Randomised:
    """Map of one step of a randomisation metric, which replaces weights of the model by random values.

    Attributes:
        order: "cascading" if the layers of all earlier steps are also random; "independent" if they are not.
        index: Number of the step, from 0 to `count` − 1.
        count: Number of steps.
        layers: Layers that this step randomises. The steps proceed from the last layer to the first.
        target: Index of the explained class.
        spearman: Rank correlation with the map of the original model, in [−1, 1].
        ssim: Structural similarity to the map of the original model, in [−1, 1].
        hog: Correlation of the histograms of oriented gradients, in [−1, 1].
        saliency: The map of the randomised model, float32 [H, W] in [0, 1].
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


# ---- conversion of responses ----------------------------------------------------------------------------------------


def explanation(response: pb.ExplainResponse, image: pb.Image) -> Explanation:
    """Convert the response of `Explain`.

    Args:
        response: The response message.
        image: The image of the request.

    Returns:
        The explanation.

    Raises:
        InternalError: The response contains no map.
    """
    if not response.maps:
        raise InternalError("the response contains no saliency map", request_id=response.request_id)
    maps = tuple(_saliency_map(each, image) for each in response.maps)
    return Explanation(
        **vars(maps[0]),
        maps=maps,
        predictions=tuple(wire.to_dataclass(Prediction, each) for each in response.predictions),
        cost=wire.to_dataclass(Cost, response.cost),
        receipt=wire.to_dataclass(Receipt, response.receipt),
        request_id=response.request_id,
    )


def evaluation(response: pb.EvaluateResponse, image: pb.Image) -> Evaluation:
    """Convert the response of `Evaluate`.

    Args:
        response: The response message.
        image: The image of the request.

    Returns:
        The evaluation.

    Raises:
        InternalError: The response contains no map.
    """
    if not response.HasField("map"):
        raise InternalError("the response contains no saliency map", request_id=response.request_id)
    return Evaluation(
        **vars(_saliency_map(response.map, image)),
        cost=wire.to_dataclass(Cost, response.cost),
        receipt=wire.to_dataclass(Receipt, response.receipt),
        request_id=response.request_id,
    )


def replay(receipt: Receipt, now: Explanation) -> Replay:
    """Compare an explanation with an earlier receipt.

    Args:
        receipt: The earlier receipt.
        now: The new explanation.

    Returns:
        The comparison.
    """
    return Replay(
        same=now.receipt.map_digests == receipt.map_digests,
        explanation=now,
        differences=differences(receipt, now.receipt),
    )


def event(
    response: pb.ExplainStreamResponse | pb.EvaluateStreamResponse, parse_result: Callable[[Any], T]
) -> Progress | Level | Randomised | T | None:
    """Convert one event of a stream.

    Args:
        response: The response message.
        parse_result: Function that converts the last event.

    Returns:
        The event, or None for a kind of event that this version of the client does not know.
    """
    match response.WhichOneof("event"):
        case "progress":
            return wire.to_dataclass(Progress, response.progress)
        case "level":
            level: pb.Level = response.level  # type: ignore[union-attr] # Only ExplainStreamResponse has levels.
            return wire.to_dataclass(Level, level, maps=tuple(images.from_wire(each) for each in level.saliency))
        case "randomised":
            randomised = response.randomised
            return wire.to_dataclass(Randomised, randomised, saliency=images.from_wire(randomised.saliency))
        case "result":
            return parse_result(response.result)
        case _:
            return None


def _saliency_map(message: pb.SaliencyMap, image: pb.Image) -> SaliencyMap:
    return SaliencyMap(
        target=wire.to_dataclass(Prediction, message.target),
        saliency=images.from_wire(message.saliency),
        raw=images.from_wire(message.raw) if message.HasField("raw") else None,
        scores={each.metric: Score(each.value, each.unit, each.curve) for each in message.scores},
        warnings=tuple(message.warnings),
        share=message.share,
        left_out=tuple(wire.to_dataclass(LeftOut, each) for each in message.left_out),
        _image=image,
    )
