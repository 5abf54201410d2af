"""The served methods and metrics against the oracles: maps in [0, 1] to 1e-4 in float32, channel weights to 2e-5.

VGG16 and ResNet50 have random, calibrated weights, EfficientNet-Lite0 its trained ones; all look at a photograph. The
layers are chosen so that the oracles, which go channel by channel, take seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import captum.attr
import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camserve_server.engine.job import Event
from camserve_server.methods import poly_cam as served_poly_cam
from camserve_server.models.model import Model
from camserve_server.models.pixels import Preprocessing
from camserve_server.plan import Level, SaliencyMaps, Targets
from camserve_server.registry import METHODS
from camserve_server.request_plan import RequestResult, finish_maps
from tests import nets
from tests.oracles.average import average_of_one
from tests.oracles.grad_cam import grad_cam
from tests.oracles.insertion_deletion import insertion_deletion
from tests.oracles.opti_cam import opti_cam
from tests.oracles.poly_cam import minmax, poly_cam
from tests.oracles.score_cam import score_cam
from tests.support import IMAGENET_MEAN, IMAGENET_STD, as_model, call, explained, metric, noise, running, submit

DATA = Path(__file__).parent / "data"
# Here the official weights are, at some level, nothing but the rounding between its batches of one and of 32 rows.
ROUNDING = {"tiny_jump4__m", "tiny_odd__m"}
NORMS = {"plain_max_min": "range", "norm_max_min": "range", "plain_max": "max", "plain_sigmoid": "sigmoid"}
METHOD = {"p": "poly-cam+", "m": "poly-cam-", "pm": "poly-cam"}

# Network, input size, layers of Poly-CAM fine to coarse, layer of the others.
CASES: dict[str, tuple[tuple[int, int], list[str], str]] = {
    "tiny": ((32, 32), ["r1", "r2", "r3"], "r3"),
    "tiny odd": ((37, 29), ["r1", "r2", "r3"], "r3"),
    "vgg16": ((64, 64), ["features.3", "features.8"], "features.29"),
    "resnet50": ((64, 64), ["relu", "layer1"], "layer1"),
    "efficientnet-lite0": ((96, 96), ["blocks.1.0.bn1", "blocks.2.0.bn1"], "bn2"),
}
QUICK = ["tiny", "tiny odd"]


@cache
def network(name: str) -> nn.Module:
    if name.startswith("tiny"):
        return nets.tiny_cnn()
    if name == "efficientnet-lite0":
        return nets.lite0()
    tiles = photograph((256, 256)).unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return nets.calibrated(name, on=torch.cat([tiles, photograph((64, 64))[None]]))  # type: ignore[arg-type]


def photograph(size: tuple[int, int]) -> Tensor:
    """[3, H, W] normalised, of a cat."""
    prepare = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    return prepare(PIL.Image.fromarray(skimage.data.chelsea()))


def case(name: str, **options: Any) -> tuple[Model, Tensor, list[str], str]:
    size, layers, layer = CASES[name]
    return as_model(network(name), size, **options), photograph(size), layers, layer


def load(folder: str, name: str) -> dict[str, Any]:
    with np.load(DATA / folder / f"{name}.npz") as z:
        return dict(z)


def unit(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return minmax(F.interpolate(maps[None, None], size, mode="bilinear", align_corners=False)[0, 0])


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())


@pytest.fixture
def channel_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights [K, T] of each level of each Poly-CAM plan, as they are computed."""
    seen: list[Tensor] = []
    compute = served_poly_cam._channel_weights

    def spy(*args: Any, **kwargs: Any) -> Any:
        w, done = yield from compute(*args, **kwargs)
        seen.append(w)
        return w, done

    monkeypatch.setattr(served_poly_cam, "_channel_weights", spy)
    yield seen


# ---- Poly-CAM --------------------------------------------------------------------------------------------------------


def check_poly_cam(
    name: str,
    weights: Literal["p", "m", "pm"],
    variant: Literal["paper", "official"],
    seen: list[Tensor],
    tolerance: float = 2e-5,
    dtype: torch.dtype = torch.float32,
) -> None:
    size, layers, _ = CASES[name]
    model, x = as_model(copy.deepcopy(network(name)), size, dtype=dtype), photograph(size).to(dtype)
    A = nets.activations(model.module, x[None], layers)
    events: list[Event] = []
    ours = explained(model, x, call(model, METHOD[weights], layers, variant=variant), events=events)
    c = ours.targets.index[0]
    theirs = poly_cam(model.module, x[None], A, c, weights, variant)
    if float(theirs.levels[-1].max()) > 0:
        assert gap(ours.maps[0], theirs.map) < 1e-4
    for w, w_theirs, A_l in zip(seen, theirs.channel_weights, reversed(A), strict=True):
        live = A_l.flatten(1).any(dim=1)
        assert gap(w[live, 0], w_theirs[live]) < tolerance
        assert float(w.max()) > 1e-3, "weights that are all nothing compare nothing"
    levels = [finish_maps(event.maps, x.shape[1:])[0][0] for event in events if isinstance(event, Level)]
    assert len(levels) == len(layers)
    for level, level_theirs in zip(levels, theirs.levels, strict=True):
        assert gap(level, level_theirs) < 1e-4


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("weights", ["p", "m", "pm"])
@pytest.mark.parametrize("name", QUICK)
def test_poly_cam_on_tiny_nets(name: str, weights: Any, variant: Any, channel_weights: list[Tensor]) -> None:
    check_poly_cam(name, weights, variant, channel_weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "variant"),
    [
        ("vgg16", "pm", "paper"),
        ("vgg16", "pm", "official"),
        ("efficientnet-lite0", "pm", "paper"),
        ("efficientnet-lite0", "m", "paper"),
        ("efficientnet-lite0", "p", "paper"),
    ],
)
def test_poly_cam(name: str, weights: Any, variant: Any, channel_weights: list[Tensor]) -> None:
    check_poly_cam(name, weights, variant, channel_weights)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (torch.float64, 1e-9)])
def test_poly_cam_on_resnet50(dtype: torch.dtype, tolerance: float, channel_weights: list[Tensor]) -> None:
    """Fifty random layers amplify the rounding between batch sizes in float32; float64 shows that it is that alone."""
    check_poly_cam("resnet50", "pm", "paper", channel_weights, tolerance, dtype)


def test_several_targets_cost_no_further_rows_of_poly_cam() -> None:
    model, x, layers, _ = case("tiny")
    one = [explained(model, x, call(model, "poly-cam", layers), [c]) for c in (2, 5)]
    with running() as engine:
        job = submit(engine, model, x, call(model, "poly-cam", layers), [2, 5])
        both = job.future.result()
        alone = submit(engine, model, x, call(model, "poly-cam", layers), [2])
        alone.future.result()
    assert job.rows == alone.rows
    for t in range(2):
        assert torch.equal(both.maps[t], one[t].maps[0])


def test_dead_channels_owe_no_rows() -> None:
    model, x, layers, _ = case("tiny")
    A = nets.activations(model.module, x[None], layers)
    live = sum(int(A_l.flatten(1).any(dim=1).sum()) for A_l in A)
    assert live < sum(len(A_l) for A_l in A), "the network has dead channels"
    with running() as engine:
        job = submit(engine, model, x, call(model, "poly-cam", layers))
        job.future.result()
    assert job.rows == 1 + 1 + 2 * live, "the prediction, the activations, two masks for each live channel"


@pytest.mark.parametrize("stored", sorted({p.stem for p in (DATA / "poly-cam").glob("*.npz")} - ROUNDING))
def test_poly_cam_against_the_official_code(stored: str) -> None:
    z = load("poly-cam", stored)
    x = torch.from_numpy(z["x"][0])
    model = as_model(nets.tiny_poly(z, 4 if "jump4" in stored else 2), x.shape[1:])
    steps = x.shape[1]
    ours = explained(
        model,
        x,
        call(model, METHOD[stored.split("__")[1]], list(z["layers"]), variant="official"),
        [int(z["class_idx"])],
        [metric("insertion", steps=steps), metric("deletion", steps=steps)],
    )
    assert gap(ours.maps[0], torch.from_numpy(z["map"])) < 1e-5
    insertion, deletion = ours.scores[0]
    assert insertion.value == pytest.approx(float(z["ins_auc"]), abs=1e-6)
    assert deletion.value == pytest.approx(float(z["del_auc"]), abs=1e-6)
    assert insertion.curve == pytest.approx(z["ins"].tolist(), abs=1e-6)


# ---- Opti-CAM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", sorted(path.stem for path in (DATA / "opti-cam").glob("tiny_s0*b1_float64.npz")))
def test_opti_cam_against_the_official_code(stored: str) -> None:
    """float64, 100 steps: 1e-9 in the map that the plan returns (the wire carries float32)."""
    z = load("opti-cam", stored)
    net = nets.tiny_opti(z)
    net[0] = nn.Identity()  # the normalisation is the model's preprocessing here
    model = as_model(net, (32, 32), dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = (torch.from_numpy(z["x"][0]) - mean) / std
    stopped = "norm_" in stored  # the official stop rule ended this one
    ours = opti_map(
        model,
        x,
        int(z["c"][0]),
        "4",
        norm=next(ours for theirs, ours in NORMS.items() if f"_{theirs}_b1" in stored),
        objective="diff" if stopped else "mask",
        stop="official" if stopped else "none",
    )
    assert gap(ours, torch.from_numpy(z["saliency"][0, 0])) < 1e-9


def opti_map(model: Model, x: Tensor, c: int, layer: str, **parameters: object) -> Tensor:
    """The map in the model's own precision."""
    image = model.image(x)
    with torch.no_grad():
        logits = model.module(image.tensor[None])[0].double()
    c_ = Targets((c,), model.probabilities(logits)[[c]], logits[[c]])
    with running() as engine:
        plan = METHODS["opti-cam"].plan(image, c_, layer, **parameters)
        result: SaliencyMaps = engine.submit(plan, model, rows=100).future.result()
    return result.finish(result.raw, image.size)[0]  # type: ignore[misc]


@pytest.mark.parametrize("norm", ["range", "max", "sigmoid"])
@pytest.mark.parametrize("mask_space", ["raw", "normalised"])
@pytest.mark.parametrize("objective", ["mask", "diff"])
@pytest.mark.parametrize("relu", [True, False])
def test_opti_cam_in_float64(norm: Any, mask_space: Any, objective: Any, relu: bool) -> None:
    layer = "c3" if not relu else "r3"  # a signed layer, where it makes a difference
    model, x, _, _ = case("tiny", dtype=torch.float64)
    x = x.double()
    options: dict[str, Any] = {
        "norm": norm,
        "mask_space": mask_space,
        "objective": objective,
        "relu": relu,
        "steps": 30,
    }
    if norm == "max" and not relu:
        pytest.skip("a signed map has no meaningful maximum")
    ours = opti_map(model, x, 3, layer, **options)
    (A,) = nets.activations(model.module, x[None], [layer])
    theirs = opti_cam(model.module, x[None], A, 3, mean=IMAGENET_MEAN, std=IMAGENET_STD, **options)
    assert gap(ours, theirs.saliency) < 1e-9


@pytest.mark.slow
def test_opti_cam_in_float64_on_trained_weights() -> None:
    net = nets.lite0().double()
    model = as_model(net, (96, 96), dtype=torch.float64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    x = photograph((96, 96)).double()
    ours = opti_map(model, x, 281, "blocks.3.0.bn1", steps=10)
    (A,) = nets.activations(net, x[None], ["blocks.3.0.bn1"])
    theirs = opti_cam(net, x[None], A, 281, mean=(0.5,) * 3, std=(0.5,) * 3, steps=10)
    assert gap(ours, theirs.saliency) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "vgg16", "resnet50", "efficientnet-lite0"])
def test_opti_cam_in_float32(name: str) -> None:
    """float32 iterates diverge, so only the first ten steps are compared by the map."""
    model, x, _, layer = case(name)
    layer = "blocks.3.0.bn1" if name == "efficientnet-lite0" else layer  # the oracle goes channel by channel
    (A,) = nets.activations(model.module, x[None], [layer])
    c = int(model.module(x[None])[0].argmax())
    for steps, tolerance in ((1, 5e-3), (3, 2e-2), (10, 5e-2)):
        theirs = opti_cam(model.module, x[None], A, c, steps=steps, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        ours = explained(model, x, call(model, "opti-cam", [layer], steps=steps), [c], batch_sizes={"ascend": 1})
        assert gap(ours.maps[0], theirs.saliency) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("mask_space", ["raw", "normalised"])
def test_opti_cam_in_float32_reaches_what_the_oracle_reaches(mask_space: Any) -> None:
    """A hundred steps on trained weights: the objective to 2 %, the average gain to 2 of 100."""
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    model = as_model(nets.lite0(), (224, 224), mean=mean, std=std)
    x = model.preprocessing(PIL.Image.fromarray(skimage.data.chelsea()))
    layer = "blocks.5.0.bn1"
    (A,) = nets.activations(model.module, x[None], [layer])
    c = int(model.module(x[None])[0].argmax())
    theirs = opti_cam(model.module, x[None], A, c, mean=mean, std=std, mask_space=mask_space)
    asked = call(model, "opti-cam", [layer], mask_space=mask_space)
    # A row a batch, as it is alone: no padding.
    ours = explained(model, x, asked, [c], [metric("average-gain")], batch_sizes={"ascend": 1})
    reached, aim = (masked_logits(model, x, s, mask_space)[c] for s in (ours.maps[0], theirs.saliency))
    assert aim > masked_logits(model, x, torch.ones(224, 224))[c] + 1, "the ascent has ascended"
    assert reached == pytest.approx(aim, rel=0.02)
    gain = average_of_one(
        masked_logits(model, x, torch.ones(224, 224)), masked_logits(model, x, theirs.saliency), c
    ).gain
    assert ours.scores[0][0].value == pytest.approx(gain, abs=2.0)
    assert mask_space == "raw" or gain > 50


@torch.no_grad()
def masked_logits(model: Model, x: Tensor, s: Tensor, space: str = "normalised") -> list[float]:
    _, mean, std = (value.float() for value in vars(model.image(x)).values())
    row = x * s if space == "normalised" else ((x * std + mean) * s - mean) / std
    logits: list[float] = model.module(row[None].to(model.dtype))[0].tolist()
    return logits


# ---- Grad-CAM and Score-CAM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", CASES)
def test_grad_cam(name: str, dtype: torch.dtype, tolerance: float) -> None:
    if name == "resnet50" and dtype == torch.float32:
        tolerance = 3e-2  # the gradients of fifty random layers amplify rounding: see float64
    size, _, layer = CASES[name]
    model, x = as_model(copy.deepcopy(network(name)), size, dtype=dtype), photograph(size).to(dtype)
    ours = explained(model, x, call(model, "grad-cam", [layer]))
    c, module = ours.targets.index[0], model.module.get_submodule(layer)
    assert gap(ours.maps[0], unit(grad_cam(model.module, x[None], module, c).map, x.shape[1:])) < tolerance
    theirs = captum.attr.LayerGradCam(model.module, module).attribute(
        x[None].clone().requires_grad_(), c, relu_attributions=True
    )
    assert gap(ours.maps[0], unit(theirs.detach()[0, 0], x.shape[1:])) < tolerance


@pytest.mark.parametrize(("score", "channel_softmax"), [("logit", True), ("probability", False), ("probability", True)])
@pytest.mark.parametrize("name", QUICK)
def test_score_cam_on_tiny_nets(name: str, score: Any, channel_softmax: bool) -> None:
    check_score_cam(name, score, channel_softmax)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "efficientnet-lite0"])
def test_score_cam(name: str) -> None:
    check_score_cam(name, "logit", True)


def check_score_cam(name: str, score: Literal["logit", "probability"], channel_softmax: bool) -> None:
    model, x, _, layer = case(name)
    (A,) = nets.activations(model.module, x[None], [layer])
    parameters: dict[str, Any] = {"score": score, "channel_softmax": channel_softmax}
    ours = explained(model, x, call(model, "score-cam", [layer], **parameters))
    theirs = score_cam(model.module, x[None], A, ours.targets.index[0], **parameters)
    assert gap(ours.maps[0], unit(theirs.map, x.shape[1:])) < 1e-4
    assert gap(ours.raw[0], theirs.map) < 1e-4


# ---- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auc", ["mean", "trapezoid"])
@pytest.mark.parametrize("baseline", ["blur", "black", "mean"])
@pytest.mark.parametrize("name", QUICK)
def test_insertion_and_deletion(name: str, baseline: Any, auc: Any) -> None:
    model, x, _, _ = case(name)
    S = noise(*x.shape[1:]).clamp(0, 1)  # half of the pixels tie at zero
    options: dict[str, Any] = {"steps": 20, "baseline": baseline, "auc": auc}
    ours = explained(model, x, S, [4], [metric("insertion", **options), metric("deletion", **options)])
    theirs = insertion_deletion(model.module, x[None], S, 4, **options)
    insertion, deletion = ours.scores[0]
    assert insertion.curve == pytest.approx(theirs.insertion.tolist(), abs=1e-5)
    assert deletion.curve == pytest.approx(theirs.deletion.tolist(), abs=1e-5)
    assert (insertion.value, deletion.value) == pytest.approx((theirs.insertion_auc, theirs.deletion_auc), abs=1e-5)


@pytest.mark.slow
def test_insertion_and_deletion_on_trained_weights() -> None:
    model, x, _, _ = case("efficientnet-lite0")
    S = noise(24, 24).clamp(0, 1)
    ours = explained(model, x, S, [281], [metric("insertion"), metric("deletion")])
    at_input = ours.maps[0]
    theirs = insertion_deletion(model.module, x[None], at_input, 281)
    assert [s.value for s in ours.scores[0]] == pytest.approx([theirs.insertion_auc, theirs.deletion_auc], abs=1e-5)


@pytest.mark.parametrize("name", [*QUICK, "efficientnet-lite0"])
def test_average_drop_increase_and_gain(name: str) -> None:
    model, x, _, _ = case(name)
    names = ("average-drop", "average-increase", "average-gain")
    seen = set()
    likeliest = model.module(x[None])[0].argsort(descending=True).tolist()
    for seed in range(6):
        S = noise(*x.shape[1:], seed=seed).mul(0.2 * seed).sigmoid()
        c = likeliest[0] if seed < 3 and name not in QUICK else seed
        ours: RequestResult = explained(model, x, S, [c], [metric(n) for n in names])
        theirs = average_of_one(masked_logits(model, x, torch.ones_like(S)), masked_logits(model, x, S), c)
        drop, increase, gain = (score.value for score in ours.scores[0])
        assert (drop, gain) == pytest.approx((theirs.drop, theirs.gain), abs=1e-3)
        assert increase == theirs.increase
        seen.add(increase)
    assert seen == {0.0, 100.0}, "both a rise and a fall must have been seen"
