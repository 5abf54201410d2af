"""The network's forward pass where nobody looks at a layer: compiled, as configured, and as a CUDA graph on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import structlog
import torch
from torch import Tensor, nn

from camserve_server.engine.lanes.work import arithmetic
from camserve_server.models.model import Model, Precision

log = structlog.get_logger()
Forward = Callable[[Tensor], Tensor]  # [N, C, H, W] → logits [N, classes]

# How far logits may differ, as a share of the largest: so much another order of sums may bring.
AGREES: dict[Precision, float] = {"fp64": 1e-9, "fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}


class Graphed:
    """Records the kernels of a forward pass at its first input; others of that shape launch them all at once."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None = None

    def __call__(self, X: Tensor) -> Tensor:
        """Logits of X [N, C, H, W]."""
        if self._recorded is None:
            with torch.cuda.device(X.device):
                self._recorded = self._record(X)
        graph, x, y = self._recorded
        x.copy_(X)
        graph.replay()
        return y.clone()  # the next replay writes over it

    def _record(self, X: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        x, graph = X.clone(), torch.cuda.CUDAGraph()
        before, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(before)
        with torch.cuda.stream(aside):  # as recording asks for: whatever is made the first time is made by then
            for _ in range(3):
                self._forward(x)
        before.wait_stream(aside)
        try:
            # Other threads may copy pictures to the device meanwhile.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                y = self._forward(x)
        finally:
            torch.cuda.set_stream(before)  # a recording that fails at its end does not do so by itself
        return graph, x, y


@torch.no_grad()
def bare(model: Model, size: int) -> Forward | None:
    """The forward pass of batches of `size` rows, if there is a faster one than the module's own that agrees with it.

    To be called on the thread that runs it.
    """
    if not model.compile and model.device.type != "cuda":
        return None
    shape = (size, model.preprocessing.channels, *model.preprocessing.size)
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    X = X.to(model.device, model.arithmetic, memory_format=torch.channels_last)
    with arithmetic(model):
        return _found(model, X)


def _found(model: Model, X: Tensor) -> Forward | None:
    logits = model.module(X)
    # A copy of its own: hooks on the module itself must neither be compiled nor have it compiled anew.
    plain = _sharing_weights(model.module) if model.compile else model.module
    found: Forward = plain
    for name, way in _ways(model):
        try:
            faster = way(found)
            faster(torch.zeros_like(X))  # what is recorded must not be the answer to this one input
            agree = torch.allclose(faster(X), logits, rtol=0, atol=AGREES[model.precision] * float(logits.abs().max()))
            reason = "" if agree else "other logits than the network's own"
        except Exception as error:  # a network may do what neither can follow
            reason = f"{type(error).__name__}: {error}"
        if reason:
            log.warning("the network runs without", model=model.name, way=name, reason=reason.partition("\n")[0])
        else:
            found = faster
    return None if found is plain else found


def _sharing_weights(module: nn.Module) -> nn.Module:
    weights = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(weight): weight for weight in weights})


def _ways(model: Model) -> Iterator[tuple[str, Callable[[Forward], Forward]]]:
    if model.compile:
        yield "torch.compile", partial(torch.compile, dynamic=False, options={"compile_threads": 1})
    if model.device.type == "cuda":
        yield "CUDA graphs", Graphed
