"""Conversion of the graph of an ONNX file to a torch network."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

# Nodes after a softmax that keep its values, apart from their shape.
_RESHAPING = ("Identity", "Flatten", "Reshape", "Squeeze")
# Nodes without inputs or with a body of their own, which are not computed in advance.
_NOT_CONSTANT = ("RandomNormal", "RandomUniform", "If", "Loop", "Scan")


# ---- changes of the graph --------------------------------------------------------------------------------------------


def prepare_graph(model: Any, batch: int) -> None:
    """Make constants initializers, and let a file with a fixed number of rows accept any number.

    Args:
        model: ONNX model with one output, which is changed.
        batch: Number of rows that the file fixes; 0 if it accepts any number.
    """
    graph = model.graph
    output = graph.output[0].name
    same: dict[str, str] = {}  # names of values that are equal to another value
    constants = {each.name: each for each in graph.initializer}
    nodes = []
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        # onnx2pytorch does not know this attribute of batch norms.
        inference = [a for a in node.attribute if not (a.name == "training_mode" and a.i == 0)]
        del node.attribute[:]
        node.attribute.extend(inference)
        passes = node.op_type == "Dropout" or (node.op_type == "Identity" and node.input[0] in constants)
        if passes and node.output[0] != output:
            same[node.output[0]] = node.input[0]
        elif all(name in constants for name in node.input if name) and node.op_type not in _NOT_CONSTANT:
            for tensor in _values(node, constants, model):
                graph.initializer.append(tensor)
                constants[tensor.name] = tensor
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    if batch:
        _free_batch(graph, batch)


def _values(node: Any, constants: Mapping[str, Any], model: Any) -> list[Any]:
    """Return the outputs of a node whose inputs are constants, as initializers. ONNX Runtime computes them."""
    import onnxruntime
    from onnx import helper, numpy_helper

    names = [name for name in node.output if name]
    outputs = [helper.make_empty_tensor_value_info(name) for name in names]
    inputs = [constants[name] for name in dict.fromkeys(node.input) if name]
    graph = helper.make_graph([node], "constant", [], outputs, inputs)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, too
    results = onnxruntime.InferenceSession(alone.SerializeToString(), options).run(None, {})
    return [numpy_helper.from_array(value, name) for name, value in zip(names, results, strict=True)]


def _free_batch(graph: Any, batch: int) -> None:
    """Replace the fixed number of rows at the beginning of target shapes by 0, which means the number of the input."""
    from onnx import numpy_helper

    shapes = {each.name: each for each in graph.initializer}
    for node in graph.node:
        shape = shapes.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None:
            continue
        values = numpy_helper.to_array(shape).copy()
        if values.size > 1 and values[0] == batch and not any(a.name == "allowzero" and a.i for a in node.attribute):
            values[0] = 0
            free = numpy_helper.from_array(values, f"{node.output[0]}:shape")
            graph.initializer.append(free)
            node.input[1] = free.name


def keep_output(graph: Any, output: str) -> None:
    """Remove all outputs of a graph but one.

    Args:
        graph: ONNX graph, which is changed.
        output: Name of the output.
    """
    kept = [each for each in graph.output if each.name == output]
    del graph.output[:]
    graph.output.extend(kept)


def remove_head(graph: Any) -> str:
    """Remove the activation behind the logits.

    Args:
        graph: ONNX graph with one output, which is changed.

    Returns:
        Type of the removed node: "Softmax", "LogSoftmax" or "Sigmoid"; an empty string if there is none.
    """
    producers = {name: node for node in graph.node for name in node.output}
    name, consumer = graph.output[0].name, None
    while name in producers and producers[name].op_type in _RESHAPING:
        consumer = producers[name]
        name = consumer.input[0]
    node = producers.get(name)
    if node is None or node.op_type not in ("Softmax", "LogSoftmax", "Sigmoid"):
        return ""
    if any(name in other.input for other in graph.node if other is not consumer):
        return ""  # the network uses the probabilities
    if consumer is None:
        graph.output[0].name = node.input[0]
    else:
        consumer.input[0] = node.input[0]
    graph.node.remove(node)
    return str(node.op_type)


# ---- conversion ------------------------------------------------------------------------------------------------------


class _Concat(nn.Module):
    """Concatenation as a module, so that its output can be a layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate the tensors."""
        return torch.cat(tuple(tensors), self.dim)


class _Root(nn.Module):
    """The converted network with a single input."""

    def __init__(self, converted: nn.Module) -> None:
        super().__init__()
        self.converted = converted

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the network."""
        result: Tensor = self.converted.forward(x)
        return result


class _Tracer(fx.Tracer):
    """Records the nodes of a converted network as calls of modules with the names of the ONNX nodes."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self._names = names

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True, because each module is one node."""
        return True

    def path_of_module(self, mod: nn.Module) -> str:
        """Return the name of a module in the traced network."""
        return self._names[mod]

    def iter(self, obj: Any) -> Iterator[Any]:
        """Return the outputs of a node with several outputs. The caller takes as many as the node has."""
        return (obj[i] for i in itertools.count())


def convert(model: Any, layout: str) -> fx.GraphModule:
    """Return the graph as a torch network.

    onnx2pytorch converts each node to a module. The traced network calls the same modules, but contains neither the
    ONNX file nor second copies of the weights.

    Args:
        model: ONNX model after `prepare_graph`. It is changed.
        layout: "NCHW" or "NHWC", the layout of its input.

    Returns:
        The network, [N, C, H, W] → [N, classes]. Its modules have the names of the ONNX nodes.

    Raises:
        Exception: onnx2pytorch raises many kinds of exceptions for operators that it cannot convert.
    """
    import onnx2pytorch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = onnx2pytorch.ConvertModel(model).eval().requires_grad_(False)
    modules = _named(converted)
    tracer = _Tracer({module: name for name, module in modules.items()})
    graph = tracer.trace(_Root(converted))
    parts: dict[str, Any] = dict(modules)
    buffers = {f"converted.{name}": value for name, value in converted.named_buffers(remove_duplicate=False)}
    concatenations = (node for node in converted.onnx_model.graph.node if node.op_type == "Concat")
    for node in graph.nodes:
        if node.op == "get_attr":
            value = buffers[node.target] if node.target in buffers else getattr(tracer.root, node.target)
            node.target = f"constant_{len(parts)}"
            parts[node.target] = value
        elif node.op == "call_function" and node.target is torch.cat:
            name = _name(next(concatenations), parts)
            node.op, node.target, parts[name] = "call_module", name, _Concat(node.kwargs.get("dim", 0))
            node.kwargs = {}
    _fuse_silu(graph, parts)
    _add_layouts(graph, layout)
    return fx.GraphModule(parts, graph, "OnnxNetwork")


def _named(converted: Any) -> dict[str, nn.Module]:
    """Return the module of each node by the name of the node."""
    named: dict[str, nn.Module] = {}
    for node in converted.onnx_model.graph.node:
        module = getattr(converted, converted.mapping[node.output[0]])
        if isinstance(module, nn.Module):
            named[_name(node, named)] = module
    return named


def _name(node: Any, taken: Mapping[str, object]) -> str:
    """Return the name of a node with "_" instead of ".", which separates modules. It is not among the taken names."""
    name: str = (node.name.lstrip("/") or f"{node.op_type}_{len(taken)}").replace(".", "_")
    return name if name not in taken else f"{name}_{len(taken)}"


def _fuse_silu(graph: fx.Graph, parts: dict[str, Any]) -> None:
    """Replace x · sigmoid(x) by one module, so that the gate alone is not taken for the output of an activation."""
    for node in list(graph.nodes):
        for x, gate in (node.args, node.args[::-1]) if len(node.args) == 2 else ():
            is_gate = (
                isinstance(gate, fx.Node) and gate.op == "call_module" and gate.args == (x,) and len(gate.users) == 1
            )
            multiplies = node.op == "call_module" and getattr(parts[node.target], "forward", None) is torch.mul
            if is_gate and multiplies and isinstance(parts[gate.target], nn.Sigmoid):
                node.args, parts[node.target] = (x,), nn.SiLU()
                graph.erase_node(gate)
                break


def _add_layouts(graph: fx.Graph, layout: str) -> None:
    """Convert the input of the graph to its layout, and its output to [N, classes]."""
    x = next(node for node in graph.nodes if node.op == "placeholder")
    if layout == "NHWC":
        with graph.inserting_after(x):
            permuted = graph.call_method("permute", (x, 0, 2, 3, 1))
        x.replace_all_uses_with(permuted, lambda user: user is not permuted)
    (result,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(result):
        result.args = (graph.call_method("flatten", (result.args[0], 1)),)
