"""A loaded model: its frozen network on one device, its layers, labels and precisions."""

from __future__ import annotations

import difflib
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from camserve_server.errors import InvalidArgument, Unservable
from camserve_server.models.heads import Head
from camserve_server.models.layers import GapHead, Grid, Layer, calls_of, find_layer
from camserve_server.models.pixels import Preprocessing
from camserve_server.models.remote import RemoteNetwork
from camserve_server.models.throughput import Throughput
from camserve_server.plan import Image, as_row

Passes = Literal["forward", "gradient", "ascend"]
LaneKind = Literal[Passes, "forward-small", "gradient-small"]
# The lanes with small batches, for queries with few rows, by their passes.
SMALL_KINDS: Mapping[Passes, LaneKind] = {"forward": "forward-small", "gradient": "gradient-small"}
PASSES: Mapping[LaneKind, Passes] = {
    "forward": "forward",
    "gradient": "gradient",
    "ascend": "ascend",
    "forward-small": "forward",
    "gradient-small": "gradient",
}
Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp64"]


@dataclass(eq=False)
class Model:
    """A model at one precision.

    Attributes:
        name: Name in the configuration.
        source: Source in the configuration, such as "torchvision:resnet50".
        digest: SHA-256 of the weights (`load.state_digest`).
        code: SHA-256 of the code of the network (`factories.code_digest`), for the result cache.
        module: Network in evaluation mode, from [N, C, H, W] to logits [N, classes]; its parameters need no gradient.
        device: Device of the network.
        device_name: Name of the device, if the server has several.
        devices: Names of all devices that have a copy of this model, if the server has several.
        dtype: Data type that plans compute with.
        preprocessing: Conversion of images to the network's input.
        labels: Label of each class; empty if there are none.
        classes: Number of classes.
        spatial: All layers that can be named, in the order of the forward pass.
        layers: Default layers of methods that use several, from fine to coarse.
        layer: Default layer of methods that use one.
        no_layer: Reason why there is no default layer: the end of a sentence such as "m cannot serve cam: it …".
        head: Function that turns logits into probabilities.
        gap: Linear head behind global average pooling, if the network has one.
        attention: Names of the global self-attention modules. The input of each has `attention_prefix` tokens (the
            class token comes first) and then the tokens of `attention_grid`.
        attention_prefix: Number of tokens before those of the grid.
        attention_grid: Grid (h, w) of the other tokens.
        folded: Names of the convolutions that also compute the batch norm after them, with the name of that batch norm.
            These convolutions are not layers.
        aliases: Further names of modules that the network contains several times, with the name that their layers have.
        binary: True if the network has one logit y. It then has two classes with the logits y and −y.
        channels_last: True if weights and batches have the memory format "channels last".
        one_row: True if a batch must contain one row only.
        warnings: Sentences about how the network is served.
        unavailable: Passes that the network cannot run, with the reason, set at warm-up.
        random_weights: True if the configuration allows random weights and names none.
        precision: Precision of the network's arithmetic.
        others: The same model at other precisions.
        serial: Number that differs each time a model is loaded.
        batch_sizes: Batch size of each kind of lane in rows, set at warm-up. A kind of `SMALL_KINDS` is missing if
            there is no such lane.
        equal_sizes: Batch sizes that give the same bits as `batch_sizes` for each kind of passes, ascending, set at
            warm-up; empty for kinds that were not compared.
        linear_layers: Names of the linear layers whose input is one vector per image, set at warm-up.
        throughput: Throughput of each kind of lane, first observed at warm-up.
        compile: True if torch.compile is used, provided that it works for this network.
        openvino: True if the configuration requests OpenVINO.
        fast_forward: Faster forward pass for batches of `fast_forward_size` rows without hooks, set at warm-up if there
            is one.
        compiled: True if torch.compile has compiled `fast_forward`.
        fast_forward_size: Number of rows of the batches that `fast_forward` runs.
        ascents: What lanes of the kind "ascend" keep from batch to batch (`AscentLanes`); None if they keep nothing.
    """

    name: str
    source: str
    digest: str
    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    classes: int
    spatial: dict[str, Layer]
    layers: tuple[Layer, ...]
    layer: Layer | None
    head: Head
    gap: GapHead | None = None
    attention: tuple[str, ...] = ()
    attention_prefix: int = 0
    attention_grid: Grid | None = None
    folded: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    binary: bool = False
    channels_last: bool = True
    one_row: bool = False
    unavailable: dict[Passes, str] = field(default_factory=dict)
    random_weights: bool = False
    code: str = ""
    no_layer: str = "it has no layer with a spatial output"
    warnings: tuple[str, ...] = ()
    precision: Precision = "fp32"
    others: Mapping[Precision, Model] = field(default_factory=dict)
    serial: int = field(default_factory=itertools.count(1).__next__)
    batch_sizes: dict[LaneKind, int] = field(default_factory=dict)
    equal_sizes: dict[Passes, tuple[int, ...]] = field(default_factory=dict)
    linear_layers: tuple[str, ...] = ()
    throughput: defaultdict[LaneKind, Throughput] = field(default_factory=lambda: defaultdict(Throughput))
    compile: bool = False
    openvino: bool = False
    device_name: str = ""
    devices: tuple[str, ...] = ()
    fast_forward: Callable[[Tensor], Tensor] | None = None
    fast_forward_size: int = 0
    compiled: bool = False
    ascents: object = field(init=False, default=None)  # a model that is made from this one has its own

    @property
    def remote(self) -> RemoteNetwork | None:
        """The network, if another server runs it."""
        return self.module if isinstance(self.module, RemoteNetwork) else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type of the network's weights and activations; plans compute with `dtype`."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, self.dtype)

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of batches."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def lane_key(self) -> str:
        """Key that separates the lanes of this model from those of other models, precisions and loads."""
        return f"{self.name} in {self.precision}, load {self.serial}"

    @property
    def weight_bytes(self) -> int:
        """Size of the weights at all precisions, in bytes. Precisions with the same type of weights share a network."""
        networks = dict.fromkeys(model.module for model in self.precisions.values())
        return sum(
            value.numel() * value.element_size() for module in networks for value in module.state_dict().values()
        )

    @property
    def precisions(self) -> Mapping[str, Model]:
        """The model at each of its precisions, itself first."""
        return dict[str, Model]([(self.precision, self), *self.others.items()])

    def at(self, precision: str) -> Model:
        """Return the model at a precision.

        Args:
            precision: One of `precisions`; an empty string stands for the model's own.

        Raises:
            Unservable: The model is not loaded at this precision.
        """
        if not precision:
            return self
        if precision not in self.precisions:
            available = ", ".join(self.precisions)
            raise Unservable(
                f"{self.name} computes in {available}, not in {precision}; choose one of these or add it to the "
                "model's configuration",
                field="precision",
            )
        return self.precisions[precision]

    def with_module(self, module: nn.Module, **changes: Any) -> Model:
        """Return the same model with a copy of its network.

        Args:
            module: Copy of the network.
            **changes: Further attributes to replace.
        """
        none: dict[str, Any] = {"fast_forward": None, "fast_forward_size": 0, "compiled": False}
        return replace(self, module=module, **none, **changes)

    def image(self, tensor: Tensor) -> Image:
        """Return a preprocessed image [C, H, W] with its normalisation, on the model's device and in its `dtype`."""
        return self.image_of_row(as_row(tensor.to(self.dtype)))

    def image_of_row(self, row: Tensor) -> Image:
        """Return a preprocessed image [1, C, H, W] in the memory format of batches; it is copied only if necessary."""
        return Image(self._moved(row.to(self.dtype)), *self._columns)

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor]:
        mean, std = (self._moved(values.to(self.dtype)) for values in self.preprocessing.columns)
        return mean, std

    def _moved(self, values: Tensor) -> Tensor:
        """Copy to the device. From pinned memory, the copy does not wait for the batches that run there."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities [..., classes] of logits [..., classes], float64, so that 1 − p keeps its digits."""
        logits = logits.double()
        match self.head:
            case "softmax":
                return logits.softmax(dim=-1)
            case "sigmoid":
                return logits.sigmoid()
            case "probabilities":
                return logits

    def class_weights(self, index: Sequence[int]) -> tuple[str, Tensor]:
        """Return the layer name and the weights [T, K] of a linear head behind global average pooling.

        Args:
            index: T class indices.
        """
        assert self.gap is not None, "only models with a linear head receive a ClassWeights query"
        weight = self.gap.weight(self.module)
        weight = torch.cat([weight, -weight]) if self.binary else weight
        return self.gap.layer.name, weight[list(index)].to(self.dtype)

    def label(self, index: int) -> str:
        """Return the label of a class; an empty string if the model has no labels."""
        return self.labels[index] if self.labels else ""

    def find_class(self, target: int | str, field: str) -> int:
        """Return the index of a class.

        Args:
            target: Index or label. Labels are compared exactly first, then without regard to case.
            field: Name of the request field, for the error.

        Raises:
            InvalidArgument: The model has no such class, or several classes have this label.
        """
        if isinstance(target, int):
            if not 0 <= target < self.classes:
                raise InvalidArgument(
                    f"{self.name} has no class {target}; expected an index from 0 to {self.classes - 1}", field=field
                )
            return target
        if not self.labels:
            raise InvalidArgument(f"{self.name} has no labels; give the index of the class", field=field)
        name = target.strip()
        matches = [i for i, label in enumerate(self.labels) if label == name]
        matches = matches or [i for i, label in enumerate(self.labels) if label.casefold() == name.casefold()]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise InvalidArgument(
                f"{self.name} has several classes with the label {target!r}: {matches}; give the index of one",
                field=field,
            )
        raise InvalidArgument(f"{self.name} has no class {target!r}{_nearest(target, self.labels)}", field=field)

    def find_layers(self, names: Sequence[str], field: str) -> tuple[Layer, ...]:
        """Return the layers of the given names.

        Args:
            names: Names of layers.
            field: Name of the request field, for the error.

        Raises:
            InvalidArgument: A layer does not exist, has no spatial output, is folded, or is named twice.
        """
        layers: list[Layer] = []
        for i, name in enumerate(names):
            layer = find_layer(name, self.spatial, self.aliases)
            own = self.aliases.get(name, name)
            if own in self.folded:
                raise InvalidArgument(
                    f"{self.name} computes {name} in one step with {self.folded[own]}; name that layer instead, or "
                    "set fold_batch_norm = false in the model's configuration",
                    field=f"{field}[{i}]",
                )
            if layer is None:
                raise InvalidArgument(
                    f"{self.name} has {describe_missing_layer(name, self.spatial)}", field=f"{field}[{i}]"
                )
            if layer in layers:
                raise InvalidArgument(f"{layer.name} is named twice; name each layer once", field=f"{field}[{i}]")
            layers.append(layer)
        return tuple(layers)

    def default_layers(self, many: bool) -> tuple[Layer, ...]:
        """Return the model's default layers.

        Args:
            many: True for one layer at each resolution, from fine to coarse; False for a single layer.

        Raises:
            Unservable: The model has no such layer.
        """
        reason = self.why_no_default_layers(many)
        if reason:
            raise Unservable(f"{self.name} has no default layers: {reason}")
        return self.layers if many or self.layer is None else (self.layer,)

    def why_no_default_layers(self, many: bool) -> str:
        """Return the reason why `default_layers` raises an error, as the end of a sentence; empty if it does not."""
        if not many:
            return "" if self.layer else self.no_layer
        if self.layers or (self.layer is None and self.no_layer):
            return "" if self.layers else self.no_layer
        return "all information in the logits passes through none of its layers; name the layers in the request"


def describe_missing_layer(name: str, spatial: Mapping[str, Layer]) -> str:
    """Return "no layer …", with the reason and the names to use instead.

    Args:
        name: Name that is not a layer.
        spatial: Layers by name.
    """
    calls = calls_of(name, spatial)
    if calls:
        return f"no single layer {name!r}: it runs {len(calls)} times; name one call, such as {calls[-1]}"
    return f"no layer {name!r} whose output is spatial{_nearest(name, list(spatial))}"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; similar names: {', '.join(close)}" if close else ""
