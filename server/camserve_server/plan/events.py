"""Events that a plan reports while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from camserve_server.plan.values import SaliencyMaps

if TYPE_CHECKING:  # plans and methods can be imported without torch
    from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """Start of a stage of the plan.

    Attributes:
        name: Name of the stage, for example "insertion".
    """

    name: str


@dataclass(frozen=True)
class MapWarning:
    """Warning about the map. The response contains it among the map's warnings.

    Attributes:
        text: The warning, for people.
    """

    text: str


@dataclass(frozen=True, eq=False)
class Level:
    """Intermediate maps of a method that goes from coarse to fine layers.

    Attributes:
        index: Index of the level, 0 for the coarsest.
        count: Number of levels.
        layer: Name of the layer that this level added.
        maps: The maps.
    """

    index: int
    count: int
    layer: str
    maps: SaliencyMaps


@dataclass(frozen=True)
class Similarity:
    """Similarity of two maps, each value in [−1, 1].

    Attributes:
        spearman: Rank correlation of the pixels.
        ssim: Structural similarity.
        hog: Correlation of the histograms of oriented gradients.
    """

    spearman: float
    ssim: float
    hog: float


@dataclass(frozen=True, eq=False)
class Randomised:
    """Map of a network after one step of model randomisation.

    Attributes:
        order: Order in which layers become random, "cascading" or "independent".
        index: Index of the step, from 0.
        count: Number of steps.
        layers: Names of the layers that this step made random.
        target: Class index of the map.
        similarity: Similarity to the map of the original network.
        saliency: The map [H, W] in [0, 1].
    """

    order: str
    index: int
    count: int
    layers: tuple[str, ...]
    target: int
    similarity: Similarity
    saliency: Tensor


PlanEvent = Level | Randomised | Stage | MapWarning
"""Any event that a plan can report."""
