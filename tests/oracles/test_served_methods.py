"""Every served method against its oracle: the raw map and the finished map of each class of a request.

In float64, maps differ only by the float32 of the response. In float32, they differ by the rounding of batches. The
tests draw random numbers as documented, with one generator per sample, and pass them to the oracle.

test_methods.py contains more tests of Poly-CAM, Opti-CAM, Grad-CAM and Score-CAM. test_served_on_large_networks.py runs
the methods on large networks.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.models.model import Model
from camserve_server.registry import METHODS
from camserve_server.rows import generator, normal
from tests import nets
from tests.oracles.ablation_cam import ablation_cam
from tests.oracles.attention_rollout import attention_rollout
from tests.oracles.cam import cam
from tests.oracles.center_gaussian import center_gaussian
from tests.oracles.comparison import gap, unit
from tests.oracles.eigen_cam import eigen_cam
from tests.oracles.fake_cam import fake_cam
from tests.oracles.grad_cam import grad_cam
from tests.oracles.grad_cam_pp import grad_cam_pp
from tests.oracles.gradient_shap import gradient_shap
from tests.oracles.hires_cam import hires_cam
from tests.oracles.input_x_gradient import input_x_gradient
from tests.oracles.integrated_gradients import integrated_gradients
from tests.oracles.is_cam import is_cam
from tests.oracles.layer_cam import layer_cam, layer_cam_of_layers
from tests.oracles.networks import network, photograph
from tests.oracles.occlusion import occlusion
from tests.oracles.opti_cam import opti_cam
from tests.oracles.poly_cam import poly_cam
from tests.oracles.raw_attention import raw_attention
from tests.oracles.rise import rise, rise_masks
from tests.oracles.score_cam import score_cam
from tests.oracles.smooth_grad import smooth_grad
from tests.oracles.smooth_grad_cam_pp import smooth_grad_cam_pp
from tests.oracles.ss_cam import ss_cam
from tests.oracles.test_oracles_attention import of_timm
from tests.oracles.xgrad_cam import xgrad_cam
from tests.oracles.zoom_cam import zoom_cam
from tests.support import IMAGENET_MEAN, IMAGENET_STD, as_model, call, explained, noise

SEED = 7
F32, F64 = torch.float32, torch.float64


# ---- arguments of the oracles ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Arguments:
    """Arguments of an oracle.

    Attributes:
        net: The network.
        x: Image [1, 3, H, W].
        c: Class index.
        layers: Names of the modules with the activations, fine to coarse.
        grid: Grid of the tokens of a transformer.
    """

    net: Any
    x: Tensor
    c: int
    layers: tuple[str, ...]
    grid: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        return (self.x.shape[2], self.x.shape[3])

    @property
    def modules(self) -> list[nn.Module]:
        return [self.net.get_submodule(layer) for layer in self.layers]

    @property
    def on_layer(self) -> tuple[nn.Module, Tensor, nn.Module, int]:
        """Arguments of oracles that use the gradient of a layer."""
        return self.net, self.x, self.modules[0], self.c

    @property
    def on_channels(self) -> tuple[nn.Module, Tensor, Tensor, int]:
        """Arguments of oracles that mask the image by the activations of a layer."""
        return self.net, self.x, self.activations[0], self.c

    @property
    def on_input(self) -> tuple[nn.Module, Tensor, int]:
        return self.net, self.x, self.c

    @property
    def activations(self) -> list[Tensor]:
        return nets.activations(self.net, self.x, list(self.layers))

    def noise(self, samples: int, sigma: float, *shape: int) -> Tensor:
        """Return noise [samples, …]. All classes share the noise of a sample."""
        return torch.stack([sigma * normal(shape, SEED, i).to(self.x) for i in range(samples)])


Maps = tuple[Tensor | None, Tensor]  # Raw map, if the oracle returns it, and finished map.
Oracle = Callable[..., Tensor | Maps]


def of_ablation_cam(q: Arguments) -> Tensor:
    """Ablate a channel of all tokens. The grid does not contain the class token."""
    if not q.layers[0].endswith(".grid"):
        return ablation_cam(*q.on_layer).map
    every_token = q.net.get_submodule(q.layers[0].removesuffix("grid") + "all")
    return ablation_cam(q.net, q.x, every_token, q.c).map[1:].reshape(q.grid)


def of_cam(q: Arguments) -> Tensor:
    """Use the pooled layer and the linear layer, whose names depend on the network."""
    heads = (("r3", "fc"), ("layer4", "fc"), ("bn2", "classifier"))
    layer, linear = next(names for names in heads if all(hasattr(q.net, name) for name in names))
    (A,) = nets.activations(q.net, q.x, [layer])
    return cam(A, q.net.get_submodule(linear).weight, q.c)


def of_eigen_cam(q: Arguments, centred: bool = False) -> Tensor:
    """Return the map with the sign of the served map, which correlates with the sum of the activations."""
    (A,) = q.activations
    L = eigen_cam(A, centred)
    return -L if (L * A.sum(dim=0)).sum() < 0 else L


def of_grad_cam_pp(q: Arguments, variant: Any = "paper") -> Tensor:
    return grad_cam_pp(*q.on_layer, variant).map


def of_gradient_shap(q: Arguments, samples: int = 50, sigma: float = 0.0, signed: bool = False) -> Tensor:
    a = torch.rand(samples, generator=generator(SEED, samples), dtype=F64).to(q.x)
    M = gradient_shap(*q.on_input, a, q.noise(samples, sigma, 3, *q.size))
    return M if signed else M.abs()


def of_input_x_gradient(q: Arguments, signed: bool = False) -> Tensor:
    M = input_x_gradient(*q.on_input)
    return M if signed else M.abs()


def of_integrated_gradients(q: Arguments, steps: int = 50, signed: bool = False) -> Tensor:
    M = integrated_gradients(*q.on_input, steps)
    return M if signed else M.abs()


def of_is_cam(q: Arguments, steps: int = 10, variant: Any = "paper") -> Tensor:
    return is_cam(*q.on_channels, steps, variant).map


def of_layer_cam(q: Arguments, scaled: int = 2) -> Tensor:
    """Fuse several layers. A single layer is not scaled."""
    return layer_cam(*q.on_layer) if len(q.layers) == 1 else layer_cam_of_layers(q.net, q.x, q.modules, q.c, scaled)


def of_occlusion(q: Arguments, window: int = 0, stride: int = 0, signed: bool = False) -> Tensor:
    """Replace 0 by 64 and 8 of 224 pixels. A stride is at most the side of the window, so no pixel is left out."""
    high, wide = (min(window or round(side * 64 / 224), side) for side in q.size)
    down, across = (min(stride or round(side * 8 / 224), w) for side, w in zip(q.size, (high, wide), strict=True))
    M = occlusion(*q.on_input, (high, wide), (down, across))
    return M if signed else M.abs()


def of_opti_cam(q: Arguments, relu: bool = True, **parameters: Any) -> Maps:
    """Return the raw map in float64 only.

    In float32, the gradient for a constant channel is rounding, from which Adam makes whole steps. They shift the raw
    map by a constant.
    """
    (A,) = q.activations
    theirs = opti_cam(q.net, q.x, A, q.c, relu=relu, mean=IMAGENET_MEAN, std=IMAGENET_STD, **parameters)
    raw = torch.einsum("k,khw->hw", theirs.weights, A.relu() if relu else A)
    return raw if A.dtype == F64 else None, theirs.saliency


def of_poly_cam(weights: Any, q: Arguments, variant: Any = "paper") -> Maps:
    return None, poly_cam(q.net, q.x, q.activations, q.c, weights, variant).map


def of_rise(q: Arguments, masks: int = 6000, cells: int = 8, keep: float = 0.1) -> Tensor:
    grids, shifts = [], []
    for i in range(masks):
        chance = generator(SEED, i)
        grids.append((torch.rand(cells, cells, generator=chance) < keep).to(q.x))
        shifts.append([int(torch.randint(math.ceil(side / cells), (), generator=chance)) for side in q.size])
    return rise(*q.on_input, rise_masks(torch.stack(grids), torch.tensor(shifts), q.size), keep)


def of_smooth_grad(q: Arguments, samples: int = 50, sigma: float = 1.0) -> Tensor:
    return smooth_grad(*q.on_input, q.noise(samples, sigma, 3, *q.size))


def of_ss_cam(q: Arguments, samples: int = 35, sigma: float = 2.0) -> Tensor:
    return ss_cam(*q.on_channels, q.noise(samples, sigma, *q.size)[:, None]).map


def of_smooth_grad_cam_pp(q: Arguments, samples: int = 4, sigma: float = 0.3, variant: Any = "paper") -> Tensor:
    return smooth_grad_cam_pp(*q.on_layer, q.noise(samples, sigma, 3, *q.size), variant).map


ORACLES: dict[str, Oracle] = {
    "ablation-cam": of_ablation_cam,
    "attention-rollout": lambda q: attention_rollout(of_timm(q.net, q.x), q.grid),
    "cam": of_cam,
    "center-gaussian": lambda q, sigma=0.25: center_gaussian(q.size, sigma),
    "eigen-cam": of_eigen_cam,
    "fake-cam": lambda q: fake_cam(q.size),
    "grad-cam": lambda q: grad_cam(*q.on_layer).map,
    "grad-cam++": of_grad_cam_pp,
    "gradient-shap": of_gradient_shap,
    "hires-cam": lambda q: hires_cam(*q.on_layer),
    "input-x-gradient": of_input_x_gradient,
    "integrated-gradients": of_integrated_gradients,
    "is-cam": of_is_cam,
    "layer-cam": of_layer_cam,
    "occlusion": of_occlusion,
    "opti-cam": of_opti_cam,
    "poly-cam": partial(of_poly_cam, "pm"),
    "poly-cam+": partial(of_poly_cam, "p"),
    "poly-cam-": partial(of_poly_cam, "m"),
    "raw-attention": lambda q: raw_attention(of_timm(q.net, q.x), q.grid),
    "random": lambda q: torch.rand(q.size, generator=generator(SEED, *q.size)),
    "rise": of_rise,
    "score-cam": lambda q, **parameters: score_cam(*q.on_channels, **parameters).map,
    "smooth-grad": of_smooth_grad,
    "smooth-grad-cam++": of_smooth_grad_cam_pp,
    "ss-cam": of_ss_cam,
    "xgrad-cam": lambda q: xgrad_cam(*q.on_layer).map,
    "zoom-cam": lambda q: zoom_cam(q.net, q.x, q.modules, q.c, q.size),
}


# ---- networks --------------------------------------------------------------------------------------------------------


SIZES = {
    "tiny": (32, 32),
    "tiny odd": (37, 29),
    "tiny tall": (84, 56),
    "vit": (48, 32),  # Not square, to detect swapped rows and columns of tokens.
    "vgg16": (64, 64),
    "resnet50": (64, 64),
    "efficientnet-lite0": (96, 96),
}
GRID = (6, 4)  # Tokens of "vit".


@dataclass(frozen=True, eq=False)
class Case:
    """Served model, its network for the oracles, and an image [1, 3, H, W]."""

    model: Model
    net: nn.Module
    x: Tensor


@lru_cache(maxsize=4)
def case(name: str, dtype: torch.dtype) -> Case:
    size = SIZES[name]
    if name == "vit":
        return transformer(size, dtype)
    model = as_model(copy.deepcopy(network(name)), size, dtype=dtype)
    x = noise(3, *size) if name.startswith("tiny") else photograph(size)  # Nearly dead channels respond to noise.
    return Case(model, model.module, x[None].to(dtype))


def transformer(size: tuple[int, int], dtype: torch.dtype) -> Case:
    """Return a transformer whose normalisations have a scale and a shift, as after training.

    Otherwise the channels would add up to zero at every position, and their mean would be rounding.
    """
    net: Any = nets.tiny_vit()
    net.set_input_size(img_size=size)
    for i, block in enumerate(net.blocks):
        block.norm1.weight.add_(noise(48, seed=i), alpha=0.3)
        block.norm1.bias.copy_(0.5 + 0.3 * noise(48, seed=i + 10))
    model = as_model(net, size, dtype=dtype)
    net = copy.deepcopy(net)
    for block in net.blocks:
        block.norm1 = Tokens(block.norm1, GRID)
    return Case(model, net, noise(1, 3, *size).to(dtype))


class Tokens(nn.Module):
    """Layer of a transformer with outputs [1, K, …] for the oracles: `grid` without the class token, `all` with it."""

    def __init__(self, layer: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.size, self.all, self.grid = layer, size, nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.all(self.layer(x).transpose(1, 2).unsqueeze(-1)).squeeze(-1)
        patches = self.grid(tokens[:, :, 1:].unflatten(2, self.size))
        return torch.cat([tokens[:, :, :1], patches.flatten(2)], dim=2).transpose(1, 2)


def check(
    case: Case,
    method: str,
    layers: tuple[str, ...],
    parameters: dict[str, Any],
    targets: list[int],
    tolerance: float,
) -> None:
    """Compare each map in [0, 1], and each raw map relative to its maximum."""
    ours = explained(case.model, case.x[0], call(case.model, method, layers, SEED, **parameters), targets)
    assert len(ours.maps) == len(ours.raw) == len(targets)
    if case.model.attention:
        layers = tuple(f"{layer}.grid" for layer in layers)
    for t, c in enumerate(targets):
        theirs = ORACLES[method](Arguments(case.net, case.x, c, layers, GRID), **parameters)
        raw, finished = theirs if isinstance(theirs, tuple) else (theirs, unit(theirs, case.model.preprocessing.size))
        assert finished.min() < finished.max(), "a comparison of constant maps proves nothing"
        assert ours.maps[t].shape == finished.shape
        assert gap(ours.maps[t], finished) < tolerance
        if raw is not None:
            assert ours.raw[t].shape == raw.shape
            assert gap(ours.raw[t], raw) / float(raw.abs().max()) < tolerance


def likeliest(case: Case) -> list[int]:
    """Return the classes in descending order of the logit."""
    classes: list[int] = case.model.module(case.x)[0].argsort(descending=True).tolist()
    return classes


Tried = dict[str, list[dict[str, Any]]]


def parametrise(tried: Tried, one: Sequence[str], many: Sequence[tuple[str, ...]]) -> pytest.MarkDecorator:
    """Parametrise over every method with all of its parameters, on all layers of its kind."""
    layers_of: dict[str, Sequence[tuple[str, ...]]] = {"none": [()], "one": [(layer,) for layer in one], "many": many}
    found = []
    for method, every in tried.items():
        for layers, parameters in itertools.product(layers_of[METHODS[method].layers], every):
            words = [method, *layers, *(f"{name}={value}" for name, value in parameters.items())]
            found.append(pytest.param(method, layers, parameters, id=" ".join(words)))
    return pytest.mark.parametrize(("method", "layers", "parameters"), found)


# ---- small networks: every parameter, three classes ------------------------------------------------------------------

in_both = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(F32, 1e-4, id="float32"), pytest.param(F64, 1e-6, id="float64", marks=pytest.mark.slow)],
)

TRIED: Tried = {
    "ablation-cam": [{}],
    "center-gaussian": [{}, {"sigma": 0.1}],
    "eigen-cam": [{}, {"centred": True}],
    "fake-cam": [{}],
    "grad-cam": [{}],
    "grad-cam++": [{}, {"variant": "torchcam"}],
    "gradient-shap": [{}, {"samples": 4, "sigma": 0.5}, {"samples": 5, "signed": True}],
    "hires-cam": [{}],
    "input-x-gradient": [{}, {"signed": True}],
    "integrated-gradients": [{}, {"steps": 5}, {"steps": 2, "signed": True}],
    "is-cam": [{}, {"steps": 3}, {"steps": 4, "variant": "torchcam"}],
    "layer-cam": [{}, {"scaled": 0}, {"scaled": 1}, {"scaled": 3}],
    "occlusion": [
        {"window": 5, "stride": 3},
        {"window": 4, "stride": 9, "signed": True},
        {"window": 30, "stride": 2},  # Wider than one of the images.
    ],
    "opti-cam": [
        {"steps": 5},
        {"steps": 5, "relu": False, "rate": 0.3},
        {"steps": 5, "norm": "sigmoid", "mask_space": "normalised"},
        {"steps": 5, "norm": "max", "objective": "diff"},
        # A larger rate amplifies rounding in float32 differently on each kind of CPU.
        {"steps": 8, "rate": 2.0, "stop": "official"},
    ],
    "random": [{}],
    "rise": [{"masks": 60}, {"masks": 40, "cells": 5, "keep": 0.5}],
    "score-cam": [{}, {"score": "probability", "channel_softmax": False}],
    "smooth-grad": [{}, {"samples": 4, "sigma": 0.3}, {"samples": 2, "sigma": 0}],
    "smooth-grad-cam++": [{}, {"samples": 5, "sigma": 1}, {"samples": 2, "variant": "torchcam"}],
    "ss-cam": [{"samples": 3, "sigma": 0.5}],
    "xgrad-cam": [{}],
    "zoom-cam": [{}],
}
# Methods for convolutional networks only, and for transformers only. test_methods.py tests Poly-CAM on the former.
OF_CONVOLUTIONS: Tried = {"cam": [{}]}
OF_TRANSFORMERS: Tried = {
    "attention-rollout": [{}],
    "raw-attention": [{}],
    "poly-cam": [{}],
    "poly-cam+": [{}],
    "poly-cam-": [{}],
}


def test_every_method_has_a_case() -> None:
    ours = {name for name, method in METHODS.items() if method.plan.__module__.startswith("camserve_server.")}
    assert ours == TRIED.keys() | OF_CONVOLUTIONS.keys() | OF_TRANSFORMERS.keys()


@pytest.mark.slow
@parametrise(TRIED | OF_CONVOLUTIONS, ["r3", "r2"], [("r1", "r2", "r3"), ("r2", "r3"), ("r2",)])
@in_both
@pytest.mark.parametrize("name", ["tiny", "tiny odd"])
def test_methods_on_convolutional_networks(
    name: str, dtype: torch.dtype, tolerance: float, method: str, layers: Any, parameters: Any
) -> None:
    """The gradients of r2 differ between positions, those of r3 do not."""
    tiny = case(name, dtype)
    first, second, third, *_ = likeliest(tiny)
    check(tiny, method, layers, parameters, [second, first, third], tolerance)


@pytest.mark.slow
@parametrise(TRIED | OF_TRANSFORMERS, ["blocks.2.norm1"], [("blocks.2.norm1",), ("blocks.1.norm1", "blocks.2.norm1")])
@in_both
def test_methods_on_a_transformer(
    dtype: torch.dtype, tolerance: float, method: str, layers: Any, parameters: Any
) -> None:
    if method == "smooth-grad-cam++" and dtype == F32:
        tolerance = 1e-2  # For signed activations, the denominator of α may be near zero.
    vit = case("vit", dtype)
    _, second, third, fourth, *_ = likeliest(vit)  # Hiding any part raises the first: PCAM− is zero.
    check(vit, method, layers, parameters, [third, second, fourth], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["occlusion", "rise", "ss-cam"])
def test_methods_with_thousands_of_rows_by_default(method: str) -> None:
    """Height and width of the image have different default windows and strides."""
    tall = case("tiny tall", F32)
    layers = ("r3",) if METHODS[method].layers == "one" else ()
    check(tall, method, layers, {}, likeliest(tall)[:1], 1e-4)
