"""Results of calls and events of streams. All arrays are float32 copies that the caller may modify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from camserve import heatmaps, images, notebook
from camserve.receipt import Receipt
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

# ---- maps and scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A class with its probability and logit.

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
        queue_ms: Milliseconds from the submission to the engine, after decoding, to the first batch.
        compute_ms: Milliseconds from the first batch to the result, before encoding. Other requests may have shared the
            batches.
        cached: True if the response comes from the result cache of the server. The other fields then describe the
            request that computed it.
    """

    rows: int
    batches: int
    queue_ms: float
    compute_ms: float
    cached: bool = False


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
