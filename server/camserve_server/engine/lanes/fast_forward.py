"""Forward pass for batches without hooks: compiled, in OpenVINO, or replayed as a CUDA graph on a GPU."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from camserve_server.engine.lanes.cuda_graph import record
from camserve_server.engine.lanes.openvino_forward import OpenVinoForward
from camserve_server.models.model import Model, Precision
from camserve_server.torch_setup.arithmetic import gpu_arithmetic

log = structlog.get_logger()
ForwardPass = Callable[[Tensor], Tensor]  # [N, C, H, W] → logits [N, classes]

# Largest difference of the logits, as a share of the largest logit, that another order of additions can cause.
LOGIT_TOLERANCE: dict[Precision, float] = {"fp64": 1e-9, "fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2, "fp16": 1e-2}
# OpenVINO is used if it is at least this many times as fast as the network, because it needs memory for its weights.
OPENVINO_SPEED = 1.15
COMPARED_PASSES = 5
COMPILE = "torch.compile"
# torch.compile runs the ninth variant of a function without compiling it. Variants are the devices, precisions and
# batch sizes of all networks of a class, of which a server with several GPUs and models has more.
MAX_VARIANTS = 100_000


class GraphedForward:
    """Forward pass recorded as a CUDA graph.

    The first call records the kernels. Later calls launch all of them at once; their inputs must have the shape of the
    first.

    Args:
        forward: Forward pass to record.
    """

    def __init__(self, forward: ForwardPass) -> None:
        self._forward = forward
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None = None

    def __call__(self, X: Tensor) -> Tensor:
        """Return the logits [N, classes] of X [N, C, H, W]."""
        if self._recorded is None:
            x = X.clone()
            graph, y = record(lambda: self._forward(x), X.device)
            self._recorded = graph, x, y
        graph, x, y = self._recorded
        x.copy_(X)
        graph.replay()
        return y.clone()  # the next replay overwrites y

    def forget(self) -> None:
        """Free the memory of the recording. The next call records the same kernels again."""
        self._recorded = None


def forget_recording(model: Model) -> None:
    """Free the memory that the fast forward pass of a model keeps between batches."""
    if isinstance(model.fast_forward, GraphedForward):
        model.fast_forward.forget()


@torch.no_grad()
def build_fast_forward(model: Model, size: int) -> ForwardPass | None:
    """Build a faster forward pass for batches without hooks, and set `compiled` of the model.

    Each technique (torch.compile or OpenVINO if the model asks for it, CUDA graphs on a GPU) is used only if it runs
    and its logits agree with those of the network, and OpenVINO only if it is faster.

    Args:
        model: Model to accelerate.
        size: Number of rows of each batch.

    Returns:
        A function from [size, C, H, W] to logits [size, classes], or None if no technique applies. Only the thread that
        calls `build_fast_forward` may call it.
    """
    model.compiled = False
    if not (model.compile or model.openvino) and model.device.type != "cuda":
        return None
    shape = (size, model.preprocessing.channels, *model.preprocessing.size)
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    X = X.to(model.device, model.compute_dtype, memory_format=model.memory_format)
    with gpu_arithmetic(tf32=model.precision == "tf32"):
        return _accelerated(model, X)


def _accelerated(model: Model, X: Tensor) -> ForwardPass | None:
    logits = model.module(X)
    # The copy has no hooks: hooks on the module itself must not be compiled and must not cause a recompilation.
    plain = _copy_with_shared_weights(model.module) if model.compile else model.module
    forward: ForwardPass = plain
    for name, technique in _techniques(model, X):
        try:
            with _many_variants() if model.compile else nullcontext():
                faster = technique(forward)
                faster(torch.zeros_like(X))  # records with another input, so that a constant answer shows below
            tolerance = LOGIT_TOLERANCE[model.precision] * float(logits.abs().max())
            agree = torch.allclose(faster(X), logits, rtol=0, atol=tolerance)
            reason = "" if agree else "its logits differ from those of the network"
            if isinstance(faster, OpenVinoForward) and not reason:
                reason = _too_slow(faster, forward, X)
        except Exception as error:  # a network may contain code that cannot be compiled or recorded
            reason = f"{type(error).__name__}: {error}"
        if reason:
            log.warning(
                "a faster forward pass is not used", model=model.name, way=name, reason=reason.partition("\n")[0]
            )
        else:
            forward = faster
            model.compiled |= name == COMPILE
    return None if forward is plain else forward


def _many_variants() -> AbstractContextManager[None]:
    """Let torch.compile compile up to `MAX_VARIANTS` variants of a function inside the context."""
    from torch._dynamo import config  # slow to import, so only where networks are compiled

    patch: Any = config.patch
    context: AbstractContextManager[None] = patch(
        cache_size_limit=MAX_VARIANTS, accumulated_cache_size_limit=MAX_VARIANTS
    )
    return context


def _too_slow(faster: ForwardPass, plain: ForwardPass, X: Tensor) -> str:
    """Return why a forward pass is not worth its memory, or an empty string."""
    seconds: dict[ForwardPass, list[float]] = {plain: [], faster: []}
    for _ in range(COMPARED_PASSES):  # alternately, so that other processes slow down both
        for forward, times in seconds.items():
            start = time.perf_counter()
            forward(X)
            times.append(time.perf_counter() - start)
    speed = median(seconds[plain]) / median(seconds[faster])
    return "" if speed >= OPENVINO_SPEED else f"it is only {speed:.2f} times as fast as the network"


def _copy_with_shared_weights(module: nn.Module) -> nn.Module:
    weights = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(weight): weight for weight in weights})


def _techniques(model: Model, X: Tensor) -> Iterator[tuple[str, Callable[[ForwardPass], ForwardPass]]]:
    if model.compile:
        yield COMPILE, partial(torch.compile, dynamic=False, options={"compile_threads": 1})
    if model.openvino:
        yield "OpenVINO", lambda _: OpenVinoForward(model, X)
    if model.device.type == "cuda":
        yield "CUDA graphs", GraphedForward
