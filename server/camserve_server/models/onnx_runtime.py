"""Networks that ONNX Runtime runs, for ONNX files that are not converted to torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from camserve_server.errors import Unservable
from camserve_server.models.onnx_segments import (
    Cut,
    choose_cuts,
    find_cuts,
    replace_shapes,
    shape_outputs,
    split,
    with_outputs,
)


@dataclass(frozen=True)
class Signature:
    """Input of an ONNX graph. `batch` is the number of rows that the file fixes; 0 if it accepts any number."""

    name: str
    layout: Literal["NCHW", "NHWC"]
    channels: int
    size: tuple[int, int]
    batch: int

    def as_input(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return rows [N, C, H, W] in the layout of the file."""
        return rows if self.layout == "NCHW" else np.ascontiguousarray(rows.transpose(0, 2, 3, 1))


class Session:
    """Session of ONNX Runtime for a model with one input.

    Args:
        model: ONNX model.
        batch: Number of rows that it takes; 0 for any number.
    """

    def __init__(self, model: Any, batch: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, too
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin between the segments would take the cores from each other and from torch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        self._input = self._session.get_inputs()[0].name
        self._batch = batch
        self.names = [each.name for each in self._session.get_outputs()]

    def __deepcopy__(self, memo: object) -> Session:
        """Return the session itself: nothing changes it."""
        return self

    def run(self, rows: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Return the outputs for rows [N, …], by name.

        If the file fixes the number of rows, they run in groups. Copies of the last row complete the last group.
        """
        size = self._batch or len(rows)
        groups = []
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            missing = size - len(group)
            group = np.concatenate([group, *[group[-1:]] * missing]) if missing else group
            values = self._session.run(self.names, {self._input: group})
            groups.append([value[:-missing] for value in values] if missing else values)
        values = groups[0] if len(groups) == 1 else [np.concatenate(parts) for parts in zip(*groups, strict=True)]
        return dict(zip(self.names, values, strict=True))


class _Layer(nn.Module):
    """Module that a tensor of the graph passes through, so that hooks can read and replace it."""

    def forward(self, values: NDArray[np.float32], like: Tensor) -> Tensor:
        """Return the values on the device and in the data type of `like`."""
        return torch.from_numpy(values).to(like)


class OnnxRuntimeNetwork(nn.Module):
    """Network that ONNX Runtime runs in segments. Between them, a tensor passes through a module of torch.

    The only state of the module is the graph with its weights, so that its digest depends on them.

    Args:
        parts: ONNX models of the segments, in the order of their runs.
        cuts: Cuts between them.
        signature: Input of the first one.
        graph: The serialised graph of the file.
    """

    def __init__(self, parts: Iterable[Any], cuts: Sequence[Cut], signature: Signature, graph: bytes) -> None:
        super().__init__()
        self._signature = signature
        self._graph = torch.from_numpy(np.frombuffer(graph, np.uint8).copy())
        self._segments = [Session(part, signature.batch) for part in parts]
        self._layers = [cut.layer for cut in cuts]
        for name in self._layers:
            self.add_module(name, _Layer())

    def get_extra_state(self) -> Tensor:
        """Return the serialised graph, uint8. It is not a buffer, because it stays on the CPU."""
        return self._graph

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, classes] of images [N, C, H, W].

        Raises:
            Unservable: Gradients are required.
        """
        values = x
        for i, segment in enumerate(self._segments):
            if torch.is_grad_enabled() and values.requires_grad:
                raise Unservable(
                    "ONNX Runtime, in which its file runs, computes no gradients; choose a method without gradients",
                    field="method.name",
                )
            array = values.detach().to("cpu", torch.float32).contiguous().numpy()
            (result,) = segment.run(self._signature.as_input(array) if i == 0 else array).values()
            if i < len(self._layers):
                values = self.get_submodule(self._layers[i])(result, x)
        return torch.from_numpy(result).to(x).flatten(1)


def in_segments(
    model: Any,
    signature: Signature,
    rows: NDArray[np.float32],
    wanted: Collection[str],
    check: Callable[[nn.Module], None],
    *,
    without_shapes: bool,
) -> OnnxRuntimeNetwork:
    """Return a network that ONNX Runtime runs, divided at the tensors that become layers.

    Args:
        model: ONNX model with one output, the logits.
        signature: Its input.
        rows: Two inputs [2, C, H, W].
        wanted: Names of layers that are chosen, too.
        check: Function that raises an exception if a network computes other logits. Cuts that change them are left out.
        without_shapes: True to compute the shapes of tensors from the number of rows. This gives more layers, but ONNX
            Runtime then merges other nodes, which changes the rounding of quantised tensors.

    Raises:
        Exception: ONNX Runtime raises many kinds of exceptions for a part that it cannot run.
    """
    divided = copy.deepcopy(model)
    cuts = find_cuts(divided.graph, signature.name, without_shapes=without_shapes)
    names = shape_outputs(divided.graph) if without_shapes else []
    shapes: dict[str, list[int | str]] = {}
    if cuts:
        session = Session(with_outputs(divided, cuts, names), batch=0)
        n, values, more = _samples(session, signature, rows)
        if without_shapes:
            replace_shapes(divided.graph, signature.name, n, values, more)
        shapes |= {cut.tensor: ["rows", *values[cut.tensor].shape[1:]] for cut in cuts}

        def is_read(cut: Cut) -> bool:
            rest = Session(split(divided, signature.name, [cut], shapes)[1], signature.batch)
            tokens = values[cut.tensor].copy()
            before = rest.run(tokens)
            tokens[:, tokens.shape[1] // 2 :] *= -1  # those before may be class tokens and registers
            after = rest.run(tokens)
            return any(not np.array_equal(before[name], after[name]) for name in rest.names)

        cuts = choose_cuts(cuts, values, n, signature.size, wanted, is_read)

    state = model.graph.SerializeToString()

    def build(at: Sequence[Cut]) -> OnnxRuntimeNetwork:
        network = OnnxRuntimeNetwork(split(divided, signature.name, at, shapes), at, signature, state)
        check(network)
        return network

    try:
        return build(cuts)
    except Exception:  # ONNX Runtime raises many kinds
        # Quantised nodes that ONNX Runtime merges across a cut compute other numbers if they are separate.
        fitting = [cut for cut in cuts if _succeeds(build, [cut])]
        if not fitting:
            raise
        return build(fitting)


def _succeeds(function: Callable[[Any], object], argument: object) -> bool:
    try:
        function(argument)
    except Exception:
        return False
    return True


def _samples(
    session: Session, signature: Signature, rows: NDArray[np.float32]
) -> tuple[int, dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Return a number of rows n, and the outputs for n rows and for n + 1, or for n again if the file fixes n."""
    if signature.batch:
        fixed = session.run(signature.as_input(np.repeat(rows[:1], signature.batch, axis=0)))
        return signature.batch, fixed, fixed
    try:
        return 2, session.run(signature.as_input(rows)), session.run(signature.as_input(rows[[0, 1, 0]]))
    except Exception:  # ONNX Runtime raises many kinds; some files take one image only, although they do not say so
        single = session.run(signature.as_input(rows[:1]))
        return 1, single, single
