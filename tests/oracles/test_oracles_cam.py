"""Oracles of the CAM family against torchcam and grad-cam, in float64, with the errors of these libraries.

The tests use a tiny network with dead, constant and nearly dead channels, and VGG16. In front of a global average
pooling, gradients are constant over the map, which hides errors. In VGG16 and in r1 and r2 of the tiny network they
vary.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import nets
from tests.oracles.ablation_cam import ablation_cam
from tests.oracles.cam import cam
from tests.oracles.comparison import FixedSamples
from tests.oracles.comparison import relative_gap as gap
from tests.oracles.eigen_cam import eigen_cam
from tests.oracles.fake_cam import fake_cam
from tests.oracles.grad_cam import activation_and_gradient, grad_cam
from tests.oracles.grad_cam_pp import grad_cam_pp
from tests.oracles.hires_cam import hires_cam
from tests.oracles.layer_cam import layer_cam, layer_cam_of_layers
from tests.oracles.networks import network, tiny
from tests.oracles.smooth_grad_cam_pp import smooth_grad_cam_pp
from tests.oracles.xgrad_cam import xgrad_cam
from tests.oracles.zoom_cam import zoom_cam

LAYERS = ("r1", "r2", "r3")
on_sizes = pytest.mark.parametrize("size", [(37, 29), (32, 32)], ids=["odd", "square"])
on_layers = pytest.mark.parametrize("layer", LAYERS)


def unlike(ours: Tensor, theirs: Tensor) -> float:
    """Return the gap between two maps after each is divided by its maximum."""
    return gap(ours / ours.max(), theirs / theirs.max())


def noise_like(x: Tensor, n: int = 4, sigma: float = 0.3) -> Tensor:
    """Return noise [n, 3, H, W]."""
    return sigma * torch.randn(n, *x.shape[1:], generator=torch.Generator().manual_seed(3)).double()


def module(net: nn.Module, layer: str) -> nn.Module:
    return net.get_submodule(layer)


def of_torchcam(method: str, net: nn.Module, x: Tensor, layer: str, c: int, noise: Tensor | None = None) -> Tensor:
    """Return the map [h, w] of torchcam, not scaled."""
    import torchcam.methods

    with getattr(torchcam.methods, method)(net, layer, input_shape=tuple(x.shape[1:])) as extractor:
        if noise is not None:
            extractor.num_samples, extractor._distrib = len(noise), FixedSamples(noise)
        scores = net(x.clone().requires_grad_())
        (theirs,) = extractor(c, scores, normalized=False)
    theirs_of_one: Tensor = theirs[0].detach()
    return theirs_of_one


def of_grad_cam(method: str, net: nn.Module, x: Tensor, layer: str, c: int) -> Tensor:
    """Return the map [h, w] of grad-cam, not scaled, with negative values set to 0."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    seen = []
    with getattr(pytorch_grad_cam, method)(net, [module(net, layer)]) as explainer:
        image = explainer.get_cam_image

        def keep(*args: Any) -> Any:
            seen.append(image(*args))
            return seen[0]

        explainer.get_cam_image = keep
        explainer(x.clone().requires_grad_(), [ClassifierOutputTarget(c)])
    return torch.from_numpy(np.maximum(seen[0][0], 0))


# --- Agreement with the libraries ---


@on_sizes
def test_cam_agrees_with_torchcam_and_with_grad_cam_times_the_area(size: tuple[int, int]) -> None:
    net, x, c = tiny(size)
    (A,) = nets.activations(net, x, ["r3"])
    ours = cam(A, net.fc.weight, c)
    assert ours.min() < 0
    assert gap(ours, of_torchcam("CAM", net, x, "r3", c)) < 1e-12
    assert gap(grad_cam(net, x, net.r3, c).map, ours.relu() / ours.numel()) < 1e-12


@on_sizes
@on_layers
def test_grad_cam_pp_agrees_with_grad_cam(size: tuple[int, int], layer: str) -> None:
    net, x, c = tiny(size)
    theirs = of_grad_cam("GradCAMPlusPlus", net, x, layer, c)
    assert gap(grad_cam_pp(net, x, module(net, layer), c, eps=1e-6).map, theirs) < 1e-12
    ours = grad_cam_pp(net, x, module(net, layer), c).map
    assert unlike(ours, theirs) > 1e-3  # The library adds 1e-6 to the denominator.
    assert unlike(ours, grad_cam(net, x, module(net, layer), c).map) > 0.01


@on_sizes
@on_layers
def test_xgrad_cam_hires_cam_and_layer_cam_agree_with_the_libraries(size: tuple[int, int], layer: str) -> None:
    net, x, c = tiny(size)
    ours = xgrad_cam(net, x, module(net, layer), c)
    assert gap(ours.map, of_torchcam("XGradCAM", net, x, layer, c)) < 1e-8  # The libraries add an epsilon.
    assert gap(ours.map, of_grad_cam("XGradCAM", net, x, layer, c)) < 1e-7
    assert ours.weights[0] == 0
    hires = hires_cam(net, x, module(net, layer), c)
    assert gap(hires, of_grad_cam("HiResCAM", net, x, layer, c)) < 1e-12
    single = layer_cam(net, x, module(net, layer), c)
    assert gap(single, of_torchcam("LayerCAM", net, x, layer, c)) < 1e-12
    assert gap(single, of_grad_cam("LayerCAM", net, x, layer, c)) < 1e-12
    assert unlike(single, hires) > 0.05
    assert unlike(ours.map, hires) > 0.05 or layer == "r3"  # The gradient of r3 is constant.


@on_sizes
@on_layers
def test_ablation_cam_agrees_with_grad_cam(size: tuple[int, int], layer: str) -> None:
    net, x, c = tiny(size)
    ours = ablation_cam(net, x, module(net, layer), c)
    assert gap(ours.map, of_grad_cam("AblationCAM", net, x, layer, c)) < 2e-6  # The library keeps scores in float32.
    assert ours.weights[0] == 0
    assert ours.weights[1] != 0  # A constant channel has an effect, too.


def test_hires_cam_without_relu_sums_to_the_logit() -> None:
    """The network is linear and has no bias after the last layer."""
    net, x, c = tiny((37, 29))
    signed = hires_cam(net, x, net.r3, c, relu=False)
    assert signed.min() < 0
    assert signed.sum().item() == pytest.approx(net(x)[0, c].item())
    assert gap(hires_cam(net, x, net.r3, c), signed.relu()) == 0


# --- Errors of the libraries ---


@on_sizes
@on_layers
def test_grad_cam_pp_of_torchcam_differs_from_the_paper(size: tuple[int, int], layer: str) -> None:
    net, x, c = tiny(size)
    theirs = of_torchcam("GradCAMpp", net, x, layer, c)
    assert gap(grad_cam_pp(net, x, module(net, layer), c, "torchcam").map, theirs) < 1e-12
    paper = grad_cam_pp(net, x, module(net, layer), c).map
    assert unlike(paper, theirs) > 0.05


@on_sizes
@on_layers
def test_smooth_grad_cam_pp_of_torchcam_differs_from_the_paper(size: tuple[int, int], layer: str) -> None:
    net, x, c = tiny(size)
    noise = noise_like(x)
    theirs = of_torchcam("SmoothGradCAMpp", net, x, layer, c, noise)
    assert gap(smooth_grad_cam_pp(net, x, module(net, layer), c, noise, "torchcam").map, theirs) < 1e-12
    paper = smooth_grad_cam_pp(net, x, module(net, layer), c, noise)
    assert unlike(paper.map, theirs) > 0.05
    other_order = smooth_grad_cam_pp(net, x, module(net, layer), c, noise.flip(0))
    assert gap(other_order.map, paper.map) < 1e-12
    assert gap(smooth_grad_cam_pp(net, x, module(net, layer), c, noise.flip(0), "torchcam").map, theirs) > 0.05


@on_layers
def test_smooth_grad_cam_pp_without_noise_equals_grad_cam_pp(layer: str) -> None:
    net, x, c = tiny((37, 29))
    noise = torch.zeros(3, *x.shape[1:]).double()
    ours = smooth_grad_cam_pp(net, x, module(net, layer), c, noise)
    assert gap(ours.map, grad_cam_pp(net, x, module(net, layer), c).map) < 1e-12


def test_torchcam_scales_all_fused_layers() -> None:
    from torchcam.methods import LayerCAM

    net, x, c = tiny((32, 32))
    modules = [module(net, layer) for layer in LAYERS]
    maps = [of_torchcam("LayerCAM", net, x, layer, c) for layer in LAYERS]
    theirs = LayerCAM.fuse_cams([S[None] / S.max() for S in maps])[0]
    assert gap(layer_cam_of_layers(net, x, modules, c, scaled=3), theirs) < 1e-12
    assert gap(layer_cam_of_layers(net, x, modules, c), theirs) > 0.01


def test_ablation_of_a_signed_layer_differs_from_grad_cam() -> None:
    net, x, c = tiny((37, 29))
    net.r3 = nn.Identity()  # type: ignore[assignment]
    ours = ablation_cam(net, x, net.c3, c).map
    theirs = of_grad_cam("AblationCAM", net, x, "c3", c)
    assert unlike(ours, theirs) > 0.5


# --- Several layers, by hand ---


def test_layer_cam_of_layers_and_zoom_cam_by_hand() -> None:
    net, x, c = tiny((37, 29))
    net.fc.weight.abs_()  # The maps of r3 are then positive everywhere.
    modules = [module(net, layer) for layer in LAYERS]
    S, Z = [], []
    for m in modules:
        A, g = activation_and_gradient(net, x, m, c)
        S.append((A * g.relu()).sum(0))
        Z.append((A * g).sum(0).relu())
    M = [torch.tanh(2 * S[0] / S[0].max()), torch.tanh(2 * S[1] / S[1].max()), S[2] / S[2].max()]
    assert min(S[2].min(), Z[2].min()) > 0.01 * Z[2].max()
    Z = [(z - z.min()) / z.max() for z in Z]
    for ours, maps in ((layer_cam_of_layers(net, x, modules, c), M), (zoom_cam(net, x, modules, c), Z)):
        up = [F.interpolate(m[None, None], (37, 29), mode="bilinear", align_corners=False)[0, 0] for m in maps]
        assert all((ours == u).any() for u in up)  # Each layer is the maximum at some pixel.
        assert gap(ours, torch.stack(up).amax(0)) < 1e-12
        assert 0.9 < ours.max() <= 1
    assert gap(layer_cam_of_layers(net, x, modules[2:], c, scaled=0), M[2]) < 1e-12


def test_maps_of_zeros_stay_zero() -> None:
    net, x, _ = tiny((32, 32))
    net.fc.weight[3] = -1  # All evidence is against this class.
    modules = [module(net, layer) for layer in LAYERS[2:]]
    assert zoom_cam(net, x, modules, 3).abs().max() == 0
    assert layer_cam_of_layers(net, x, modules, 3).abs().max() == 0
    assert grad_cam_pp(net, x, net.r3, 3).map.abs().max() == 0
    net.fc.weight[3] = 0
    for ours in (grad_cam_pp(net, x, net.r3, 3), smooth_grad_cam_pp(net, x, net.r3, 3, noise_like(x))):
        assert ours.weights.abs().max() == 0


# --- Eigen-CAM ---


@on_sizes
@on_layers
def test_eigen_cam_agrees_with_grad_cam_and_the_svd(size: tuple[int, int], layer: str) -> None:
    """Centred maps agree with grad-cam: EigenCAM up to its sign, SegEigenCAM exactly. Others follow the paper."""
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection_with_sign_correction

    net, x, c = tiny(size)
    (A,) = nets.activations(net, x, [layer])
    centred = eigen_cam(A, centred=True)
    assert centred.max() >= -centred.min() > 0
    assert gap(centred, get_2d_projection_with_sign_correction(A[None].numpy())[0]) < 1e-6  # float32
    theirs = of_grad_cam("EigenCAM", net, x, layer, c)
    assert min(gap(centred.relu(), theirs), gap((-centred).relu(), theirs)) < 1e-6
    ours = eigen_cam(A)
    assert ours.min() >= 0
    O = A.reshape(len(A), -1).T.numpy()  # noqa: E741
    U, sigma, _ = np.linalg.svd(O, full_matrices=False)
    assert gap(ours.flatten(), np.abs(U[:, 0]) * sigma[0]) < 1e-9
    assert unlike(ours, centred.relu()) > 0.05


def test_eigen_cam_returns_a_single_common_pattern() -> None:
    pattern = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)).double()
    strength = torch.tensor([2.0, 0.0, 1.0, 2.0]).double()
    assert gap(eigen_cam(strength[:, None, None] * pattern), 3 * pattern) < 1e-9
    assert eigen_cam(torch.zeros(4, 3, 5)).abs().max() == 0


# --- Other tests ---


def test_fake_cam_is_one_except_for_a_corner() -> None:
    ours = fake_cam((3, 4))
    assert ours.shape == (3, 4)
    assert ours[0, 0] == 0
    assert ours.sum() == 11


@pytest.mark.slow
def test_cam_oracles_on_vgg16() -> None:
    layer = "features.22"  # block4_conv3
    net = copy.deepcopy(network("vgg16")).double()
    x = torch.randn(1, 3, 48, 40, generator=torch.Generator().manual_seed(4)).double()
    m, c, noise = module(net, layer), int(net(x).argmax()), noise_like(x, 2)
    _, g = activation_and_gradient(net, x, m, c)
    assert (g.amax((1, 2)) - g.amin((1, 2))).max() > g.abs().max() / 2  # The gradient varies over the positions.
    pairs = {
        "Grad-CAM++": (grad_cam_pp(net, x, m, c, eps=1e-6).map, of_grad_cam("GradCAMPlusPlus", net, x, layer, c)),
        "torchcam's": (grad_cam_pp(net, x, m, c, "torchcam").map, of_torchcam("GradCAMpp", net, x, layer, c)),
        "smooth, torchcam's": (
            smooth_grad_cam_pp(net, x, m, c, noise, "torchcam").map,
            of_torchcam("SmoothGradCAMpp", net, x, layer, c, noise),
        ),
        "XGrad-CAM": (xgrad_cam(net, x, m, c).map, of_torchcam("XGradCAM", net, x, layer, c)),
        "HiRes-CAM": (hires_cam(net, x, m, c), of_grad_cam("HiResCAM", net, x, layer, c)),
        "Layer-CAM": (layer_cam(net, x, m, c), of_torchcam("LayerCAM", net, x, layer, c)),
    }
    gaps = {name: gap(ours, theirs) for name, (ours, theirs) in pairs.items()}
    assert max(gaps.values()) < 1e-6, gaps
    for paper, wrong in (
        (grad_cam_pp(net, x, m, c), pairs["torchcam's"][1]),
        (smooth_grad_cam_pp(net, x, m, c, noise), pairs["smooth, torchcam's"][1]),
    ):
        assert unlike(paper.map, wrong) > 0.05
