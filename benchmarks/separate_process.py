"""Separate process for other implementations, with the default allocator settings of glibc.

The allocator settings of camserve (docs/decisions/0008-allocator.md) apply to a whole process and would speed up other
implementations, whose users do not have these settings. They are therefore measured in both kinds of process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import peers, subjects
from benchmarks.limit import forward, timed
from benchmarks.peers import LIBRARIES, OptiCam
from benchmarks.timing import Timed, clock
from camserve_server.config import ModelConfig
from camserve_server.plan import Image
from camserve_server.torch_setup.allocator import keep_memory

P = ParamSpec("P")
T = TypeVar("T")


class SeparateProcess:
    """Process that starts with the first call and ends with `close`.

    The process builds the networks from their configurations. It keeps freed memory only if `keeps_memory` is True.
    """

    def __init__(self, device: torch.device, *, keeps_memory: bool = False) -> None:
        self._device = str(device)
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawn, keep_memory if keeps_memory else None)

    def __call__(
        self,
        work: Callable[Concatenate[ModelConfig, str, P], T],
        config: ModelConfig,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run a function in the process and return its result."""
        return self._pool.submit(work, config, self._device, *args, **kwargs).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


# ---- functions that run in the process -------------------------------------------------------------------------------


def made(config: ModelConfig, device: str) -> tuple[nn.Module, Image]:
    """Return the original network in contiguous format and the photograph as its input."""
    return _made(config.model_dump_json(), device)


@cache
def _made(config: str, device: str) -> tuple[nn.Module, Image]:
    return subjects.made(ModelConfig.model_validate_json(config), torch.device(device))


def plain(config: ModelConfig, device: str, batch: int, rows: int) -> Timed:
    """Time plain forward passes."""
    net, image = made(config, device)
    return timed(forward, net, image.tensor.repeat(batch, 1, 1, 1), rows)


def poly_cam(config: ModelConfig, device: str, layer: str, n: int) -> Timed:
    """Time the official Poly-CAM loop for the first n channels of a layer."""
    net, image = made(config, device)
    return peers.timed_poly_cam(net, image.tensor[None], _activations(net, image, layer)[:n])


def score_cam(config: ModelConfig, device: str, name: str, layer: str, n: int, batch: int) -> Timed:
    """Time the Score-CAM of a library for the first n channels of a layer."""
    net, image = made(config, device)
    A = _activations(net, image, layer)[:n]
    library = LIBRARIES[name](net, layer, image.tensor)
    try:
        return peers.timed_weights(library, A, 0, batch)
    finally:
        library.close()


def opti_cam(config: ModelConfig, device: str, layer: str, index: int, steps: int) -> Timed:
    """Time iterations of the official Opti-CAM loop."""
    net, image = made(config, device)
    return OptiCam(net, layer, image.tensor, image.mean, image.std, index).timed(steps)


def curves(config: ModelConfig, device: str, S: NDArray[np.float32], index: int, steps: int) -> Timed:
    """Time the simple loop for both curves of a map S [H, W]."""
    net, image = made(config, device)
    start = clock(image.tensor.device)
    peers.curves(net, image.tensor, torch.from_numpy(S).to(image.tensor), index, steps)
    return Timed(2 * steps, clock(image.tensor.device) - start)


def _activations(net: nn.Module, image: Image, layer: str) -> Tensor:
    (A,) = subjects.nets.activations(net, image.tensor[None], [layer])
    return torch.as_tensor(A)
