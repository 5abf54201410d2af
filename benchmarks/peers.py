"""Other implementations: transcriptions of the official loops, and Score-CAM of other libraries.

They use the original network in contiguous memory format, and nothing else runs during their measurements.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import NOT_MEASURED
from benchmarks.timing import Timed, clock
from tests.oracles.insertion_deletion import gaussian_blur

LOOP = 32  # batch size of the official loops


def _needs_warm_up(x: Tensor) -> bool:
    """Return True if the first passes of a thread are slow: cuDNN chooses its kernels for each thread and shape."""
    return x.is_cuda


# ---- Poly-CAM: github.com/andralex8/polycam --------------------------------------------------------------------------


def scaled(A: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale each channel of A [K, h, w] to [0, 1] by two percentiles and resize it to [K, H, W]."""
    flat = A.flatten(1).cpu().numpy()
    low, high = (torch.from_numpy(np.percentile(flat, q, axis=1)).to(A)[:, None, None] for q in (0.1, 99.9))
    scaled = ((A - low) / high.clamp(min=1e-12)).clamp(0, 1)
    return F.interpolate(scaled[None], size, mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def poly_cam_weights(net: nn.Module, x: Tensor, A: Tensor, c: int, p: Tensor, batch: int = LOOP) -> Tensor:
    """Return the PCAM± weights [K] of one level.

    The loop creates all masks and their complements at once, and runs two passes for each batch of channels.

    Args:
        net: The network.
        x: The image [1, 3, H, W].
        A: The activations [K, h, w].
        c: The class index.
        p: Probability of the class for x.
        batch: Number of channels in a batch.
    """
    masks = scaled(A, (x.shape[2], x.shape[3]))[:, None]
    reverse = 1 - masks
    shown, hidden = A.new_zeros(len(A)), A.new_zeros(len(A))
    for start in range(0, len(A), batch):
        rows = slice(start, start + batch)
        shown[rows] = net(x * masks[rows]).softmax(dim=1)[:, c]
        hidden[rows] = net(x * reverse[rows]).softmax(dim=1)[:, c]
    return (p + shown - hidden).relu()


def timed_poly_cam(net: nn.Module, x: Tensor, A: Tensor) -> Timed:
    """Time the rows of one level, after one pass that is not timed."""
    p = torch.tensor(0.5, device=x.device)
    with torch.no_grad():
        net(x.expand(LOOP, -1, -1, -1) if _needs_warm_up(x) else x)
    start = clock(x.device)
    poly_cam_weights(net, x, A, 0, p)
    return Timed(2 * len(A), clock(x.device) - start)


@torch.no_grad()
def poly_cam(net: nn.Module, x: Tensor, activations: list[Tensor], c: int, batch: int = LOOP) -> Tensor:
    """Return the map [H, W] in [0, 1] from activations [K, h, w], from fine to coarse."""
    p = net(x).softmax(dim=1)[0, c]
    P: Tensor | None = None
    for A in reversed(activations):
        S = (poly_cam_weights(net, x, A, c, p, batch)[:, None, None] * A).sum(dim=0, keepdim=True)[None].relu()
        if P is not None:
            means = F.interpolate(S, P.shape[-2:], mode="bilinear", align_corners=False)
            means = F.interpolate(means, S.shape[-2:], mode="bilinear", align_corners=False)
            P_up = F.interpolate(P, S.shape[-2:], mode="bilinear", align_corners=False)
            S = S / means.clamp(min=1e-12) * P_up
        P = S
    assert P is not None, "there is at least one level"
    return scaled(P[0], (x.shape[2], x.shape[3]))[0]


# ---- Opti-CAM: the authors' code -------------------------------------------------------------------------------------


@dataclass(eq=False)
class OptiCam:
    """Official Opti-CAM loop. Parameters require gradients, and each step repeats the original image's backward pass.

    Attributes:
        net: A copy of the network.
        image: Pixels [1, 3, H, W] in [0, 1].
        mean: Mean of the normalisation.
        std: Standard deviation of the normalisation.
        layer: The module whose activations are used.
        c: The class index.
    """

    net: nn.Module
    image: Tensor
    mean: Tensor
    std: Tensor
    layer: nn.Module
    c: int

    def __init__(self, net: nn.Module, layer: str, x: Tensor, mean: Tensor, std: Tensor, c: int) -> None:
        self.name = layer
        self.net = copy.deepcopy(net).requires_grad_()
        self.layer = self.net.get_submodule(layer)
        self.image, self.mean, self.std, self.c = (x * std + mean)[None], mean, std, c
        self.seen: Tensor | None = None
        self.layer.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.seen = output.clone()  # Later modules may modify the output in place.

    def __call__(self, steps: int, after: Callable[[], None] = lambda: None) -> Tensor:
        """Return the map [H, W] after a number of steps. `after` is called after the prediction of the image."""
        with torch.enable_grad():
            y = self.net((self.image - self.mean) / self.std)[0, self.c]
            assert self.seen is not None
            A = self.seen.detach().relu().to(self.image)
            u = torch.full((1, A.shape[1], 1, 1), 0.5, device=A.device, requires_grad=True)
            adam = torch.optim.Adam([u], lr=0.1)
            after()
            for _ in range(steps):
                s = self._map(A, u)
                loss = y - self.net((self.image * s - self.mean) / self.std)[0, self.c]
                adam.zero_grad()
                loss.backward(retain_graph=True)
                adam.step()
        return self._map(A, u).detach()[0, 0]

    def _map(self, A: Tensor, u: Tensor) -> Tensor:
        S = (u.softmax(dim=1) * A).sum(dim=1, keepdim=True)
        S = F.interpolate(S, self.image.shape[-2:], mode="bilinear", align_corners=False)
        return (S - S.min()) / (S.max() - S.min())

    def timed(self, steps: int) -> Timed:
        """Time a number of steps. Each step counts as one row."""
        if _needs_warm_up(self.image):
            self(2)
        start = 0.0

        def after() -> None:
            nonlocal start
            start = clock(self.image.device)

        self(steps, after)
        return Timed(steps, clock(self.image.device) - start)


# ---- insertion and deletion ------------------------------------------------------------------------------------------


@torch.no_grad()
def curve(net: nn.Module, start: Tensor, end: Tensor, S: Tensor, c: int, steps: int, batch: int = LOOP) -> Tensor:
    """Return the probability [steps] of class c while pixels of `end` replace those of `start` in the order of S."""
    order = S.flatten().argsort(stable=True).flip(0)
    chunk = -(-len(order) // steps)
    row, goal = start.clone().flatten(1), end.flatten(1)
    rows: list[Tensor] = []
    p: list[Tensor] = []
    for step in range(steps):
        pixels = order[step * chunk : (step + 1) * chunk]
        row[:, pixels] = goal[:, pixels]
        rows.append(row.view(start.shape).clone())
        if len(rows) == batch or step + 1 == steps:
            p.append(net(torch.stack(rows)).softmax(dim=1)[:, c])
            rows.clear()
    return torch.cat(p)


def curves(net: nn.Module, x: Tensor, S: Tensor, c: int, steps: int) -> Tensor:
    """Return the insertion and deletion curves [2, steps] of an image x [3, H, W] and a map S [H, W]."""
    blurred = gaussian_blur(x[None])[0]
    return torch.stack([curve(net, start, end, S, c, steps) for start, end in ((blurred, x), (x, blurred))])


# ---- Score-CAM of other libraries ------------------------------------------------------------------------------------


class Torchcam:
    """Score-CAM of torchcam for given channels of one layer."""

    name, package = "torchcam", "torchcam.methods"
    differs = "it scales masks before resizing"

    def __init__(self, net: nn.Module, layer: str, x: Tensor) -> None:
        from torchcam.methods import ScoreCAM

        self.cam: Any = ScoreCAM(net, layer, input_shape=tuple(x.shape))
        with torch.no_grad():
            net(x[None])

    def weights(self, A: Tensor, c: int, batch: int) -> Tensor:
        """Return the weights [K] of A [K, h, w]. Includes a pass of the unmasked image."""
        self.cam.bs = batch
        normalised = self.cam._normalize(A[None].clone(), 2)
        with self.cam._hooks_off():
            weights: Tensor = self.cam._get_score_weights([normalised], c)[0][0]
        return weights

    def close(self) -> None:
        """Remove the hooks from the network."""
        self.cam.remove_hooks()


class GradCam:
    """Score-CAM of pytorch-grad-cam for given channels of one layer."""

    name, package = "pytorch-grad-cam", "pytorch_grad_cam"
    differs = "it resizes with aligned corners"

    def __init__(self, net: nn.Module, layer: str, x: Tensor) -> None:
        from pytorch_grad_cam import score_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        score_cam.tqdm = SimpleNamespace(tqdm=lambda batches: batches)  # Suppress its progress bar.
        self.x, self.layer, self.target = x[None], net.get_submodule(layer), ClassifierOutputTarget
        self.cam: Any = score_cam.ScoreCAM(net, [self.layer])
        self.cam.activations_and_grads.release()  # The activations are passed as arguments.

    def weights(self, A: Tensor, c: int, batch: int) -> Tensor:
        """Return the weights [K] of A [K, h, w]."""
        self.cam.batch_size = batch
        weights = self.cam.get_cam_weights(self.x, self.layer, [self.target(c)], A[None].cpu().numpy(), None)
        return torch.from_numpy(weights)[0].to(A)

    def close(self) -> None:
        """Do nothing, because the hooks are already removed."""


Library = Torchcam | GradCam


def importable(library: type[Library]) -> bool:
    """Return True if a library can be imported. Otherwise, print the reason."""
    try:
        importlib.import_module(library.package)
    except ImportError as error:
        print(f"{NOT_MEASURED}{library.name}: {error}", file=sys.stderr)
        return False
    return True


LIBRARIES: dict[str, type[Library]] = {library.name: library for library in (Torchcam, GradCam)}


def timed_weights(cam: Library, A: Tensor, c: int, batch: int) -> Timed:
    """Time the weights of all channels. Each channel counts as one row."""
    if _needs_warm_up(A):
        cam.weights(A[:batch], c, batch)
    start = clock(A.device)
    cam.weights(A, c, batch)
    return Timed(len(A), clock(A.device) - start)
