"""Choice of a network's default layers among its cuts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from camserve_server.models.cuts import MAX_CUT, CutMeter, Graph
from camserve_server.models.layers import Layer
from camserve_server.models.trace import Call, Trace

# Largest number of layers of one resolution that are measured until a cut is found. The autograd graph excludes nearly
# all others; it is missing only for networks without gradients.
MAX_MEASURED = 16
# Grids with less than so many times the positions have the same resolution. A stride of two gives at least 2.25, from
# 3 × 3 to 2 × 2.
SAME_RESOLUTION = 1.9


@dataclass(frozen=True)
class Defaults:
    """Default layers.

    Attributes:
        layers: Layers of methods that use several, from fine to coarse.
        layer: Layer of methods that use one.
        no_layer: Reason why there is no `layer`; empty if there is one.
        warnings: Sentences about default layers that are not cuts.
    """

    layers: tuple[Layer, ...]
    layer: Layer | None
    no_layer: str = ""
    warnings: tuple[str, ...] = ()


def choose_defaults(trace: Trace, spatial: dict[str, Layer], meter: CutMeter) -> Defaults:
    """Choose the default layers of a network.

    The layers of methods that use several are the last non-negative cut at each resolution or, if there is none, as in
    networks with SiLU or GELU, the last cut. The Poly-CAM paper uses the non-negative layers before each change of
    resolution.

    The layer of methods that use one is the last cut at the coarsest resolution. Layers whose positions have no
    gradient are not used, such as the tokens after the last attention of a transformer with a class token.

    If all layers are read-only, all of them are used, and the coarsest one by methods that use one.

    Args:
        trace: Trace of the network.
        spatial: All layers by name.
        meter: Measures cut values.
    """
    if all(layer.read_only for layer in spatial.values()) and spatial:
        # Whoever serves the network has chosen them, and nothing about them can be measured.
        layers = sorted(spatial.values(), key=lambda layer: -layer.positions)
        return Defaults(tuple(layers), layers[-1])
    return _Choice(trace, spatial, meter).defaults()


class _Choice:
    def __init__(self, trace: Trace, spatial: dict[str, Layer], meter: CutMeter) -> None:
        self._calls = trace.calls
        self._order = {call.name: i for i, call in enumerate(trace.calls)}
        self._spatial = spatial
        self._meter = meter
        self._graph = Graph(trace)
        self._measured: dict[str, Layer] = {}
        pooled = _pooled(trace.calls, spatial)
        # If modules share an output, such as a block and its last activation, the outermost one gives the name.
        own = {call.key: call for call in trace.calls if call.name in spatial and not call.unchanged}
        self._candidates = [call for call in own.values() if call.key not in pooled]
        self._candidates.sort(key=lambda call: self._order[call.name])

    def defaults(self) -> Defaults:
        resolutions = self._resolutions()
        layers: list[Layer] = []
        single: Layer | None = None
        warnings: list[str] = []
        for calls in resolutions:
            cuts = [call for call in calls if self._graph.is_cut(call)]
            single = single or self._first_cut(cuts[::-1], None)
            several = self._first_cut(self._preferred(cuts), single)
            if several is not None:
                layers.append(several)
        if resolutions and single is None:
            single = self._best(resolutions[0])
            if single is not None:
                warnings.append(_not_a_cut(single))
        elif single is not None and all(call.name != single.name for call in resolutions[0]):
            coarsest = self._spatial[resolutions[0][-1].name]
            warnings.append(
                f"the layer {single.name} has {single.height} × {single.width} positions, because all information in "
                f"the logits passes through no layer with {coarsest.height} × {coarsest.width}; set layer to choose "
                "another"
            )
        unread = self._unread_after(single)
        if unread is not None:
            return Defaults((), None, _unread_reason(unread))
        reason = "" if single else "it has no layer with a spatial output"
        return Defaults(tuple(layers[::-1]), single, reason, tuple(warnings))

    def _resolutions(self) -> list[list[Call]]:
        """Return the calls at each resolution, from coarse to fine, in the order of the forward pass.

        Grids of similar size belong to one resolution: padding or resizing can add a row and a column to a grid.
        """
        sizes = {call: self._spatial[call.name].positions for call in self._candidates}
        resolutions: list[list[Call]] = []
        for call in sorted(self._candidates, key=lambda call: sizes[call]):
            if not resolutions or sizes[call] >= SAME_RESOLUTION * sizes[resolutions[-1][0]]:
                resolutions.append([])
            resolutions[-1].append(call)
        return [sorted(calls, key=lambda call: self._order[call.name]) for calls in resolutions]

    def _preferred(self, calls: Sequence[Call]) -> list[Call]:
        """Return the calls for methods that need non-negative layers, the best one first."""
        return sorted((call for call in calls[::-1] if call.alive), key=lambda call: call.signed)

    def _first_cut(self, calls: Iterable[Call], after: Layer | None) -> Layer | None:
        """Return the first layer that is a cut and has a gradient; `after` is a coarser one, if it is known."""
        for call in list(calls)[:MAX_MEASURED]:
            layer = self._measure(call)
            # If the logits are the same for all images, only the graph tells.
            is_cut = self._graph.known if layer.cut is None else layer.cut <= MAX_CUT
            # Before a layer whose positions have a gradient, those of all maps have one.
            if is_cut and ((after and layer.form != "tokens") or self._has_gradient(call)):
                return layer
        return None

    def _best(self, calls: Sequence[Call]) -> Layer | None:
        """Return the layer with the smallest cut value among the last ones."""
        usable = [call for call in calls[-MAX_MEASURED:] if self._has_gradient(call)]
        layers = [self._measure(call) for call in usable[::-1]]
        return min(layers, key=lambda layer: float("inf") if layer.cut is None else layer.cut, default=None)

    def _measure(self, call: Call) -> Layer:
        if call.name not in self._measured:
            layer = self._spatial[call.name]
            self._measured[call.name] = replace(layer, cut=self._meter.value(layer))
        return self._measured[call.name]

    def _has_gradient(self, call: Call) -> bool:
        layer = self._spatial[call.name]
        [gradient] = self._graph.gradients([call])
        return gradient is None or bool(layer.grid(gradient.transpose(0, layer.batch_dim)).any())

    def _unread_after(self, single: Layer | None) -> Call | None:
        """Return the last output with several positions behind a layer that is a cut but not a layer."""
        start = -1 if single is None else self._order[single.name]
        for call in reversed(self._calls[start + 1 :]):
            if call.name in self._spatial or not self._graph.known or not self._graph.is_cut(call):
                continue
            if call.has_weights and _several_positions(call.output):
                [gradient] = self._graph.gradients([call])
                if gradient is not None and _positions_used(gradient) > 1:
                    return call
        return None


def _several_positions(values: Tensor) -> bool:
    """Return True if an output for one image has several positions, whatever its layout is."""
    if values.ndim == 3:
        return 1 not in sorted(values.shape)[1:]
    return values.shape[2:].numel() > 1 and values.shape[1:3].numel() > 1


def _positions_used(gradient: Tensor) -> int:
    """Return the number of positions with a gradient, if the channels are in the last dimension."""
    return int(gradient.flatten(0, -2).any(dim=1).sum())


def _unread_reason(call: Call) -> str:
    return (
        f"it is unknown where in the image the positions of its output {call.name} {[*call.output.shape]} are; set "
        "token_grid if they are tokens in row order, or set layer and layers"
    )


def _not_a_cut(layer: Layer) -> str:
    value = "unknown" if layer.cut is None else f"{layer.cut:.2f}"
    return (
        f"only a part of the information in the logits passes through the layer {layer.name} (cut value {value}), and "
        "no other layer is better; set layer to choose another"
    )


def _pooled(calls: Sequence[Call], spatial: dict[str, Layer]) -> set[tuple[int, int]]:
    """Return the keys of the outputs of poolings: modules without parameters that return fewer positions.

    An adaptive pooling that returns more positions, or the same values, after another pooling is a pooling, too.
    """
    pooled = set[tuple[int, int]]()
    ids = set[int]()
    for call in calls:
        layer = spatial.get(call.name)
        if layer is None or call.has_weights or call.activated or call.input is None:
            continue
        before, after = _dimensions(call.input, layer), _dimensions(call.output, layer)
        if (before[0] == after[0] and before[1:] != after[1:]) or (call.unchanged and id(call.input) in ids):
            pooled.add(call.key)
            ids.add(id(call.output))
    return pooled


def _dimensions(values: Tensor, layer: Layer) -> tuple[int, ...]:
    """Return the number of channels and the sizes of the other dimensions, read like the output of the layer."""
    shape = values.shape
    if len(shape) != (3 if layer.form == "tokens" else 4):
        return (0,)
    match layer.form:
        case "NCHW":
            return tuple(shape[1:])
        case "NHWC":
            return (shape[3], *shape[1:3])
        case "tokens":
            return (shape[2], shape[1 - layer.batch_dim])
