"""Served metrics against captum, and against slow implementations of their definitions."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor

from camserve_server.models.model import Model
from camserve_server.rows import generator, normal
from tests import nets
from tests.support import TIMEOUT_S, as_model, call, explained, metric, noise

SIZE = (37, 29)
C = 3


@cache
def model() -> Model:
    return as_model(nets.tiny_cnn(), SIZE, dtype=torch.float64)


X = noise(3, *SIZE).double()


def score(name: str, subject: Any, seed: int = 0, **parameters: object) -> float:
    return explained(model(), X, subject, [C], [metric(name, seed, **parameters)]).scores[0][0].value


def made(x: Tensor, method: str) -> Tensor:
    """Return the served map [H, W] of an image [3, H, W]."""
    return explained(model(), x, call(model(), method), [C]).maps[0].double()


def probability(x: Tensor) -> float:
    return float(model().module(x[None]).softmax(dim=1)[0, C])


def only(inputs: Any) -> Tensor:
    """Return the tensor that captum passes, alone or in a tuple."""
    tensor: Tensor = inputs[0] if isinstance(inputs, tuple) else inputs
    return tensor


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grad-cam", "smooth-grad", "occlusion"])
def test_sensitivity_max_agrees_with_captum(method: str) -> None:
    def explain(inputs: Any, **_: object) -> tuple[Tensor]:
        # captum would split a tensor that is not in a tuple into rows.
        return (torch.stack([made(x, method) for x in only(inputs)])[:, None],)

    def disturb(inputs: Any, perturb_radius: float) -> Tensor:
        drawn = [2 * torch.rand(x.shape, generator=generator(5, i)) - 1 for i, x in enumerate(only(inputs))]
        return only(inputs) + perturb_radius * torch.stack(drawn).double()

    theirs = sensitivity_max(explain, X[None], perturb_func=disturb, perturb_radius=0.3, n_perturb_samples=4)
    ours = score("sensitivity-max", call(model(), method), seed=5, samples=4, radius=0.3)
    assert ours > 0.01
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_infidelity_agrees_with_captum() -> None:
    S = made(X, "grad-cam")

    def disturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.stack([0.2 * normal(x.shape, 5, i).double() for i, x in enumerate(inputs)])
        return drawn, inputs - drawn

    theirs = infidelity(
        lambda inputs: model().module(inputs)[:, C],
        disturb,
        X[None],
        S.expand(1, 3, -1, -1),
        n_perturb_samples=30,
        max_examples_per_batch=30,
        normalize=True,
    )
    ours = score("infidelity", S.float(), seed=5, samples=30)
    assert ours > 1e-4
    assert ours == pytest.approx(float(theirs), rel=1e-4)


def test_adcc_follows_its_definition() -> None:
    S = made(X, "layer-cam")
    masked = X * S
    again = made(masked, "layer-cam")
    r = float(torch.corrcoef(torch.stack([S.flatten(), again.flatten()]))[0, 1])
    p, o = probability(X), probability(masked)
    parts = [(1 + r) / 2, 1 - float(S.sum()) / S.numel(), 1 - max(0.0, (p - o) / p)]
    assert all(0.01 < part < 1.01 for part in parts)
    ours = score("adcc", call(model(), "layer-cam"))
    assert ours == pytest.approx(3 / sum(1 / part for part in parts), rel=1e-5)


@pytest.mark.parametrize("disturb", ["uniform", "mean"])
def test_aopc_follows_its_definition(disturb: str) -> None:
    S = made(X, "grad-cam")
    (H, W), region, steps = SIZE, 8, 12
    corners = [(y, x) for y in range(0, H, region) for x in range(0, W, region)]
    relevance = [-float(S[y : y + region, x : x + region].mean()) for y, x in corners]
    order = sorted(range(len(corners)), key=lambda i: relevance[i])
    image = model().image(X)
    pixels = torch.rand(3, *SIZE, generator=generator(9)).double()
    instead = (pixels - image.mean) / image.std if disturb == "uniform" else torch.zeros(3, *SIZE).double()
    falls, now = [0.0], X.clone()
    for i in order[:steps]:
        y, x = corners[i]
        now[:, y : y + region, x : x + region] = instead[:, y : y + region, x : x + region]
        falls.append(probability(X) - probability(now))
    ours = score("aopc", S.float(), seed=9, region=region, steps=steps, disturb=disturb)
    assert ours == pytest.approx(sum(falls) / len(falls), abs=1e-6)
    assert abs(ours) > 1e-3


def test_insertion_deletion_is_the_difference() -> None:
    S = made(X, "grad-cam").float()
    parts = explained(model(), X, S, [C], [metric(name, steps=20) for name in ("insertion", "deletion")]).scores[0]
    assert score("insertion-deletion", S, steps=20) == parts[0].value - parts[1].value != 0


def test_insertion_deletion_shares_rows_with_other_metrics() -> None:
    from tests.support import running, submit

    names = ("insertion-deletion", "deletion", "insertion", "adcc", "average-gain")
    with running() as engine:
        job = submit(engine, model(), X, call(model(), "grad-cam"), [C], [metric(name) for name in names])
        job.future.result(TIMEOUT_S)
    assert job.rows == 2 + 2 * 224 + 1 + 2, "rows of the map, two curves, a masked image, and its map"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("where", ["scattered", "a blob"])
def test_imputation_agrees_with_grad_cam(share: float, where: str) -> None:
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer, neighbors_weights
    from scipy.sparse.linalg import spsolve

    from camserve_server.metrics.road import imputed

    y, x = torch.meshgrid(*(torch.arange(side).double() for side in SIZE), indexing="ij")
    S = noise(*SIZE) if where == "scattered" else -((y - 9) ** 2 + (x - 20) ** 2)
    missing = (S - S.quantile(1 - share)) > 0
    # The solver call of the library does not support NumPy 2, so the test solves its system.
    A, b = NoisyLinearImputer.setup_sparse_system((~missing).double().numpy(), X.numpy(), neighbors_weights)
    theirs = torch.from_numpy(spsolve(A.tocsc(), b)).T
    assert float(theirs.std()) > 0.05
    assert (imputed(X, missing)[:, missing] - theirs).abs().max() < 1e-3
    assert torch.equal(imputed(X, missing)[:, ~missing], X[:, ~missing])


def test_road_follows_its_definition() -> None:
    from camserve_server.metrics.road import imputed

    S = made(X, "grad-cam")
    order = S.flatten().argsort(descending=True, stable=True).tolist()
    falls = []
    for share in (0.25, 0.5, 0.75):
        count = round(share * len(order))
        for taken, sign in ((order[:count], -1), (order[len(order) - count :], 1)):
            missing = torch.zeros(S.numel(), dtype=torch.bool)
            missing[taken] = True
            falls.append(sign * probability(imputed(X, missing.view(SIZE))))
    ours = score("road", S.float(), steps=3, sigma=0.0)
    assert ours == pytest.approx(sum(falls) / 6, abs=1e-6)
    assert abs(ours) > 1e-3
