"""A model as the engine sees it: frozen, in evaluation mode, on one device, with its facts."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from camserve_server.errors import InvalidArgument, Unservable
from camserve_server.models.layers import GapHead, Grid, Layer, calls_of, find_layer
from camserve_server.models.pixels import Preprocessing
from camserve_server.plan import Image

Head = Literal["softmax", "sigmoid"]
LaneKind = Literal["forward", "gradient", "ascend"]
Precision = Literal["fp32", "tf32", "bf16", "fp64"]


@dataclass(eq=False)
class Model:
    """`module` maps [N, C, H, W] to logits [N, classes]; its parameters need no gradient.

    `layers` are the defaults of methods that look at several, fine to coarse; `layer` is that of those that look at
    one. `spatial` are all that can be named, in run order. `head` says how logits become probabilities. `gap` is there
    if the logits are a linear function of a layer's mean. `attention` names the global self-attention modules, of which
    the input has `attention_prefix` tokens, the class token first, and then `attention_grid`. `folded` names the
    convolutions that also compute the batch norm after them, and that batch norm: they cannot be named. `others` are
    the same model at other precisions. `serial` is another each time that it is loaded. `batch_sizes` and, where they
    were measured, `rows_per_s` are set at warm-up, one for each lane; so is `bare`, where there is a faster way forward
    than the module's for batches of `bare_size` rows in which nobody looks at a layer. `compile` asks for one.
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
    random_weights: bool = False
    precision: Precision = "fp32"
    others: Mapping[Precision, Model] = field(default_factory=dict)
    serial: int = field(default_factory=itertools.count(1).__next__)
    batch_sizes: dict[LaneKind, int] = field(default_factory=dict)
    rows_per_s: dict[LaneKind, float] = field(default_factory=dict)
    compile: bool = False
    fast_forward: Callable[[Tensor], Tensor] | None = None
    fast_forward_size: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network computes with; plans compute with `dtype`."""
        return torch.bfloat16 if self.precision == "bf16" else self.dtype

    @property
    def lane_key(self) -> str:
        """What sets its lanes apart from those of others."""
        return f"{self.name} in {self.precision}, load {self.serial}"

    @property
    def weight_bytes(self) -> int:
        """Of its weights at all its precisions."""
        return sum(
            value.numel() * value.element_size()
            for model in self.precisions.values()
            for value in model.module.state_dict().values()
        )

    @property
    def precisions(self) -> Mapping[str, Model]:
        """Itself and the others."""
        return dict[str, Model]([(self.precision, self), *self.others.items()])

    def at(self, precision: str) -> Model:
        """The same at another precision; itself for none. Raises Unservable if it is not loaded."""
        if not precision:
            return self
        if precision not in self.precisions:
            there = ", ".join(self.precisions)
            raise Unservable(
                f"{self.name} computes in {there}, not in {precision}; its configuration sets that", field="precision"
            )
        return self.precisions[precision]

    def with_module(self, module: nn.Module, **changes: Any) -> Model:
        """The same for a copy of its network, `changes` apart; the linear head's weights are those of the copy."""
        gap = self.gap
        if gap is not None:
            at = gap.weight.data_ptr()
            name = next(name for name, weight in self.module.named_parameters() if weight.data_ptr() == at)
            gap = replace(gap, weight=module.get_parameter(name).flatten(1))
        return replace(self, module=module, gap=gap, fast_forward=None, fast_forward_size=0, **changes)

    def image(self, tensor: Tensor) -> Image:
        """A preprocessed [C, H, W] on the model's device, in its precision, with its normalisation."""
        values = (tensor, Preprocessing.column(self.preprocessing.mean), Preprocessing.column(self.preprocessing.std))
        return Image(*(self._moved(value.to(self.dtype)) for value in values))

    def _moved(self, values: Tensor) -> Tensor:
        """To the device; from pinned memory a copy need not wait for what runs there."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., classes] logits → probabilities of the same shape, float64, so that 1 − p keeps its digits."""
        logits = logits.double()
        return logits.sigmoid() if self.head == "sigmoid" else logits.softmax(dim=-1)

    def class_weights(self, index: Sequence[int]) -> tuple[str, Tensor]:
        """Of a linear head behind global average pooling: its layer's name, and the classes' weights [T, K]."""
        assert self.gap is not None, "a model that is asked for its weights has a linear head"
        return self.gap.layer.name, self.gap.weight[list(index)].to(self.dtype)

    def label(self, index: int) -> str:
        """The class's label, or nothing."""
        return self.labels[index] if self.labels else ""

    def find_class(self, target: int | str, field: str) -> int:
        """The index of a class given by index or label. Raises InvalidArgument, naming `field`."""
        if isinstance(target, int):
            if not 0 <= target < self.classes:
                raise InvalidArgument(f"{self.name} has classes 0 to {self.classes - 1}, not {target}", field=field)
            return target
        if not self.labels:
            raise InvalidArgument(f"{self.name} has no labels; give the target's index", field=field)
        wanted = target.strip()
        found = [i for i, label in enumerate(self.labels) if label == wanted]
        found = found or [i for i, label in enumerate(self.labels) if label.casefold() == wanted.casefold()]
        if len(found) == 1:
            return found[0]
        if found:
            raise InvalidArgument(f"several classes are called {target!r}: {found}; give the index", field=field)
        raise InvalidArgument(f"{self.name} has no class {target!r}{_nearest(target, self.labels)}", field=field)

    def find_layers(self, names: Sequence[str], field: str) -> tuple[Layer, ...]:
        """The layers of those names. Raises InvalidArgument for one that is not there, not spatial or given twice."""
        found: list[Layer] = []
        for i, name in enumerate(names):
            layer = find_layer(name, self.spatial)
            if name in self.folded:
                raise InvalidArgument(
                    f"{self.name} computes {name} in one step with {self.folded[name]}: name that, or have the model "
                    "configured with fold_batch_norm = false",
                    field=f"{field}[{i}]",
                )
            if layer is None:
                raise InvalidArgument(f"{self.name} has {no_layer(name, self.spatial)}", field=f"{field}[{i}]")
            if layer in found:
                raise InvalidArgument(f"{layer.name} is named twice", field=f"{field}[{i}]")
            found.append(layer)
        return tuple(found)

    def default_layers(self, many: bool) -> tuple[Layer, ...]:
        """Its own choice: all resolutions, fine to coarse, or a single layer. Raises Unservable if it has none."""
        if many and not self.layers:
            raise Unservable(
                f"{self.name} has no layer [N, K, h, w] that is non-negative or made by an activation; name the layers"
            )
        if not many and self.layer is None:
            raise Unservable(f"{self.name} has no layer with a spatial output")
        return self.layers if many or self.layer is None else (self.layer,)


def no_layer(name: str, spatial: Mapping[str, Layer]) -> str:
    """ "no layer …": why there is none of that name, and what to name instead."""
    calls = calls_of(name, spatial)
    if calls:
        return f"no single layer {name!r}: it runs {len(calls)} times; name one call, such as {calls[-1]}"
    return f"no layer {name!r} whose output is spatial{_nearest(name, list(spatial))}"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; the nearest: {', '.join(close)}" if close else ""
