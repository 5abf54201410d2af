"""Division of an ONNX graph at tensors through which all information in the logits passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from camserve_server.models.layers import has_aspect

# Nodes whose outputs are not layers: they rearrange, pool or resize another tensor.
_NO_LAYERS = {
    *("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "DepthToSpace", "SpaceToDepth"),
    *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool", "ReduceMax", "ReduceMean"),
    *("Pad", "Resize", "Slice", "Upsample", "DequantizeLinear"),
}
# Inputs of nodes with a quantised output: its scale and its zero point.
_QUANTISING = {
    "QuantizeLinear": (1, 2),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul"), (6, 7)),
    **dict.fromkeys(("QLinearLeakyRelu", "QLinearSigmoid"), (3, 4)),
}
_ROWS = "camserve:rows"  # number of rows of the input, an int64 [1]


@dataclass(frozen=True)
class Cut:
    """Float tensor through which all information in the logits passes.

    Attributes:
        tensor: Name of the tensor.
        layer: Name of the layer: that of the node that computes the tensor, without "." and a leading "/".
        quantised: Name of the quantised tensor that it represents; an empty string for a tensor of the file.
    """

    tensor: str
    layer: str
    quantised: str = ""


def find_cuts(graph: Any, source: str, *, without_shapes: bool) -> list[Cut]:
    """Return the cuts of a graph that may be layers, in the order of the nodes.

    Args:
        graph: ONNX graph with one output.
        source: Name of its input.
        without_shapes: True if the shapes of tensors are no information, because `replace_shapes` removes these paths.
    """
    producers = {name: node for node in graph.node for name in node.output}
    before_quantisation = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    taken = set(dir(nn.Module()))  # names that modules cannot have
    cuts = []
    for name in _cut_tensors(graph, source, without_shapes):
        node = producers[name]
        quantised = node.op_type in _QUANTISING
        named = producers.get(node.input[0]) if node.op_type == "QuantizeLinear" else node
        # ONNX Runtime merges float nodes between quantised tensors, which changes their rounding.
        merged = name in before_quantisation or any(_is_dequantised(each, producers) for each in node.input)
        if named is not None and named.op_type not in _NO_LAYERS and (quantised or not merged):
            cut = (f"{name}:float", _layer_name(named, taken), name) if quantised else (name, _layer_name(named, taken))
            cuts.append(Cut(*cut))
    return cuts


def _is_dequantised(name: str, producers: Mapping[str, Any]) -> bool:
    """Return True if a tensor is the float form of a quantised activation."""
    node = producers.get(name)
    return node is not None and node.op_type == "DequantizeLinear" and node.input[0] in producers


def _layer_name(node: Any, taken: set[str]) -> str:
    """Return a name for the output of a node that no other layer has."""
    name: str = (node.name or node.output[0]).lstrip("/").replace(".", "_")
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _cut_tensors(graph: Any, source: str, without_shapes: bool) -> list[str]:
    """Return the tensors between the source and the output that are on every path between them."""
    output = graph.output[0].name
    live, needed = {source}, {output}
    for node in graph.node:
        if not (node.op_type == "Shape" and without_shapes) and any(name in live for name in _reads(node)):
            live.update(node.output)
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(_reads(node))
            if live.intersection(node.output):
                nodes.append(node)
    nodes.reverse()
    last = {name: i for i, node in enumerate(nodes) for name in _reads(node)} | {output: len(nodes)}
    cuts: list[str] = []
    waiting = {source}  # tensors that later nodes read
    for i, node in enumerate(nodes):
        waiting = {name for name in (*waiting, *node.output) if last.get(name, -1) > i}
        if len(waiting) == 1:
            cuts.extend(waiting)
    return [name for name in dict.fromkeys(cuts) if name not in (source, output)]


def _reads(node: Any) -> Iterator[str]:
    """Yield the names of the tensors that a node reads, also in its bodies."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in body.node:
                yield from _reads(inner)
            yield from (each.name for each in body.output)


def shape_outputs(graph: Any) -> list[str]:
    """Return the names of the tensors that contain shapes of other tensors."""
    return [node.output[0] for node in graph.node if node.op_type == "Shape"]


def with_outputs(model: Any, cuts: Iterable[Cut], names: Iterable[str]) -> Any:
    """Return a copy of the model with further outputs.

    Args:
        model: ONNX model.
        cuts: Cuts whose tensors become outputs.
        names: Names of further tensors.
    """
    from onnx import helper

    copied = copy.deepcopy(model)
    producers = {name: node for node in copied.graph.node for name in node.output}
    for cut in cuts:
        copied.graph.output.append(helper.make_empty_tensor_value_info(cut.tensor))
        if cut.quantised:
            node = producers[cut.quantised]
            copied.graph.node.append(_conversion("DequantizeLinear", node, cut.quantised, cut.tensor))
    copied.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return copied


def _conversion(kind: str, quantising: Any, source: str, result: str) -> Any:
    """Return a node between a quantised tensor and its float form, with scale and zero point of the quantising node."""
    from onnx import helper

    scale, zero = _QUANTISING[quantising.op_type]
    domain = quantising.domain if quantising.op_type == "QuantizeLinear" else ""
    return helper.make_node(kind, [source, *quantising.input[scale : zero + 1]], [result], domain=domain)


def choose_cuts(
    cuts: Sequence[Cut],
    values: Mapping[str, NDArray[Any]],
    rows: int,
    size: tuple[int, int],
    wanted: Collection[str],
    is_read: Callable[[Cut], bool],
) -> list[Cut]:
    """Return the cuts that become layers.

    These are the last one at each resolution, and the last one without negative values, which Poly-CAM prefers. Only
    tensors with several positions count whose first dimension is the batch.

    Args:
        cuts: Candidates in the order of the nodes.
        values: Their values.
        rows: Number of rows of the values.
        size: Size (H, W) of the image.
        wanted: Names of layers that are chosen, too.
        is_read: Function that returns True if the logits depend on the tokens of the grid. At the end of many
            transformers, they depend on a class token alone.
    """
    resolutions = {}
    for cut in cuts:
        value = values[cut.tensor]
        resolution = _resolution(value.shape[1:], size)
        if resolution is not None and len(value) == rows and value.dtype == np.float32:
            resolutions[cut] = resolution
    kept = {cut for cut in resolutions if cut.layer in wanted}
    while resolutions and len([*resolutions.values()][-1]) == 1 and not is_read([*resolutions][-1]):
        resolutions.popitem()
    first: dict[object, Cut] = {}
    last: dict[object, Cut] = {}
    for cut, resolution in resolutions.items():
        last[resolution] = cut
        if values[cut.tensor].min() >= 0:
            last[resolution, "not negative"] = cut
        # Before tokens are mixed, they show their grid if there is a class token among them.
        if len(resolution) == 1 and not _is_grid(resolution[0], size):
            first.setdefault(resolution, cut)
    kept.update(first.values(), last.values())
    return [cut for cut in cuts if cut in kept]


def _resolution(shape: Sequence[int], size: tuple[int, int]) -> tuple[int, ...] | None:
    """Return the grid of a map of shape [K, h, w] or [h, w, K], or the number of tokens of [L, K]; None for others."""
    if len(shape) == 2:
        return (shape[0],) if shape[0] > 1 else None
    if len(shape) != 3:
        return None
    grids = [(h, w) for h, w in ((shape[1], shape[2]), (shape[0], shape[1])) if h * w > 1 and has_aspect((h, w), size)]
    return min(grids, key=lambda grid: abs(math.log(grid[0] * size[1] / (grid[1] * size[0]))), default=None)


def _is_grid(count: int, size: tuple[int, int]) -> bool:
    """Return True if so many positions can be a grid with the aspect ratio of the image."""
    return any(count % h == 0 and has_aspect((h, count // h), size) for h in range(1, count + 1))


# ---- segments --------------------------------------------------------------------------------------------------------


def replace_shapes(
    graph: Any, source: str, rows: int, fewer: Mapping[str, NDArray[Any]], more: Mapping[str, NDArray[Any]]
) -> None:
    """Compute the shapes of tensors from the number of rows alone.

    Exporters read the number of rows from the input or from any other tensor, which would be a path around all layers.

    Args:
        graph: ONNX graph, which is changed.
        source: Name of its input.
        rows: A number of rows.
        fewer: Values of `shape_outputs` for so many rows.
        more: Values for one row more; the same as `fewer` if the file fixes the number.
    """
    from onnx import helper, numpy_helper

    shapes = set(shape_outputs(graph))
    if not shapes:
        return
    first = numpy_helper.from_array(np.zeros(1, np.int64), f"{_ROWS}:first")
    constants = [first]
    nodes = [
        helper.make_node("Shape", [source], [f"{_ROWS}:shape"], _ROWS),
        helper.make_node("Gather", [f"{_ROWS}:shape", first.name], [_ROWS]),
    ]
    for node in graph.node:
        name = node.output[0]
        if name not in shapes:
            nodes.append(node)
            continue
        factor = more[name] - fewer[name]
        if not factor.any():
            constants.append(numpy_helper.from_array(fewer[name], name))
            continue
        constants.append(numpy_helper.from_array(factor, f"{name}:factor"))
        constants.append(numpy_helper.from_array(fewer[name] - rows * factor, f"{name}:rest"))
        nodes.append(helper.make_node("Mul", [_ROWS, f"{name}:factor"], [f"{name}:product"]))
        nodes.append(helper.make_node("Add", [f"{name}:product", f"{name}:rest"], [name]))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def split(model: Any, source: str, cuts: Sequence[Cut], shapes: Mapping[str, Sequence[int | str]]) -> list[Any]:
    """Return one model for each part of a graph: from the input to the first cut, and so on to the output.

    Args:
        model: ONNX model, after `replace_shapes` if a cut needs that.
        source: Name of its input.
        cuts: Where to divide it, in the order of the nodes.
        shapes: Shape of each cut.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    inputs = [next(each for each in graph.input if each.name == source)]
    inputs += [helper.make_tensor_value_info(cut.tensor, TensorProto.FLOAT, shapes[cut.tensor]) for cut in cuts]
    start, end = Cut(source, ""), Cut(graph.output[0].name, "")
    parts = []
    for value, before, after in zip(inputs, [start, *cuts], [*cuts, end], strict=True):
        nodes = _between(graph, before, after)
        read = {name for node in nodes for name in _reads(node)}
        part = helper.make_graph(
            nodes,
            graph.name,
            [value],
            [helper.make_empty_tensor_value_info(after.tensor)],
            [each for each in graph.initializer if each.name in read],
            sparse_initializer=[each for each in graph.sparse_initializer if each.values.name in read],
        )
        versions = {"opset_imports": model.opset_import, "ir_version": model.ir_version}
        parts.append(helper.make_model(part, functions=model.functions, **versions))
    return parts


def _between(graph: Any, start: Cut, end: Cut) -> list[Any]:
    """Return the nodes that compute the tensor of the cut `end` from that of the cut `start`."""
    from onnx import helper

    begin, result = start.quantised or start.tensor, end.quantised or end.tensor
    needed, nodes = {result}, []
    for node in reversed(graph.node):
        if not needed.intersection(node.output):
            continue
        if result in node.output and end.quantised:
            nodes.append(_conversion("DequantizeLinear", node, result, end.tensor))
            needed.update(nodes[-1].input)
        if begin in node.output:
            if start.quantised:  # values on the grid of the quantisation are restored exactly
                nodes.append(_conversion("QuantizeLinear", node, start.tensor, begin))
                needed.update(nodes[-1].input)
        elif node.name == _ROWS:
            nodes.append(helper.make_node("Shape", [start.tensor], list(node.output)))
        else:
            needed.update(_reads(node))
            nodes.append(node)
    return nodes[::-1]
