"""Cuts of a network: layers through which all information in the logits passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from camserve_server.models.activations import activation_of, with_activation
from camserve_server.models.layers import Layer
from camserve_server.models.model import Model
from camserve_server.models.trace import Call, HeadCall, Trace, output_shapes

# Largest cut value of a cut. In untrained networks, whose logits hardly differ between images, rounding can give 0.01.
MAX_CUT = 0.05
IMAGES = 2


def cut_images(example: Tensor) -> Tensor:
    """Return images [IMAGES, C, H, W] for which the logits of most networks differ: `example` and coarse patterns.

    Args:
        example: Input [1, C, H, W].
    """
    generator = torch.Generator().manual_seed(1)
    size = (int(example.shape[2]), int(example.shape[3]))
    coarse = [torch.randn(1, example.shape[1], n, n, generator=generator) for n in range(3, 2 + IMAGES)]
    return torch.cat([example, *(F.interpolate(each, size, mode="bilinear").to(example) for each in coarse)])


class CutMeter:
    """Measures the cut values of layers.

    The cut value of a layer is ‖y(B with A's output) − y(A)‖ / ‖y(B) − y(A)‖: the logits for image B, when the output
    of the layer is that for image A, are compared with those for A. It is the maximum over both orders of two images.
    It is 0 if all information in the logits passes through the layer, and 1 for a side branch without influence.

    Args:
        module: Network in evaluation mode.
        example: Input [1, C, H, W].

    Attributes:
        images: Images A and B, [IMAGES, C, H, W].
        shapes: Shape of the output of each call ("NAME#n") for all images, or for one if the network takes only one.
        rows: Number of images that the network took at once.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self._module = module
        self.images = cut_images(example)
        self.rows = len(self.images)
        try:
            y, self.shapes = output_shapes(module, self.images)
            if not isinstance(y, Tensor) or len(y) != self.rows:
                raise ValueError("the network does not take several images at once")
        except Exception:  # the code of a network can raise any exception
            self.rows = 1
            self.shapes = output_shapes(module, self.images[:1])[1]
            y = self._logits()
        self._y = y.double()

    def value(self, layer: Layer) -> float | None:
        """Return the cut value of a layer; None if the logits are the same for all images or the layer is read-only."""
        if layer.read_only:
            return None
        difference = (self._y - self._y.roll(1, 0)).norm(dim=1)
        measurable = difference > 1e-5 * self._y.norm(dim=1)
        if not measurable.any():
            return None
        if self.rows > 1:
            z = self._run(self.images, layer, lambda output: output.roll(1, layer.batch_dim))
        else:
            outputs: list[Tensor] = []
            for i in range(IMAGES):
                self._run(self.images[i : i + 1], layer, lambda output: outputs.append(output.clone()))
            z = torch.cat([self._run(self.images[i : i + 1], layer, _constant(outputs[i - 1])) for i in range(IMAGES)])
        return float(((z.double() - self._y.roll(1, 0)).norm(dim=1) / difference)[measurable].max())

    def _logits(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._module(self.images[i : i + 1]) for i in range(IMAGES)])

    def _run(self, images: Tensor, layer: Layer, on_output: Callable[[Tensor], Any]) -> Tensor:
        """Run the network; a tensor that `on_output` returns replaces the output of the layer."""
        calls = Counter[str]()

        def hook(module: nn.Module, args: object, output: Any) -> Any:
            calls[layer.module] += 1
            if calls[layer.module] != layer.call or (activation := activation_of(output)) is None:
                return None
            changed = on_output(activation)
            return None if changed is None else with_activation(output, changed)

        handle = self._module.get_submodule(layer.module).register_forward_hook(hook)
        try:
            with torch.no_grad():
                logits: Tensor = self._module(images)
                return logits
        finally:
            handle.remove()


def measure_cuts(module: nn.Module, example: Tensor, layers: Iterable[Layer]) -> Iterator[Layer]:
    """Yield the layers with their cut values. Each takes one forward pass for two images.

    Args:
        module: Network in evaluation mode.
        example: Input [1, C, H, W].
        layers: Layers of the network.
    """
    meter = CutMeter(module, example)
    for layer in layers:
        yield replace(layer, cut=meter.value(layer))


def layers_with_cuts(model: Model) -> Iterator[Layer]:
    """Yield all layers of a loaded model with their cut values. Each takes one forward pass for two images.

    Args:
        model: Loaded model.
    """
    shape = [1, model.preprocessing.channels, *model.preprocessing.size]
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    yield from measure_cuts(model.module, example.to(model.device, model.compute_dtype), model.spatial.values())


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: value


class Graph:
    """Autograd graph of one forward pass.

    Args:
        trace: Trace with gradients. Without a path from the logits to the image, as under `no_grad`, nothing is known.
    """

    def __init__(self, trace: Trace) -> None:
        self._signal = None
        self._cuts: set[Node] = set()
        self.known = False
        logits, source = trace.result, trace.source
        if source is not None and isinstance(logits, Tensor) and logits.grad_fn is not None:
            # The sum of the probabilities of a network with a softmax has no gradient, but this sum has.
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
            self._signal = (logits * weights).sum()
            self._cuts = _cuts(logits.grad_fn, source)
            self.known = bool(self._cuts)

    def is_cut(self, call: Call) -> bool:
        """Return True if all paths from the image to the logits lead through the call, or if the graph is unknown."""
        return not self.known or (call.edge is not None and call.edge.node in self._cuts)

    def gradients(self, calls: Iterable[Call]) -> list[Tensor | None]:
        """Return the gradient of a combination of the logits for the output of each call; None if it is unknown."""
        calls = list(calls)
        edges = [call.edge for call in calls if call.edge is not None]
        if self._signal is None or not edges:
            return [None for _ in calls]
        try:
            found = torch.autograd.grad(self._signal, edges, retain_graph=True, allow_unused=True)
        except RuntimeError:  # a part of the network cannot be differentiated
            return [None for _ in calls]
        gradients = iter(found)
        return [None if call.edge is None else _or_zero(next(gradients), call.output) for call in calls]


def _or_zero(gradient: Tensor | None, output: Tensor) -> Tensor:
    return torch.zeros_like(output) if gradient is None else gradient


def _cuts(root: Node, source: Tensor) -> set[Node]:
    """Return the nodes of a graph that are on every path from `root` to the leaf `source`."""
    order = _topological(root)
    place = {node: i for i, node in enumerate(order)}
    # A node leads to the image if it accumulates its gradient or if one of the nodes after it does.
    leads = set[Node]()
    for node in reversed(order):
        if getattr(node, "variable", None) is source or any(after in leads for after in _after(node)):
            leads.add(node)
    # A node is on every path if no edge between two others that lead to the image passes it by.
    cuts, furthest = set[Node](), 0
    for node in order:
        if node in leads:
            if place[node] >= furthest:
                cuts.add(node)
            furthest = max([furthest, *(place[after] for after in _after(node) if after in leads)])
    return cuts


def _after(node: Node) -> Iterator[Node]:
    return (after for after, _ in node.next_functions if after is not None)


def _topological(root: Node) -> list[Node]:
    """Return the nodes of a graph; each comes before those that it leads to."""
    done: list[Node] = []
    seen = {root}
    stack = [(root, _after(root))]
    while stack:
        node, rest = stack[-1]
        after = next(rest, None)
        if after is None:
            done.append(node)
            stack.pop()
        elif after not in seen:
            seen.add(after)
            stack.append((after, _after(after)))
    return done[::-1]


@contextmanager
def untrained_head_replaced(head: HeadCall | None) -> Iterator[bool]:
    """Let a head whose weights are zero return random combinations of its input.

    The logits of a network with such a head depend on no layer, so nothing could be measured.

    Args:
        head: Call of the linear module that computes the logits.

    Yields:
        True if the weights are zero.
    """
    if head is None or bool(head.weight.any()):
        yield False
        return
    random = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)).to(head.weight)

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (args[0].flatten(1) @ random.T).view(output.shape)

    handle = head.module.register_forward_hook(replace)
    try:
        yield True
    finally:
        handle.remove()
