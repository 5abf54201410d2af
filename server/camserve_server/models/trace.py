"""Record of the calls of all modules in one forward pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from camserve_server.models.activations import activation_of
from camserve_server.models.attention import ATTENTION, attention_with_output, is_supported
from camserve_server.models.layers import modules_with_hooks

_ATTENTION_NAME = re.compile(r"(^|\.)(self_?)?(attention|attn)$", re.IGNORECASE)
_ACTIVATION = re.compile(r"(elu|silu|swish|mish|tanh|softplus)(6|me|activation)?$", re.IGNORECASE)


@dataclass(eq=False)
class Call:
    """Call of a module whose output has an activation of three or four dimensions (`activation_of`).

    The facts describe the output at the end of the call. A later module may change the output in place.

    Attributes:
        name: Name of the module, with the number of the call ("NAME#n") if the module runs several times.
        module: The module.
        output: Output for one image.
        version: Version of the output at the end of the call.
        signed: True if the output has a negative value.
        alive: False if the output is zero, as of branches of some untrained networks; its sign is then unknown.
        has_weights: True if the module or a part of it has parameters.
        input: First input, if it is a tensor.
        unchanged: True if the module has no parameters and returns its input, possibly as another view.
        activated: True if the output is that of an activation.
        edge: Position of the output in the autograd graph, if it has one.
    """

    name: str
    module: nn.Module
    output: Tensor
    version: int
    signed: bool
    alive: bool
    has_weights: bool
    input: Tensor | None
    unchanged: bool
    activated: bool
    edge: GradientEdge | None

    @property
    def key(self) -> tuple[int, int]:
        """Key of the output. Calls have the same key if they return the same tensor with the same values."""
        return id(self.output), self.version

    def is_changed_in_place(self) -> bool:
        """Return True if a later module has changed the output in place."""
        return not self.output.is_inference() and self.output._version != self.version


@dataclass(eq=False)
class AttentionCall:
    """Call of an attention module. `x` is its input if the module is supported."""

    name: str
    x: Tensor | None = None


@dataclass(eq=False)
class HeadCall:
    """Call of a linear module that may compute the logits."""

    module: nn.Module
    weight: Tensor
    x: Tensor
    output: Tensor


@dataclass(eq=False)
class Trace:
    """Record of one forward pass of `module` on `image` [1, C, H, W].

    Attributes:
        module: Network in evaluation mode.
        image: The input.
        gradients: True to record the autograd graph.
        full: False to record only the outputs of the calls.
        result: What the network returns.
        source: Input of the graph.
        calls: Calls with an output that may be spatial, in the order in which they end.
        attention_calls: Calls of attention modules.
        heads: Calls of linear modules that may compute the logits.
    """

    module: nn.Module
    image: Tensor
    gradients: bool = True
    full: bool = True
    result: Any = None
    source: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    attention_calls: list[AttentionCall] = field(default_factory=list)
    heads: list[HeadCall] = field(default_factory=list)

    def run(self) -> Trace:
        """Run the forward pass and return the trace."""
        image = self.image
        if self.gradients:
            self.source = self.image.detach().requires_grad_()
            image = self.source.clone()  # a network may change its input in place, which a leaf does not allow
        with torch.set_grad_enabled(self.gradients), self._hooked():
            self.result = self.module(image)
        for call in self.calls:
            name = call.name.partition("#")[0]
            if self._call_counts[name] == 1:
                call.name = name
        return self

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        attention = _attention_modules(self.module)
        self._call_counts: Counter[str] = Counter()
        handles = []
        for name, module in modules_with_hooks(self.module):
            if self.full and name in attention:
                handles.append(module.register_forward_hook(self._attention_ends(name)))
            # Inside an attention module, the dimensions are heads and keys, not channels and positions.
            if name and not any(name.startswith(f"{outer}.") for outer in attention):
                handles.append(module.register_forward_hook(self._module_ends(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attention_ends(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            self.attention_calls.append(AttentionCall(name))
            x = args[0] if args else None
            out = activation_of(output)
            if isinstance(x, Tensor) and x.ndim == 3 and len(x) == 1 and out is not None and is_supported(module):
                # Other arguments, such as a mask or separate keys, would change the output.
                with torch.no_grad():
                    again = attention_with_output(module, x)[1]
                if again.shape == out.shape and close(again, out):
                    self.attention_calls[-1].x = x.detach()

        return hook

    def _module_ends(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            self._call_counts[name] += 1
            output = activation_of(output)
            if output is None or output.is_quantized or output.ndim < 2 or output.numel() == 0:
                return
            x = args[0] if args and isinstance(args[0], Tensor) else None
            if self.full and isinstance(module, (nn.Linear, nn.Conv2d)) and x is not None and len(output) == 1:
                self._record_head(module, x, output)
            if output.ndim in (3, 4) and output.is_floating_point():
                self._record_call(f"{name}#{self._call_counts[name]}", module, x, output)

        return hook

    def _record_head(self, module: nn.Linear | nn.Conv2d, x: Tensor, output: Tensor) -> None:
        weight = module.weight.flatten(1)
        if x.shape[1:].numel() == weight.shape[1] and output.shape[1:].numel() == len(weight):
            self.heads.append(HeadCall(module, weight, x.detach().flatten(1).clone(), output))

    def _record_call(self, name: str, module: nn.Module, x: Tensor | None, output: Tensor) -> None:
        has_weights = self.full and next(module.parameters(), None) is not None
        activated = bool(_ACTIVATION.search(type(module).__name__))
        values = output.detach()
        smallest, largest = _extremes(values) if self.full else (-1.0, 1.0)
        if smallest >= 0 and largest <= 1 and _is_distribution(values):
            return  # attention weights of a module with another name
        unchanged = self.full and x is not None and not has_weights and not activated and _is_same(x.detach(), values)
        self.calls.append(
            Call(
                name,
                module,
                output,
                0 if output.is_inference() else output._version,
                signed=smallest < 0,
                alive=smallest < 0 or largest > 0,
                has_weights=has_weights,
                input=x,
                unchanged=unchanged,
                activated=activated,
                edge=get_gradient_edge(output) if output.requires_grad else None,
            )
        )


def output_shapes(module: nn.Module, images: Tensor) -> tuple[Any, dict[str, torch.Size]]:
    """Return what the network returns for images [N, C, H, W], and the shape of the output of each call ("NAME#n")."""
    shapes: dict[str, torch.Size] = {}
    counts: Counter[str] = Counter()

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: object) -> None:
            counts[name] += 1
            if (activation := activation_of(output)) is not None:
                shapes[f"{name}#{counts[name]}"] = activation.shape

        return hook

    handles = [each.register_forward_hook(record(name)) for name, each in modules_with_hooks(module) if name]
    try:
        with torch.no_grad():
            return module(images), shapes
    finally:
        for handle in handles:
            handle.remove()


def close(a: Tensor, b: Tensor) -> bool:
    """Return True if the tensors are equal except for rounding."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def _attention_modules(module: nn.Module) -> set[str]:
    """Return the names of the innermost modules that are attention by their name or class."""
    names = [
        name
        for name, m in module.named_modules()
        if _ATTENTION_NAME.search(name) or any(ATTENTION.search(kind.__name__) for kind in type(m).__mro__)
    ]
    return {name for name in names if name and not any(inner.startswith(f"{name}.") for inner in names)}


def _extremes(values: Tensor) -> tuple[float, float]:
    """Return the minimum and the maximum."""
    if values.ndim == 4:
        values = values.permute(0, 2, 3, 1)  # torch reads values in the order of their memory several times faster
    smallest, largest = torch.aminmax(values)
    return float(smallest), float(largest)


def _is_distribution(output: Tensor) -> bool:
    """Return True if the last dimension of a non-negative output with four dimensions is a distribution."""
    return output.ndim == 4 and output.shape[3] > 1 and bool(((output.sum(-1) - 1).abs() < 1e-3).all())


def _is_same(x: Tensor, output: Tensor) -> bool:
    """Return True if the output is the input, a view of it with the same values, or equal to it."""
    if x.numel() != output.numel():
        return False
    return x.data_ptr() == output.data_ptr() or (x.shape == output.shape and torch.equal(x, output))
