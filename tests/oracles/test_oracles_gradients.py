"""Oracles of the gradient methods and of occlusion against captum, in float64."""

from __future__ import annotations

import copy
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles.comparison import relative_gap as gap
from tests.oracles.gradient_shap import gradient_shap
from tests.oracles.input_x_gradient import input_gradient, input_x_gradient
from tests.oracles.integrated_gradients import gauss_legendre, integrated_gradients
from tests.oracles.networks import network, tiny
from tests.oracles.occlusion import occlusion, starts
from tests.oracles.smooth_grad import smooth_grad

on_sizes = pytest.mark.parametrize("size", [(37, 29), (32, 32)], ids=["odd", "square"])


def noise_like(x: Tensor, n: int, sigma: float) -> Tensor:
    """Return noise [n, 3, H, W]."""
    return sigma * torch.randn(n, *x.shape[1:], generator=torch.Generator().manual_seed(3)).double()


def of_captum(attribution: Any, x: Tensor, c: int, **options: Any) -> Tensor:
    """Return the map [H, W] of captum, summed over channels."""
    theirs: Tensor = attribution.attribute(x.clone().requires_grad_(), target=c, **options)[0].sum(0).detach()
    return theirs


@on_sizes
def test_input_x_gradient_agrees_with_captum(size: tuple[int, int]) -> None:
    net, x, c = tiny(size)
    ours = input_x_gradient(net, x, c)
    assert ours.min() < 0 < ours.max()
    assert gap(ours, of_captum(captum.attr.InputXGradient(net), x, c)) < 1e-12
    assert gap(input_x_gradient(net, x, (c + 1) % 7), ours) > 0.1


@on_sizes
def test_integrated_gradients_agree_with_captum_and_sum_to_the_logit(size: tuple[int, int]) -> None:
    net, x, c = tiny(size)
    theirs = of_captum(captum.attr.IntegratedGradients(net), x, c, n_steps=50)
    ours = integrated_gradients(net, x, c)
    assert gap(ours, theirs) < 1e-8  # The quadrature weights of captum are float32.
    assert gap(integrated_gradients(net, x, c, steps=20), theirs) > 1e-3
    gained = (net(x) - net(torch.zeros_like(x)))[0, c].item()
    assert ours.sum().item() == pytest.approx(gained, rel=0.02)
    assert gap(input_x_gradient(net, x, c), ours) > 0.1


def test_gauss_legendre_is_exact_for_polynomials() -> None:
    nodes, weights = gauss_legendre(5)
    for power in range(10):
        integral = sum(w * t**power for t, w in zip(nodes, weights, strict=True))
        assert integral == pytest.approx(1 / (power + 1), rel=1e-12)
    assert sum(w * t**10 for t, w in zip(nodes, weights, strict=True)) != pytest.approx(1 / 11, rel=1e-9)


@on_sizes
def test_smooth_grad_agrees_with_captum(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, c = tiny(size)
    noise = noise_like(x, 7, 1.0)
    monkeypatch.setattr(torch, "normal", lambda mean, std: noise)
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(net))
    ours = smooth_grad(net, x, c, noise)
    assert gap(ours, of_captum(tunnel, x, c, nt_samples=7, stdevs=1.0)) < 1e-12
    signed = smooth_grad(net, x, c, noise, absolute=False)
    assert signed.min() < 0 <= ours.min()
    assert gap(signed, of_captum(tunnel, x, c, nt_samples=7, stdevs=1.0, abs=False)) < 1e-12
    still = smooth_grad(net, x, c, torch.zeros_like(noise), absolute=False)
    assert gap(still, input_gradient(net, x, c).sum(0)) < 1e-12


@on_sizes
def test_gradient_shap_agrees_with_captum(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, c = tiny(size)
    noise, alphas = noise_like(x, 5, 0.09), torch.linspace(0.9, 0.1, 5).double()
    monkeypatch.setattr(torch, "normal", lambda mean, std: noise)
    monkeypatch.setattr(np.random, "uniform", lambda low, high, n: alphas.numpy()[:n])
    ours = gradient_shap(net, x, c, alphas, noise)
    shap = captum.attr.GradientShap(net)
    assert gap(ours, of_captum(shap, x, c, baselines=torch.zeros_like(x), n_samples=5, stdevs=0.09)) < 1e-12
    assert gap(gradient_shap(net, x, c, alphas.flip(0), noise), ours) > 0.01
    ones = torch.ones(5).double()
    assert gap(gradient_shap(net, x, c, ones, torch.zeros_like(noise)), input_x_gradient(net, x, c)) < 1e-12


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((37, 29), (11, 9), 4), ((37, 29), (9, 9), 9), ((32, 32), (16, 8), 8), ((32, 32), (32, 32), 5)],
)
def test_occlusion_agrees_with_captum(size: tuple[int, int], window: tuple[int, int], stride: int) -> None:
    net, x, c = tiny(size)
    ours = occlusion(net, x, c, window, stride)
    theirs = of_captum(
        captum.attr.Occlusion(net), x, c, sliding_window_shapes=(3, *window), strides=(3, stride, stride)
    )
    assert gap(3 * ours, theirs) < 1e-6  # captum divides in float32.


def test_occlusion_windows_cover_each_side() -> None:
    assert len(starts(224, 64, 8)) ** 2 == 441
    assert starts(37, 11, 4) == [0, 4, 8, 12, 16, 20, 24, 28]  # The last one ends at 39.
    assert starts(8, 8, 3) == [0]
    assert starts(5, 8, 3) == [0]


def test_occlusion_by_hand() -> None:
    """The score is one pixel, so only windows over this pixel change it, by its value."""
    x = torch.arange(1.0, 26.0).reshape(1, 1, 5, 5).expand(1, 3, 5, 5)
    ours = occlusion(lambda rows: rows[:, 0, 4, 4][:, None], x, 0, (2, 2), 2)  # The last windows exceed the border.
    expected = torch.zeros(5, 5)
    expected[4, 4] = 25
    assert gap(ours, expected) == 0
    overlapping = occlusion(lambda rows: rows[:, 0, 2, 2][:, None], x, 0, (3, 3), 2)
    expected = torch.tensor([1, 1, 1, 1, 1])[:, None] * torch.ones(5) * 13  # Every window covers the centre.
    assert gap(overlapping, expected) == 0


@pytest.mark.slow
def test_gradient_oracles_on_vgg16(monkeypatch: pytest.MonkeyPatch) -> None:
    net = copy.deepcopy(network("vgg16")).double()
    x = torch.randn(1, 3, 40, 48, generator=torch.Generator().manual_seed(4)).double()
    c, noise, alphas = int(net(x).argmax()), noise_like(x, 3, 1.0), torch.tensor([0.2, 0.9, 0.5]).double()
    monkeypatch.setattr(torch, "normal", lambda mean, std: noise)
    monkeypatch.setattr(np.random, "uniform", lambda low, high, n: alphas.numpy()[:n])
    smooth = captum.attr.NoiseTunnel(captum.attr.Saliency(net))
    gaps = (
        gap(input_x_gradient(net, x, c), of_captum(captum.attr.InputXGradient(net), x, c)),
        gap(
            integrated_gradients(net, x, c, steps=5),
            of_captum(captum.attr.IntegratedGradients(net), x, c, n_steps=5),
        ),
        gap(smooth_grad(net, x, c, noise), of_captum(smooth, x, c, nt_samples=3, stdevs=1.0)),
        gap(
            gradient_shap(net, x, c, alphas, noise),
            of_captum(captum.attr.GradientShap(net), x, c, baselines=torch.zeros_like(x), n_samples=3, stdevs=1.0),
        ),
        gap(
            3 * occlusion(net, x, c, (24, 24), 16),
            of_captum(captum.attr.Occlusion(net), x, c, sliding_window_shapes=(3, 24, 24), strides=(3, 16, 16)),
        ),
    )
    assert max(gaps) < 1e-6, gaps
