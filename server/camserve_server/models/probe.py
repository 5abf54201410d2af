"""What one forward pass shows of a network: its spatial layers, its attention, and where a map should look."""

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
from camserve_server.models.layers import GapHead, Grid, Layer

MAX_PREFIX = 16  # class and distillation tokens, and registers; with more, wrong grids would fit too
_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_ATTENTION_NAME = re.compile(r"(^|\.)(self_?)?(attention|attn)$", re.IGNORECASE)
_ACTIVATION = re.compile(r"(elu|silu|swish|mish|tanh|softplus)(6|me|activation)?$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Probed:
    """What a pass has shown.

    `spatial` are all layers that can be named, in run order. `layers` are the default of methods that look at several,
    fine to coarse; `layer` of those that look at one. `attention` names the global self-attention modules in run order,
    none of them if one is not supported or no class token comes first; their input has `attention_prefix` tokens, then
    `attention_grid`.
    """

    spatial: dict[str, Layer]
    layers: tuple[Layer, ...]
    layer: Layer | None
    classes: int
    gap: GapHead | None = None
    attention: tuple[str, ...] = ()
    attention_prefix: int = 0
    attention_grid: Grid | None = None


def probe(module: nn.Module, example: Tensor, token_grid: Grid | None = None) -> Probed:
    """Runs `example` [1, C, H, W], and variants of it. `token_grid` (h, w) is that of the tokens; found if None.

    Raises ValueError if the network gives anything but logits [1, classes].
    """
    pass_ = _Pass(module, example, token_grid)
    logits = pass_.run()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"it gives {shape} where logits [1, classes] are expected")
    in_order = pass_.in_order()
    runs = [run for run in pass_.named_runs() if run.layer.form != "tokens" or in_order]
    layers = _several(runs)
    attention, prefix, grid = pass_.attention() if in_order else ((), 0, None)
    return Probed(
        spatial={run.layer.name: run.layer for run in runs},
        layers=layers,
        layer=_single(runs, layers, pass_.attended) if in_order else None,
        classes=logits.shape[1],
        gap=_gap(runs, pass_.heads, logits),
        attention=attention,
        attention_prefix=prefix,
        attention_grid=grid,
    )


# ---- watching a pass -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Run:
    """One call that gave a spatial output, and what that was when the call ended; later ones may work in place."""

    layer: Layer
    module: nn.Module
    output: Tensor
    version: int
    mean: Tensor  # [1, K]
    alive: bool  # untrained networks may begin with branches of zeros, of which no sign can be told
    mark: Tensor  # [h, w], differs where the output does
    pooled: bool = False
    activated: bool = False


@dataclass(eq=False)
class _Attended:
    """One call of an attention module: how many runs had ended when it began, and its input if it is supported."""

    name: str
    began: int
    x: Tensor | None = None


@dataclass(eq=False)
class _Head:
    """One call of a module that may make the logits."""

    weight: Tensor
    x: Tensor
    output: Tensor


@dataclass(eq=False)
class _Pass:
    """Takes note of what happens in a forward pass of `module` on `example`."""

    module: nn.Module
    example: Tensor
    token_grid: Grid | None
    runs: list[_Run] = field(default_factory=list)
    attended: list[_Attended] = field(default_factory=list)
    heads: list[_Head] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    def run(self) -> Any:
        """What the module makes of the example."""
        with torch.no_grad(), self.watched():
            return self.module(self.example)

    @contextmanager
    def watched(self) -> Iterator[None]:
        attending = _attending(self.module)
        handles = []
        for name, module in self.module.named_modules():
            if name in attending:
                handles.append(module.register_forward_pre_hook(self._begin(name)))
                handles.append(module.register_forward_hook(self._attend))
            # Inside of an attention module, heads and keys take the place of channels and positions.
            if name and not any(name.startswith(f"{outer}.") for outer in attending):
                handles.append(module.register_forward_hook(self._end(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, name: str) -> Any:
        return lambda module, args: self.attended.append(_Attended(name, len(self.runs)))

    def _attend(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        x = args[0] if args else None
        out = output[0] if isinstance(output, tuple) else output
        if isinstance(x, Tensor) and x.ndim == 3 and len(x) == 1 and isinstance(out, Tensor) and is_supported(module):
            # Whatever else it was given, such as a mask or other keys, would show in its output.
            again = attention_with_output(module, x)[1]
            if again.shape == out.shape and _close(again, out):
                self.attended[-1].x = x

    def _end(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            self.calls[name] += 1
            if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != 1:
                return
            if isinstance(module, nn.Conv2d) and output.ndim == 4:
                self.grids.append((output.shape[2], output.shape[3]))
            if isinstance(module, (nn.Linear, nn.Conv2d)) and args and isinstance(args[0], Tensor):
                self._note_head(module, args[0], output)
            self._note_run(f"{name}#{self.calls[name]}", module, output)

        return hook

    def _note_head(self, module: nn.Linear | nn.Conv2d, x: Tensor, output: Tensor) -> None:
        weight = module.weight.flatten(1)
        if x.shape[1:].numel() == weight.shape[1] and output.shape[1:].numel() == len(weight):
            self.heads.append(_Head(weight, x.flatten(1).clone(), output))

    def _note_run(self, name: str, module: nn.Module, output: Tensor) -> None:
        layer = self._layer(name, output)
        if layer is None or layer.positions < 2:
            return
        A = layer.grid(output)
        layer = replace(layer, signed=bool((A < 0).any()))
        mean, alive, mark = A.mean(dim=(2, 3)), bool(A.any()), _mark(A[0])
        self.runs.append(_Run(layer, module, output, output._version, mean, alive, mark))

    def _layer(self, name: str, output: Tensor) -> Layer | None:
        """How the output lies in space, if it does."""
        if 0 in output.shape:
            return None
        if output.ndim == 4:
            _, a, b, c = output.shape
            if c > 1 and bool((output >= 0).all()) and bool(((output.sum(-1) - 1).abs() < 1e-3).all()):
                return None  # attention, in a module of another name: each row is a distribution
            if b * c > 1 and self._stretch(a, b) < self._stretch(b, c):
                return Layer(name, c, a, b, form="NHWC")
            return Layer(name, a, b, c)
        if output.ndim == 3:
            grid = self.find_grid(output.shape[1])
            if grid is not None:
                h, w = grid
                return Layer(name, output.shape[2], h, w, form="tokens", prefix=output.shape[1] - h * w)
        return None

    def _stretch(self, h: int, w: int) -> float:
        """How far the proportions are from the input's."""
        return abs(math.log(h * self.example.shape[3] / (w * self.example.shape[2])))

    def find_grid(self, tokens: int) -> Grid | None:
        """The grid that leaves the fewest tokens over: the one configured, or that of a convolution that has run."""
        if self.token_grid is not None:
            return self.token_grid if 0 <= tokens - math.prod(self.token_grid) < math.prod(self.token_grid) else None
        fits = [grid for grid in self.grids if 0 <= tokens - math.prod(grid) <= MAX_PREFIX]
        return max(reversed(fits), key=math.prod, default=None)

    def named_runs(self) -> list[_Run]:
        """The runs, where a module that ran once has no number; which of them are pooled or activated is known now."""
        pooled = {id(run.output) for run in self.runs if "Pool" in type(run.module).__name__}
        active = {(id(run.output), run.version) for run in self.runs if _ACTIVATION.search(type(run.module).__name__)}
        for run in self.runs:
            if self.calls[run.layer.module] == 1:
                run.layer = replace(run.layer, name=run.layer.module)
            run.pooled = id(run.output) in pooled
            run.activated = (id(run.output), run.version) in active
        return self.runs

    def in_order(self) -> bool:
        """Whether tokens are where the grid has them: row by row, behind the prefix.

        What the top left of the image changes must lie at the top left, as long as a layer has not mixed all tokens.
        """
        _, _, height, width = self.example.shape
        other = self.example.clone()
        other[..., : height // 2, : width // 2] *= -1
        again = _Pass(self.module, other, self.token_grid)
        again.run()
        marks = {run.layer.name: run.mark for run in again.runs}
        return all(
            _top_left(run.mark != marks[run.layer.name])
            for run in self.runs
            if run.layer.form == "tokens" and run.layer.name in marks
        )

    def attention(self) -> tuple[tuple[str, ...], int, Grid | None]:
        """The modules, prefix and grid; nothing unless all are supported, run once and see the same tokens.

        Nor without a class token at their head: the logits hang on it alone, once the last module has run.
        """
        names = tuple(call.name for call in self.attended)
        lengths = {None if call.x is None else call.x.shape[1] for call in self.attended}
        tokens = lengths.pop() if len(lengths) == 1 and len(set(names)) == len(names) else None
        grid = None if tokens is None else self.find_grid(tokens)
        if tokens is None or grid is None or math.prod(grid) < 2:
            return (), 0, None
        prefix = tokens - math.prod(grid)
        return (names, prefix, grid) if self._class_token(names[-1], prefix) else ((), 0, None)

    def _class_token(self, last: str, prefix: int) -> bool:
        """Whether the logits hang on the first token that the last attention puts out, and on none of the grid."""

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

        def matter(disturbed: slice) -> bool:
            return not torch.equal(logits(disturbed), logits(slice(0, 0)))

        # The head of an untrained network may be zero; then nothing matters.
        first = matter(slice(0, 1)) or not matter(slice(1, prefix))
        return prefix > 0 and first and not matter(slice(prefix, None))


def _attending(module: nn.Module) -> set[str]:
    """The innermost modules that are attention by name or kind: a block that is called so holds another."""
    found = [
        name
        for name, m in module.named_modules()
        if _ATTENTION_NAME.search(name) or any(_ATTENTION.search(kind.__name__) for kind in type(m).__mro__)
    ]
    return {name for name in found if name and not any(inner.startswith(f"{name}.") for inner in found)}


def _mark(A: Tensor) -> Tensor:
    """[K, h, w] → [h, w]: a number for each position, another one wherever the channels differ."""
    weights = torch.randn(len(A), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.einsum("k,khw->hw", weights.to(A.device), A.double())


def _top_left(changed: Tensor) -> bool:
    """Whether nothing is true in [h, w], or most of a rectangle at the top left, with half its sides or more."""
    height, width = int(changed.any(dim=1).sum()), int(changed.any(dim=0).sum())
    within, sides = int(changed[:height, :width].sum()), (len(changed) // 2, changed.shape[1] // 2)
    filled = within == int(changed.sum()) and 2 * within >= height * width
    return not changed.any() or (filled and height >= sides[0] and width >= sides[1])


def _close(a: Tensor, b: Tensor) -> bool:
    """The same but for rounding."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


# ---- choosing --------------------------------------------------------------------------------------------------------


def _several(runs: Sequence[_Run]) -> tuple[Layer, ...]:
    """At each resolution the last [N, K, h, w] that is nowhere negative and that no pooling has made.

    That is what the Poly-CAM paper calls the layers at a change of resolution. Where there is none, as in networks of
    SiLU or GELU, it is the last that an activation has made. Of modules that share an output (a block and its last
    activation) the outermost gives its name. One call of many is taken only where there is nothing else.
    """
    usable = [run for run in runs if run.layer.form == "NCHW" and not run.pooled and run.alive]
    last: dict[Grid, Layer] = {}
    for kind in ([run for run in usable if run.activated], [run for run in usable if not run.layer.signed]):
        for some in (kind, [run for run in kind if run.layer.name == run.layer.module]):
            last |= {(run.layer.height, run.layer.width): run.layer for run in some}
    return tuple(sorted(last.values(), key=lambda layer: -layer.positions))


def _single(runs: Sequence[_Run], layers: Sequence[Layer], attended: Sequence[_Attended]) -> Layer | None:
    """Where a method of one layer looks: the deepest one of which every position still counts.

    In a transformer that is what enters the last attention, the output of the normalisation before it: whatever follows
    may reach the logits through the class token alone.
    """
    unpooled = [run for run in runs if not run.pooled]
    # A layer that only changes the order of the dimensions says nothing of where the network ends.
    made = [run for run in unpooled if run.activated or next(run.module.parameters(), None) is not None]
    if not made:
        return None
    if attended and made[-1].layer.form != "NCHW" and attended[-1].began > 0:
        return runs[attended[-1].began - 1].layer
    if layers and not layers[-1].signed and layers[-1].positions == min(run.layer.positions for run in unpooled):
        return layers[-1]
    return made[-1].layer


def _gap(runs: Sequence[_Run], heads: Sequence[_Head], logits: Tensor) -> GapHead | None:
    """The head, if the logits are a linear function of some layer's mean; seen by their values."""
    head = next((h for h in reversed(heads) if torch.equal(h.output.flatten(1), logits)), None)
    if head is None or not head.x.any():
        return None
    means = [run for run in reversed(runs) if run.mean.shape == head.x.shape and _close(run.mean, head.x)]
    return GapHead(means[0].layer, head.weight.detach()) if means else None
