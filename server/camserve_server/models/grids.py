"""Grids of layers: which outputs are maps of the image, and where their positions are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from camserve_server.models.layers import Form, Grid, Layer, ReadOnlyOutput, has_aspect
from camserve_server.models.trace import Call

# Largest number of tokens outside of the grid: class tokens, distillation tokens and registers. A larger limit would
# accept wrong grids.
MAX_EXTRA = 16


@dataclass(frozen=True)
class Tokens:
    """Layout of L tokens: the tokens of `grid` in row order, after `prefix` others."""

    grid: Grid
    prefix: int


class Grids:
    """Layouts of the outputs of a network.

    A layout is accepted if its aspect ratio matches the image, if a change of the top left corner of the image changes
    the output at the top left, and if its grid is known. A grid is known if it is the output of a convolution on a
    known grid, if it is a known grid halved several times, or if the change shows it: some positions change and others
    do not.

    Args:
        size: Size (H, W) of the image.
        token_grid: Configured grid of tokens, or None.
        shapes: Shape of the output of each call ("NAME#n") for a batch of several images.
        rows: Number of these images.
    """

    def __init__(
        self, size: Sequence[int], token_grid: Grid | None, shapes: Mapping[str, Sequence[int]], rows: int
    ) -> None:
        self._size = size
        self._token_grid = token_grid
        self._shapes = shapes
        self._rows = rows
        self._convolved: dict[Grid, None] = {}
        self._known: set[Grid] = set()
        self._learn((size[0], size[1]))
        self._tokens: dict[int, Tokens] = {}  # by number of tokens
        self._extras: dict[int, int] = {}  # number of tokens outside of the grid → number of those before it
        self._in_order = True

    def read(self, calls: Sequence[Call], changed: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Layer]:
        """Return the layer of each call whose output is a map of the image, in the order of the calls.

        Args:
            calls: Calls on one image.
            changed: Masks of the positions that change if the top left corner of the image changes: by name of the call
                and dimension of the channels.
        """
        maps = self._read_maps(calls, changed)
        self._read_tokens(calls, changed)
        layers: dict[str, Layer] = {}
        for call in calls:
            layer = maps.get(call.name) or self._token_layer(call)
            if layer is not None and layer.positions > 1:
                layers[call.name] = replace(
                    layer, signed=call.signed, read_only=isinstance(call.module, ReadOnlyOutput)
                )
        return layers

    def tokens_of(self, count: int) -> Tokens | None:
        """Return the layout of so many tokens; None if it is unknown."""
        return self._tokens.get(count) or self._usual_layout(count)

    # ---- the batch ---------------------------------------------------------------------------------------------------

    def _batch_dim(self, call: Call) -> int | None:
        """Return the dimension whose size is the number of images; None if there is none."""
        name = call.name if "#" in call.name else f"{call.name}#1"
        shape, many = call.output.shape, self._shapes.get(name, ())
        for dim in (0, 1) if len(shape) == 3 else (0,):
            if shape[dim] == 1 and tuple(many) == (*shape[:dim], self._rows, *shape[dim + 1 :]):
                return dim
        return None

    # ---- maps --------------------------------------------------------------------------------------------------------

    def _read_maps(self, calls: Sequence[Call], changed: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Layer]:
        maps: dict[str, Layer] = {}
        wrong, shown = set[tuple[Form, Sequence[int]]](), set[str]()
        for call in calls:
            if call.output.ndim != 4 or self._batch_dim(call) is None:
                continue
            self._learn_from_convolution(call)
            masks = changed.get(call.name, {})
            readings = [(layer, masks.get(1 if layer.form == "NCHW" else 3)) for layer in self._maps(call)]
            gaps = not call.signed or call.is_changed_in_place()
            elsewhere = [layer for layer, mask in readings if mask is not None and _is_elsewhere(mask, gaps)]
            for layer, mask in readings:
                # Blocks of tokens may look like maps in two ways. If one is wrong, the other one needs evidence.
                if layer in elsewhere or (elsewhere and not _shows_grid(mask)):
                    wrong.add((layer.form, call.output.shape))
                elif call.name not in maps and self._is_known(layer, mask):
                    maps[call.name] = layer
                    shown.update([call.name] if _shows_grid(mask) else [])
        # A layout that is wrong for one call is wrong for every call of the same shape, unless the change shows it.
        shapes = {call.name: call.output.shape for call in calls}
        return {name: layer for name, layer in maps.items() if name in shown or (layer.form, shapes[name]) not in wrong}

    def _maps(self, call: Call) -> Iterator[Layer]:
        """Yield the readings of a 4-D output with the aspect ratio of the image, the better one first."""
        _, a, b, c = call.output.shape
        nchw, nhwc = Layer(call.name, a, b, c), Layer(call.name, c, a, b, form="NHWC")
        readings = [nchw, nhwc]
        if b * c > 1 and self._distortion(a, b) < self._distortion(b, c):
            readings.reverse()
        if isinstance(call.module, nn.Conv2d):
            readings = [nchw]
        for each in readings:
            grid = (each.height, each.width)
            if has_aspect(grid, self._size) or (each.form == "NCHW" and grid in self._convolved):
                yield each

    def _distortion(self, h: int, w: int) -> float:
        """Return the difference between the aspect ratio of a grid and that of the image, as a logarithm."""
        return abs(math.log(h * self._size[1] / (w * self._size[0])))

    def _is_known(self, layer: Layer, mask: Tensor | None) -> bool:
        grid = (layer.height, layer.width)
        if _shows_grid(mask):
            self._learn(grid)
        return grid in self._known

    def _learn(self, grid: Grid) -> None:
        """Add a grid and its halves, rounded up or down."""
        if grid not in self._known and min(grid) > 0:
            self._known.add(grid)
            h, w = grid
            for half in {((h + up) // 2, (w + up) // 2) for up in (0, 1)}:
                self._learn(half)

    def _learn_from_convolution(self, call: Call) -> None:
        if isinstance(call.module, nn.Conv2d) and call.input is not None and call.input.ndim == 4:
            h, w = call.input.shape[2:]
            # Functions, such as a padding or a resizing to whole patches, may have changed a known grid a little.
            if any(abs(h - known[0]) <= 2 and abs(w - known[1]) <= 2 for known in self._known):
                grid = (call.output.shape[2], call.output.shape[3])
                self._learn(grid)
                self._convolved.pop(grid, None)
                self._convolved[grid] = None  # the latest one is the last

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def _token_layer(self, call: Call) -> Layer | None:
        batch_dim = self._batch_dim(call)
        if call.output.ndim != 3 or batch_dim is None:
            return None
        tokens, channels = self._tokens.get(call.output.shape[1 - batch_dim]), call.output.shape[2]
        if tokens is None:
            return None
        h, w = tokens.grid
        return Layer(call.name, channels, h, w, form="tokens", prefix=tokens.prefix, batch_dim=batch_dim)

    def _read_tokens(self, calls: Sequence[Call], changed: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Find the layout of the tokens for each number of tokens."""
        masks: dict[int, list[Tensor]] = {}
        for call in calls:
            batch_dim = self._batch_dim(call)
            if call.output.ndim == 3 and batch_dim is not None:
                mask = changed.get(call.name, {}).get(2)
                masks.setdefault(call.output.shape[1 - batch_dim], []).extend([] if mask is None else [mask])
        shown, open_ = dict[int, Tokens](), list[int]()
        in_order = True
        for count, several in masks.items():
            if not any(mask.any() and not mask.all() for mask in several):
                open_.append(count)
                continue
            fit = next((each for each in self._layouts(count) if all(_fits(each, m) for m in several)), None)
            in_order = in_order and (fit is not None or not self._may_be_tokens(count))
            if fit is not None:
                shown[count] = fit
                self._learn(fit.grid)
        self._in_order = in_order
        self._extras = {count - math.prod(each.grid): each.prefix for count, each in shown.items()}
        self._tokens = shown if in_order else {}
        for count in open_:
            layout = self._usual_layout(count)
            if layout is not None:
                self._tokens[count] = layout

    def _usual_layout(self, count: int) -> Tokens | None:
        """Return the layout of tokens whose order nothing shows, as after a layer that has mixed all of them.

        The order is that of the other tokens. If the grid is not that of a convolution or configured, the number of
        tokens outside of the grid must also be that of other tokens.
        """
        for each in self._layouts(count) if self._in_order else ():
            extra = count - math.prod(each.grid)
            usual = extra == 0 or extra in self._extras or each.grid in self._convolved or each.grid == self._token_grid
            if usual and each.prefix == self._extras.get(extra, extra):
                return each
        return None

    def _may_be_tokens(self, count: int) -> bool:
        return next(self._layouts(count), None) is not None

    def _layouts(self, count: int) -> Iterator[Tokens]:
        """Yield the possible layouts of so many tokens: the fewest tokens outside of the grid first, all before it."""
        if self._token_grid is not None and 0 <= count - math.prod(self._token_grid) < math.prod(self._token_grid):
            grids = [self._token_grid]
        elif self._token_grid is not None:
            grids = []
        else:
            known = [*reversed(self._convolved), *sorted(self._known - set(self._convolved))]
            grids = [grid for grid in known if 0 <= count - math.prod(grid) <= MAX_EXTRA and math.prod(grid) > 1]
            grids.sort(key=lambda grid: -math.prod(grid))
        for grid in grids:
            extra = count - math.prod(grid)
            for prefix in range(extra, -1, -1):
                yield Tokens(grid, prefix)


def _fits(layout: Tokens, changed: Tensor) -> bool:
    """Return True if the changed tokens [L] are at the top left of the grid."""
    h, w = layout.grid
    return _is_top_left(changed[layout.prefix : layout.prefix + h * w].view(h, w))


def _is_top_left(changed: Tensor) -> bool:
    """Return True if a mask [h, w] is empty or fills most of a rectangle at the top left.

    The rectangle must have at least half of the mask's height and half of its width.
    """
    height, width = int(changed.any(dim=1).sum()), int(changed.any(dim=0).sum())
    within, sides = int(changed[:height, :width].sum()), (len(changed) // 2, changed.shape[1] // 2)
    filled = within == int(changed.sum()) and 2 * within >= height * width
    return not bool(changed.any()) or (filled and height >= sides[0] and width >= sides[1])


def _shows_grid(changed: Tensor | None) -> bool:
    """Return True if some positions of a mask [h, w] have changed at the top left, and others have not changed."""
    return changed is not None and bool(changed.any()) and not bool(changed.all()) and _is_top_left(changed)


def _is_elsewhere(changed: Tensor, gaps: bool) -> bool:
    """Return True if a mask [h, w] is true outside of the top left quarter, but not in most of that quarter.

    Args:
        changed: Positions that change if the top left quarter of the image changes.
        gaps: True if the output may be zero at some positions for both images, as after a ReLU.
    """
    h, w = len(changed) // 2, changed.shape[1] // 2
    within = int(changed[:h, :w].sum())
    return within < int(changed.sum()) and within < (0.5 if gaps else 0.75) * h * w


def differences(calls: Sequence[Call], others: Sequence[Call], size: Sequence[int]) -> dict[str, dict[int, Tensor]]:
    """Return the masks of the positions at which the outputs of two traces of a network differ.

    Args:
        calls: Calls of the first trace.
        others: Calls of the second trace.
        size: Size (H, W) of the images.

    Returns:
        By name of the call and by dimension of the channels: masks [h, w] of outputs that may be maps, [L] of outputs
        that may be tokens.
    """
    outputs = {call.name: call.output for call in others}
    masks: dict[str, dict[int, Tensor]] = {}
    for call in calls:
        other = outputs.get(call.name)
        if other is None or other.shape != call.output.shape:
            continue
        # A later module may have changed both outputs in place, at the same positions.
        changed = call.output.detach() != other.detach()
        if changed.ndim == 3:
            masks[call.name] = {2: changed.any(dim=2).flatten()} if 1 in changed.shape[:2] else {}
        elif len(changed) == 1:
            dims = [dim for dim in (1, 3) if has_aspect(_without(dim, changed.shape), size)]
            masks[call.name] = {dim: changed.any(dim=dim)[0] for dim in dims}
    return masks


def _without(dim: int, shape: Sequence[int]) -> Grid:
    h, w = (shape[i] for i in (1, 2, 3) if i != dim)
    return h, w
