"""Detection of a network's layers, attention modules and linear head from forward passes on an example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camserve_server.errors import Unservable
from camserve_server.models.activations import activation_of, with_activation
from camserve_server.models.cuts import CutMeter, untrained_head_replaced
from camserve_server.models.defaults import choose_defaults
from camserve_server.models.grids import Grids, differences
from camserve_server.models.layers import GapHead, Grid, Layer
from camserve_server.models.trace import Call, HeadCall, Trace, close


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
        no_layer: Reason why there is no default layer; empty if there is one.
        warnings: Sentences about default layers that are not cuts.
    """

    spatial: dict[str, Layer]
    layers: tuple[Layer, ...]
    layer: Layer | None
    classes: int
    gap: GapHead | None = None
    attention: tuple[str, ...] = ()
    attention_prefix: int = 0
    attention_grid: Grid | None = None
    no_layer: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def defaults(self) -> tuple[Layer, ...]:
        """All default layers."""
        return (*self.layers, *([self.layer] if self.layer else []))


def probe(module: nn.Module, example: Tensor, token_grid: Grid | None = None) -> ProbeResult:
    """Detect the structure of a network from forward passes on `example` and variants of it.

    Args:
        module: Network in evaluation mode.
        example: Input [1, C, H, W].
        token_grid: Grid (h, w) of a transformer's tokens; detected if None.

    Raises:
        ValueError: The output of the network is not logits [1, classes].
    """
    trace = _trace(module, example)
    logits = trace.result
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network returns {shape} where logits [1, classes] are expected")
    head = _head(trace)
    with untrained_head_replaced(head) as replaced:
        if replaced:
            trace = _trace(module, example)
        meter = CutMeter(module, example)
        grids = Grids(example.shape[2:], token_grid, meter.shapes, meter.rows)
        spatial = grids.read(trace.calls, _changes(trace))
        defaults = choose_defaults(trace, spatial, meter)
        attention, prefix, grid = _attention(trace, grids)
    measured = {each.name: each for each in (*defaults.layers, defaults.layer) if each is not None}
    return ProbeResult(
        spatial={name: measured.get(name, layer) for name, layer in spatial.items()},
        layers=defaults.layers,
        layer=defaults.layer,
        classes=logits.shape[1],
        gap=_gap_head(module, trace.calls, spatial, head),
        attention=attention,
        attention_prefix=prefix,
        attention_grid=grid,
        no_layer=defaults.no_layer,
        warnings=defaults.warnings,
    )


def _trace(module: nn.Module, image: Tensor) -> Trace:
    """Trace a forward pass, with its autograd graph if the network can be differentiated."""
    try:
        return Trace(module, image).run()
    except (RuntimeError, Unservable):  # quantised networks and ONNX Runtime, for example, have no gradients
        return Trace(module, image, gradients=False).run()


def _changes(trace: Trace) -> dict[str, dict[int, Tensor]]:
    """Return which positions of each output change if the top left quarter of the image changes."""
    _, _, height, width = trace.image.shape
    other = trace.image.clone()
    other[..., : height // 2, : width // 2] *= -1
    # Both passes compute in the same way, so that all other positions keep their bits.
    changed = Trace(trace.module, other, trace.gradients, full=False).run()
    return differences(trace.calls, changed.calls, (height, width))


def _head(trace: Trace) -> HeadCall | None:
    """Return the call of a linear module that computes the logits."""
    logits = trace.result
    return next((h for h in reversed(trace.heads) if torch.equal(h.output.flatten(1), logits)), None)


def _gap_head(
    module: nn.Module, calls: Sequence[Call], spatial: dict[str, Layer], head: HeadCall | None
) -> GapHead | None:
    """Return the linear head if its input equals the mean of a layer over its positions."""
    if head is None or not head.x.any():
        return None
    for call in reversed(calls):
        layer = spatial.get(call.name)
        if layer is None or layer.channels != head.x.shape[1] or call.is_changed_in_place():
            continue
        output = call.output.detach().transpose(0, layer.batch_dim)
        if close(layer.grid(output).mean(dim=(2, 3)), head.x):
            return GapHead(layer, next(name for name, each in module.named_modules() if each is head.module))
    return None


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention(trace: Trace, grids: Grids) -> tuple[tuple[str, ...], int, Grid | None]:
    """Return the names of the attention modules, the prefix and the grid.

    The result is empty unless all modules are supported, run once and have the same tokens as input. It is also empty
    unless the logits depend only on a class token, which is the first token, once the last module has run.
    """
    names = tuple(call.name for call in trace.attention_calls)
    lengths = {None if call.x is None else call.x.shape[1] for call in trace.attention_calls}
    length = lengths.pop() if len(lengths) == 1 and len(set(names)) == len(names) else None
    tokens = None if length is None else grids.tokens_of(length)
    if tokens is None or tokens.prefix + math.prod(tokens.grid) != length or math.prod(tokens.grid) < 2:
        return (), 0, None
    if not _has_class_token(trace, names[-1], tokens.prefix):
        return (), 0, None
    return names, tokens.prefix, tokens.grid


def _has_class_token(trace: Trace, last: str, prefix: int) -> bool:
    """Return True if the logits depend on the first output token of the module `last` and on none of the grid."""

    def logits(disturbed: slice) -> Tensor:
        def disturb(module: nn.Module, args: object, output: Any) -> Any:
            activation = activation_of(output)
            assert activation is not None
            out = activation.clone()
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            out[:, disturbed] += noise[:, disturbed].to(out)
            return with_activation(output, out)

        handle = trace.module.get_submodule(last).register_forward_hook(disturb)
        try:
            with torch.no_grad():
                result: Tensor = trace.module(trace.image)
        finally:
            handle.remove()
        return result

    def logits_depend_on(disturbed: slice) -> bool:
        return not torch.equal(logits(disturbed), logits(slice(0, 0)))

    # The head of an untrained network may be zero; the logits then depend on no token.
    first = logits_depend_on(slice(0, 1)) or not logits_depend_on(slice(1, prefix))
    return prefix > 0 and first and not logits_depend_on(slice(prefix, None))
