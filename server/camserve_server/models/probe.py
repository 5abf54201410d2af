"""Detection of a network's layers, attention modules and linear head from forward passes on an example."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from camserve_server.models.attention import attention_with_output, is_supported
from camserve_server.models.layers import GapHead, Grid, Layer, modules_with_hooks

# Largest number of tokens before the grid: class tokens, distillation tokens and registers. A larger limit would accept
# wrong grids.
MAX_PREFIX = 16
_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_ATTENTION_NAME = re.compile(r"(^|\.)(self_?)?(attention|attn)$", re.IGNORECASE)
_ACTIVATION = re.compile(r"(elu|silu|swish|mish|tanh|softplus)(6|me|activation)?$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Structure of a network, as detected by `probe`.

    Attributes:
        spatial: All layers that can be named, in the order of the forward pass.
        layers: Default layers of methods that use several, from fine to coarse.
        layer: Default layer of methods that use one.
        classes: Number of classes.
        gap: Linear head behind global average pooling, if the network has one.
        attention: Names of the global self-attention modules in the order of the forward pass. Empty if one of them is
            not supported or the logits do not depend on a class token alone.
        attention_prefix: Number of tokens before those of the grid in the input of the attention modules.
        attention_grid: Grid (h, w) of the other tokens.
    """

    spatial: dict[str, Layer]
    layers: tuple[Layer, ...]
    layer: Layer | None
    classes: int
    gap: GapHead | None = None
    attention: tuple[str, ...] = ()
    attention_prefix: int = 0
    attention_grid: Grid | None = None


def probe(module: nn.Module, example: Tensor, token_grid: Grid | None = None) -> ProbeResult:
    """Detect the structure of a network from forward passes on `example` and variants of it.

    Args:
        module: Network in evaluation mode.
        example: Input [1, C, H, W].
        token_grid: Grid (h, w) of a transformer's tokens; detected if None.

    Raises:
        ValueError: The output of the network is not logits [1, classes].
    """
    trace = _Trace(module, example, token_grid)
    logits = trace.run()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network returns {shape} where logits [1, classes] are expected")
    in_order = trace.tokens_in_order()
    calls = [call for call in trace.named_calls() if call.layer.form != "tokens" or in_order]
    layers = _default_layers(calls)
    attention, prefix, grid = trace.attention() if in_order else ((), 0, None)
    return ProbeResult(
        spatial={call.layer.name: call.layer for call in calls},
        layers=layers,
        layer=_default_layer(calls, layers, trace.attention_calls) if in_order else None,
        classes=logits.shape[1],
        gap=_gap_head(calls, trace.heads, logits),
        attention=attention,
        attention_prefix=prefix,
        attention_grid=grid,
    )


# ---- tracing a forward pass ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _LayerCall:
    """Call of a module with a spatial output. The facts describe the output at the end of the call.

    A later module may change the output in place.
    """

    layer: Layer
    module: nn.Module
    output: Tensor
    version: int
    mean: Tensor  # [1, K]
    alive: bool  # False if the output is zero, as of branches of some untrained networks; its sign is then unknown
    fingerprint: Tensor  # [h, w], differs where the output does
    pooled: bool = False
    activated: bool = False


@dataclass(eq=False)
class _AttentionCall:
    """Call of an attention module.

    `calls_before` is the number of layer calls that had ended when it began. `x` is its input if the module is
    supported.
    """

    name: str
    calls_before: int
    x: Tensor | None = None


@dataclass(eq=False)
class _Head:
    """Call of a linear module that may compute the logits."""

    weight: Tensor
    x: Tensor
    output: Tensor


@dataclass(eq=False)
class _Trace:
    """Record of one forward pass of `module` on `example`."""

    module: nn.Module
    example: Tensor
    token_grid: Grid | None
    layer_calls: list[_LayerCall] = field(default_factory=list)
    attention_calls: list[_AttentionCall] = field(default_factory=list)
    heads: list[_Head] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    call_counts: Counter[str] = field(default_factory=Counter)

    def run(self) -> Any:
        """Run the forward pass and return the output of the module."""
        with torch.no_grad(), self._hooked():
            return self.module(self.example)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        attention = _attention_modules(self.module)
        handles = []
        for name, module in modules_with_hooks(self.module):
            if name in attention:
                handles.append(module.register_forward_pre_hook(self._attention_begins(name)))
                handles.append(module.register_forward_hook(self._attention_ends))
            # Inside an attention module, the dimensions are heads and keys, not channels and positions.
            if name and not any(name.startswith(f"{outer}.") for outer in attention):
                handles.append(module.register_forward_hook(self._module_ends(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attention_begins(self, name: str) -> Any:
        return lambda module, args: self.attention_calls.append(_AttentionCall(name, len(self.layer_calls)))

    def _attention_ends(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        x = args[0] if args else None
        out = output[0] if isinstance(output, tuple) else output
        if isinstance(x, Tensor) and x.ndim == 3 and len(x) == 1 and isinstance(out, Tensor) and is_supported(module):
            # Other arguments, such as a mask or separate keys, would change the output.
            again = attention_with_output(module, x)[1]
            if again.shape == out.shape and _close(again, out):
                self.attention_calls[-1].x = x

    def _module_ends(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            self.call_counts[name] += 1
            if not isinstance(output, Tensor) or output.is_quantized or output.ndim < 2 or len(output) != 1:
                return
            if isinstance(module, nn.Conv2d) and output.ndim == 4:
                self.grids.append((output.shape[2], output.shape[3]))
            if isinstance(module, (nn.Linear, nn.Conv2d)) and args and isinstance(args[0], Tensor):
                self._record_head(module, args[0], output)
            self._record_layer(f"{name}#{self.call_counts[name]}", module, output)

        return hook

    def _record_head(self, module: nn.Linear | nn.Conv2d, x: Tensor, output: Tensor) -> None:
        weight = module.weight.flatten(1)
        if x.shape[1:].numel() == weight.shape[1] and output.shape[1:].numel() == len(weight):
            self.heads.append(_Head(weight, x.flatten(1).clone(), output))

    def _record_layer(self, name: str, module: nn.Module, output: Tensor) -> None:
        layer = self._layer(name, output)
        if layer is None or layer.positions < 2:
            return
        A = layer.grid(output)
        layer = replace(layer, signed=bool((A < 0).any()))
        mean, alive, fingerprint = A.mean(dim=(2, 3)), bool(A.any()), _fingerprint(A[0])
        version = 0 if output.is_inference() else output._version  # inference tensors have no version
        self.layer_calls.append(_LayerCall(layer, module, output, version, mean, alive, fingerprint))

    def _layer(self, name: str, output: Tensor) -> Layer | None:
        """Return the layer with the detected layout of the output; None if the output is not spatial."""
        if 0 in output.shape:
            return None
        if output.ndim == 4:
            _, a, b, c = output.shape
            if c > 1 and bool((output >= 0).all()) and bool(((output.sum(-1) - 1).abs() < 1e-3).all()):
                return None  # each row is a distribution: attention weights of a module with another name
            if b * c > 1 and self._distortion(a, b) < self._distortion(b, c):
                return Layer(name, c, a, b, form="NHWC")
            return Layer(name, a, b, c)
        if output.ndim == 3:
            grid = self._find_grid(output.shape[1])
            if grid is not None:
                h, w = grid
                return Layer(name, output.shape[2], h, w, form="tokens", prefix=output.shape[1] - h * w)
        return None

    def _distortion(self, h: int, w: int) -> float:
        """Return the difference between the aspect ratio of a grid and that of the input, as a logarithm."""
        return abs(math.log(h * self.example.shape[3] / (w * self.example.shape[2])))

    def _find_grid(self, tokens: int) -> Grid | None:
        """Return the grid of so many tokens.

        It is the configured grid or, without one, the output size of an earlier convolution that leaves the fewest
        tokens over.
        """
        if self.token_grid is not None:
            return self.token_grid if 0 <= tokens - math.prod(self.token_grid) < math.prod(self.token_grid) else None
        fits = [grid for grid in self.grids if 0 <= tokens - math.prod(grid) <= MAX_PREFIX]
        return max(reversed(fits), key=math.prod, default=None)

    def named_calls(self) -> list[_LayerCall]:
        """Return the layer calls with their final names, and mark outputs of poolings and activations.

        The name of a module that ran once has no number.
        """
        pooled = {id(call.output) for call in self.layer_calls if "Pool" in type(call.module).__name__}
        active = {
            (id(call.output), call.version)
            for call in self.layer_calls
            if _ACTIVATION.search(type(call.module).__name__)
        }
        for call in self.layer_calls:
            if self.call_counts[call.layer.module] == 1:
                call.layer = replace(call.layer, name=call.layer.module)
            call.pooled = id(call.output) in pooled
            call.activated = (id(call.output), call.version) in active
        return self.layer_calls

    def tokens_in_order(self) -> bool:
        """Return True if the tokens lie row by row behind the prefix.

        A change of the top left quarter of the image must change tokens at the top left, as long as no layer has mixed
        all tokens.
        """
        _, _, height, width = self.example.shape
        other = self.example.clone()
        other[..., : height // 2, : width // 2] *= -1
        again = _Trace(self.module, other, self.token_grid)
        again.run()
        fingerprints = {call.layer.name: call.fingerprint for call in again.layer_calls}
        return all(
            _is_top_left(call.fingerprint != fingerprints[call.layer.name])
            for call in self.layer_calls
            if call.layer.form == "tokens" and call.layer.name in fingerprints
        )

    def attention(self) -> tuple[tuple[str, ...], int, Grid | None]:
        """Return the names of the attention modules, the prefix and the grid.

        The result is empty unless all modules are supported, run once and have the same tokens as input. It is also
        empty unless the logits depend only on a class token, which is the first token, once the last module has run.
        """
        names = tuple(call.name for call in self.attention_calls)
        lengths = {None if call.x is None else call.x.shape[1] for call in self.attention_calls}
        tokens = lengths.pop() if len(lengths) == 1 and len(set(names)) == len(names) else None
        grid = None if tokens is None else self._find_grid(tokens)
        if tokens is None or grid is None or math.prod(grid) < 2:
            return (), 0, None
        prefix = tokens - math.prod(grid)
        return (names, prefix, grid) if self._has_class_token(names[-1], prefix) else ((), 0, None)

    def _has_class_token(self, last: str, prefix: int) -> bool:
        """Return True if the logits depend on the first output token of the module `last` and on none of the grid."""

        def logits(disturbed: slice) -> Tensor:
            def disturb(module: nn.Module, args: object, output: Any) -> Any:
                out = (output[0] if isinstance(output, tuple) else output).clone()
                noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
                out[:, disturbed] += noise[:, disturbed].to(out)
                return (out, *output[1:]) if isinstance(output, tuple) else out

            handle = self.module.get_submodule(last).register_forward_hook(disturb)
            try:
                with torch.no_grad():
                    result: Tensor = self.module(self.example)
            finally:
                handle.remove()
            return result

        def logits_depend_on(disturbed: slice) -> bool:
            return not torch.equal(logits(disturbed), logits(slice(0, 0)))

        # The head of an untrained network may be zero; the logits then depend on no token.
        first = logits_depend_on(slice(0, 1)) or not logits_depend_on(slice(1, prefix))
        return prefix > 0 and first and not logits_depend_on(slice(prefix, None))


def _attention_modules(module: nn.Module) -> set[str]:
    """Return the names of the innermost modules that are attention by their name or class."""
    names = [
        name
        for name, m in module.named_modules()
        if _ATTENTION_NAME.search(name) or any(_ATTENTION.search(kind.__name__) for kind in type(m).__mro__)
    ]
    return {name for name in names if name and not any(inner.startswith(f"{name}.") for inner in names)}


def _fingerprint(A: Tensor) -> Tensor:
    """Return for maps [K, h, w] a number at each position [h, w], which differs where any channel differs."""
    weights = torch.randn(len(A), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.einsum("k,khw->hw", weights.to(A.device), A.double())


def _is_top_left(changed: Tensor) -> bool:
    """Return True if a mask [h, w] is empty or fills most of a rectangle at the top left.

    The rectangle must have at least half of the mask's height and half of its width.
    """
    height, width = int(changed.any(dim=1).sum()), int(changed.any(dim=0).sum())
    within, sides = int(changed[:height, :width].sum()), (len(changed) // 2, changed.shape[1] // 2)
    filled = within == int(changed.sum()) and 2 * within >= height * width
    return not changed.any() or (filled and height >= sides[0] and width >= sides[1])


def _close(a: Tensor, b: Tensor) -> bool:
    """Return True if the tensors are equal except for rounding."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


# ---- choosing defaults -----------------------------------------------------------------------------------------------


def _default_layers(calls: Sequence[_LayerCall]) -> tuple[Layer, ...]:
    """Return at each resolution the last [N, K, h, w] that is nowhere negative and is not the output of a pooling.

    The Poly-CAM paper calls these the layers at a change of resolution. If a resolution has none, as in networks with
    SiLU or GELU, it is the last output of an activation. If modules share an output, such as a block and its last
    activation, the outermost one gives the name. One of several calls of a module is used only if there is no other.
    """
    usable = [call for call in calls if call.layer.form == "NCHW" and not call.pooled and call.alive]
    last: dict[Grid, Layer] = {}
    for kind in ([call for call in usable if call.activated], [call for call in usable if not call.layer.signed]):
        for some in (kind, [call for call in kind if call.layer.name == call.layer.module]):
            last |= {(call.layer.height, call.layer.width): call.layer for call in some}
    return tuple(sorted(last.values(), key=lambda layer: -layer.positions))


def _default_layer(
    calls: Sequence[_LayerCall], layers: Sequence[Layer], attention_calls: Sequence[_AttentionCall]
) -> Layer | None:
    """Return the deepest layer in which every position still contributes to the logits.

    In a transformer this is the input of the last attention module, the output of the normalisation before it. Later
    tokens of the grid may not contribute, because the logits can depend on the class token alone.
    """
    unpooled = [call for call in calls if not call.pooled]
    # A module that only reorders dimensions does not tell where the network ends.
    made = [call for call in unpooled if call.activated or next(call.module.parameters(), None) is not None]
    if not made:
        return None
    if attention_calls and made[-1].layer.form != "NCHW" and attention_calls[-1].calls_before > 0:
        return calls[attention_calls[-1].calls_before - 1].layer
    if layers and not layers[-1].signed and layers[-1].positions == min(call.layer.positions for call in unpooled):
        return layers[-1]
    return made[-1].layer


def _gap_head(calls: Sequence[_LayerCall], heads: Sequence[_Head], logits: Tensor) -> GapHead | None:
    """Return the linear head if its input equals the mean of a layer over its positions."""
    head = next((h for h in reversed(heads) if torch.equal(h.output.flatten(1), logits)), None)
    if head is None or not head.x.any():
        return None
    means = [call for call in reversed(calls) if call.mean.shape == head.x.shape and _close(call.mean, head.x)]
    return GapHead(means[0].layer, head.weight.detach()) if means else None
