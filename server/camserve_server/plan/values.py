"""Inputs and results of plans, and the values that answers contain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeVar

from camserve_server.plan.protocol import Plan

if TYPE_CHECKING:  # plans and methods can be imported without torch
    from torch import Tensor

C_contra = TypeVar("C_contra", bound="tuple[Tensor, ...]", contravariant=True)

INPUT = "<input>"
"""Layer name that stands for the model's input [3, H, W]."""

Resize = Callable[["Tensor", tuple[int, int]], "Tensor"]
"""Function of maps [..., h, w] and a size (H, W) that returns maps [..., H, W]."""

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels. Right and bottom are exclusive. An edge may lie between two pixels."""


# ---- inputs of plans -------------------------------------------------------------------------------------------------


class Rows(Protocol):
    """Recipe for N inputs of the model, each [3, H, W]."""

    def __len__(self) -> int:
        """Return the number N of rows."""
        ...

    def make(self, start: int, stop: int) -> Tensor:
        """Make some of the rows.

        The bits of a row must not depend on the slice that contains it.

        Args:
            start: Index of the first row, 0 ≤ start < stop.
            stop: Index after the last row, stop ≤ N.

        Returns:
            The rows [stop − start, 3, H, W], normalised, on the model's device.
        """
        ...


class AscentStep(Protocol[C_contra]):
    """Rows and objectives of an ascent, as functions of B variables at once.

    The engine computes ascents together whose steps are equal. A step is therefore hashable and keeps no tensors: a
    frozen dataclass of the options, defined at the top of a module. Everything that belongs to one variable is in the
    constants. Entry b of a result depends only on entry b of the arguments.

    A step reads no value of a tensor on the host, so that a GPU can record it.
    """

    def rows(self, u: Tensor, of: C_contra, /) -> Tensor:
        """Return the rows of the network's input, differentiable.

        Args:
            u: Variables [B, K].
            of: Constants of the variables, each [B, …].

        Returns:
            The rows [B, 3, H, W], normalised.
        """
        ...

    def objectives(self, y: Tensor, of: C_contra, /) -> Tensor:
        """Return the values [B] to maximise, differentiable.

        Args:
            y: Logits [B, classes] of the rows.
            of: Constants of the variables, each [B, …].
        """
        ...


@dataclass(frozen=True, eq=False)
class Image:
    """Preprocessed image: the model's input.

    Attributes:
        row: The normalised image as a row [1, 3, H, W] on the model's device, in the memory format of batches
            (`as_row`), so that it is copied faster. Reductions over this tensor could give other bits than `tensor`.
        mean: Mean [3, 1, 1] of the normalisation.
        std: Standard deviation [3, 1, 1] of the normalisation. `tensor * std + mean` are the pixels in [0, 1].
    """

    row: Tensor
    mean: Tensor
    std: Tensor

    @cached_property
    def tensor(self) -> Tensor:
        """The normalised image [3, H, W] in contiguous memory.

        It is made at the first use, because a request that waits for its first batch should not keep it twice.
        """
        return self.row[0].contiguous()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width (H, W) in pixels."""
        return (self.row.shape[-2], self.row.shape[-1])

    def with_tensor(self, tensor: Tensor) -> Image:
        """Return an image with the same normalisation.

        Args:
            tensor: Other normalised values [3, H, W] on the same device.
        """
        return replace(self, row=as_row(tensor))


def as_row(tensor: Tensor) -> Tensor:
    """Return a copy of an image in the memory format "channels last".

    Args:
        tensor: Image [3, H, W].

    Returns:
        The row [1, 3, H, W] with the same values.
    """
    if tensor.device.type != "cpu":
        return tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]
    channels, height, width = tensor.shape
    strides = (channels * height * width, 1, channels * width, channels)
    row = tensor.new_empty_strided((1, channels, height, width), strides)
    values = row.numpy()[0]
    for i, channel in enumerate(tensor.numpy()):  # NumPy takes less than half of the time of torch
        values[i] = channel
    return row


@dataclass(frozen=True, eq=False)
class Targets:
    """Classes to explain, with the model's output for the unmasked image.

    Attributes:
        index: T class indices.
        p: Probabilities p_c(x) [T] in [0, 1], float64.
        y: Logits y_c(x) [T], float64.
    """

    index: tuple[int, ...]
    p: Tensor
    y: Tensor

    def __len__(self) -> int:
        """Return the number T of targets."""
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Truth:
    """Ground truth: the location of the target in the model's input.

    Metrics of mass use the mask. Metrics of overlap use the boxes.

    Attributes:
        mask: Pixels of the target [H, W], bool, on the host.
        boxes: At least one box around the target.
    """

    mask: Tensor
    boxes: tuple[Box, ...]


@dataclass(frozen=True, eq=False)
class Explainer:
    """Method that made the map under evaluation, with its parameters. Metrics use it to explain another image.

    Attributes:
        plan: Function of an image that returns the plan of its map [H, W] in [0, 1].
        rows: Maximum number of rows of one such plan.
    """

    plan: Callable[[Image], Plan[Tensor]]
    rows: int

    def __call__(self, x: Image) -> Plan[Tensor]:
        """Return the plan that makes the map of another image for the same class.

        Args:
            x: The other image.

        Returns:
            The plan. Its result is a map [H, W] in [0, 1].
        """
        return self.plan(x)


# ---- results of plans ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """Channels that a tolerance left out of a sum S over channels.

    Attributes:
        layer: Name of the layer.
        channels: Number of channels left out.
        rows: Number of rows that this saved.
        error: Upper bound of the error of S for each target, as a fraction of the maximum of S.
    """

    layer: str
    channels: int
    rows: int
    error: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class SaliencyMaps:
    """Result of a method.

    Attributes:
        raw: Map of each target [T, h, w], unitless, at the resolution of the method.
        finish: Function that resizes the maps to the input's size and scales them to [0, 1]. None stands for
            `camserve_server.rows.resize_minmax`, the default of the papers.
        share: Completed share of the full sum, in [0, 1]. It is less than 1 only if a budget or a deadline cut the
            method short.
        left_out: Channels that were left out because they cannot change the map by more than the tolerance.
        zeroed: True [T] for the maps that the method has set to zero because they were rounding errors, and what the
            caller can change, for the warning.
    """

    raw: Tensor
    finish: Resize | None = None
    share: float = 1.0
    left_out: tuple[LeftOut, ...] = ()
    zeroed: tuple[Tensor, str] | None = None


@dataclass(frozen=True)
class MetricResult:
    """Result of a metric.

    Attributes:
        value: The value, in the unit of the metric.
        curve: Points of the curve that the value summarises. Empty if there is no curve.
    """

    value: float
    curve: tuple[float, ...] = ()


# ---- contents of answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scores:
    """Output of the model for N rows and T targets.

    Attributes:
        logits: Logits [N, T], float64.
        probabilities: Probabilities [N, T] in [0, 1], float64.
    """

    logits: Tensor
    probabilities: Tensor


@dataclass(frozen=True, eq=False)
class Gradients:
    """Activations and gradients of N rows, for each requested layer.

    Attributes:
        activations: Activations A [N, K, h, w] of each layer.
        gradients: Gradients ∂y_c/∂A [N, K, h, w] of each layer.
        rounding: Largest sum of their products over channels that counts as zero, relative to the sum of absolute
            products.
    """

    activations: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    rounding: float


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the rows of G groups.

    Attributes:
        total: Sum of each group [G, …].
        counts: Number of rows in each sum [G].
    """

    total: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Ascent:
    """Result of a gradient ascent over T variables.

    Attributes:
        u: Variables [T, K] after the last update.
        history: Value of the objective before each update, for each variable.
        ended: True for each variable whose ascent ended by itself, False where a budget or a deadline cut it short.
    """

    u: Tensor
    history: tuple[tuple[float, ...], ...]
    ended: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Attentions:
    """Attention of a transformer with L tokens.

    Attributes:
        blocks: Attention [heads, L, L] of each block. Each row is a distribution over the L tokens.
        prefix: Number of tokens at the start that do not belong to the image. The first one is the class token.
        grid: Height and width (h, w) of the grid of the other tokens, h·w = L − prefix.
    """

    blocks: tuple[Tensor, ...]
    prefix: int
    grid: tuple[int, int]
