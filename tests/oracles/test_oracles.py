"""Oracles against stored maps of the official code of the papers, and against other libraries."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import nets
from tests.oracles.average import average, average_of_one
from tests.oracles.comparison import gap
from tests.oracles.grad_cam import grad_cam
from tests.oracles.insertion_deletion import falling_order, gaussian_blur, insertion_deletion
from tests.oracles.opti_cam import OptiCam, opti_cam
from tests.oracles.poly_cam import PolyCam, compose, lnorm, poly_cam, scaled
from tests.oracles.score_cam import score_cam

DATA = Path(__file__).parent / "data"
POLY = sorted(path.stem for path in (DATA / "poly-cam").glob("*.npz"))
OPTI = sorted(path.stem for path in (DATA / "opti-cam").glob("tiny_s0*float64.npz"))
# In these files, the weights of PCAM− at some level contain only the rounding between batches of 1 and of 32 rows.
ROUNDING = {"tiny_jump4__m", "tiny_odd__m"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, because a second one slows down such small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(folder: str, name: str) -> Any:
    return np.load(DATA / folder / f"{name}.npz")


def poly_setup(name: str) -> tuple[Any, nets.TinyPoly, Tensor, int, list[Tensor]]:
    z = stored("poly-cam", name)
    net = nets.tiny_poly(z, first_pool=4 if "jump4" in name else 2)
    x = torch.from_numpy(z["x"])
    return z, net, x, int(z["class_idx"]), nets.activations(net, x, list(z["layers"]))


def run_poly(name: str, variant: Any, weights: Any = None) -> tuple[Any, PolyCam]:
    z, net, x, c, A = poly_setup(name)
    default: Any = name.split("__")[1]
    return z, poly_cam(net, x, A, c, weights or default, variant)


# --- Poly-CAM ---


@pytest.mark.parametrize("name", POLY)
def test_official_poly_cam_reproduces_the_stored_maps(name: str) -> None:
    z, ours = run_poly(name, "official")
    for level, w in enumerate(ours.channel_weights):
        assert gap(w, z[f"level{level}_weights"]) < 2e-5  # seen: 1e-7
    if name not in ROUNDING:
        assert gap(ours.map, z["map"]) < 1e-4  # seen: 2e-6
        for level, M in enumerate(ours.levels):
            assert gap(M, z[f"level{level}_map"]) < 1e-4


@pytest.mark.parametrize("name", POLY)
def test_official_poly_cam_composes_stored_weights_to_stored_maps(name: str) -> None:
    z, _, x, _, A = poly_setup(name)
    w = [torch.from_numpy(z[f"level{level}_weights"]) for level in range(3)]
    for level, M in enumerate(compose(A, w, (x.shape[2], x.shape[3]), "official")):
        assert gap(M, z[f"level{level}_map"]) < 2e-5


@pytest.mark.parametrize("name", [name for name in POLY if name not in ROUNDING])
def test_poly_cam_variants_and_weights_differ(name: str) -> None:
    z, paper = run_poly(name, "paper")
    assert gap(paper.map, z["map"]) > 0.01
    assert gap(paper.levels[0], z["level0_map"]) > 0.01
    assert gap(paper.channel_weights[0], z["level0_weights"]) > 1e-4
    others = {"p", "m", "pm"} - {name.split("__")[1]}
    for weights in others:
        _, other = run_poly(name, "official", weights)
        assert gap(other.channel_weights[0], z["level0_weights"]) > 1e-3


def test_poly_cam_paper_by_hand() -> None:
    """Two channels, two levels and a model that is linear in the pixels show every step of eq. 1 to 6."""
    x = torch.ones(1, 3, 4, 4)
    fine = torch.zeros(1, 4, 4)
    fine[0, 0, 0] = 2.0
    coarse = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[4.0, 0.0], [0.0, 0.0]]])

    def model(rows: Tensor) -> Tensor:  # One logit, so the oracle uses the sigmoid.
        return rows[:, 0, 0, 0][:, None] * 2

    def p(pixel: float) -> float:
        return 1 / (1 + math.exp(-2 * pixel))

    ours = poly_cam(model, x, [fine, coarse], 0, "pm", "paper")
    constant, corner = (
        p(1) + p(0) - p(1),
        p(1) + p(1) - p(0),
    )  # The mask of the corner is 1 at (0, 0).
    assert ours.channel_weights[0].tolist() == pytest.approx([constant, corner])
    S = constant * coarse[0] + corner * coarse[1]
    up = F.interpolate(S[None, None], (4, 4), mode="bilinear", align_corners=False)[0, 0]
    assert gap(ours.levels[0], (up - up.min()) / (up.max() - up.min())) < 1e-6
    # The bright pixel of `fine` is 2, the mean of its block 0.5. Bilinear resizing keeps this corner: 4.
    expected = torch.zeros(4, 4)
    expected[0, 0] = 1.0
    assert gap(ours.map, expected) < 1e-6


def test_lnorm_averages_blocks_unlike_the_official_code() -> None:
    S = torch.zeros(8, 8)
    S[0, 0] = 16.0  # At ratio 4, the mean of its block is 1, and the bilinear sample is 0.
    assert lnorm(S, (2, 2), "paper")[0, 0].item() == pytest.approx(16.0)
    assert lnorm(S, (2, 2), "official")[0, 0].item() == pytest.approx(16e12)
    assert gap(lnorm(S, (4, 4), "paper"), lnorm(S, (4, 4), "official")) < 1e-5


def test_only_the_official_poly_cam_uses_a_level_of_the_same_size() -> None:
    net = nets.tiny_cnn(0)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    r1, r2, r3 = nets.activations(net, x, ["r1", "r2", "r3"])
    skipped, plain = (poly_cam(net, x, A, 1, "pm", "paper") for A in ([r1, r2, r3[:5], r3], [r1, r2, r3]))
    assert gap(skipped.map, plain.map) == 0
    assert gap(skipped.levels[1], skipped.levels[0]) == 0
    assert len(skipped.channel_weights[1]) == 0
    # S / S is 1 if S_l is positive, but 0 if it is 0, so the level can have an effect.
    holes = r3[:1].clone() * 0 + 1
    holes[0, 0, 0] = 0
    first, second = compose([holes, r3], [torch.ones(20), torch.ones(1)], (16, 16), "official")
    assert gap(first, second) > 0.01
    first, second = compose([holes + 1, r3], [torch.ones(20), torch.ones(1)], (16, 16), "official")
    assert gap(first, second) < 1e-6


def test_constant_channel_has_a_zero_mask_despite_rounding() -> None:
    assert scaled(torch.full((10, 10), 0.3), (37, 37), "paper").abs().max() == 0


# --- Opti-CAM ---


def run_opti(z: Any, image: int = 0, **options: Any) -> OptiCam:
    meta = json.loads(str(z["meta"]))
    net = nets.tiny_opti(z)
    x = torch.from_numpy(z["x"][image : image + 1])
    defaults: dict[str, Any] = {
        "norm": {"max_min": "range"}.get(meta["norm"], meta["norm"]),
        "objective": {"plain": "mask", "norm": "diff"}[meta["loss"]],
        "steps": meta["max_iter"],
        "rate": meta["lr"],
        "stop": "official",
    }
    A = nets.activations(net, x, ["4"])[0]
    return opti_cam(net, x, A, int(z["c"][image]), **(defaults | options))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTI)
def test_opti_cam_reproduces_the_stored_maps_in_float64(name: str) -> None:
    z = stored("opti-cam", name)
    summed_stop = "norm_max_min_b2" in name  # The official code stops on the loss of its batch.
    for image in range(1 if summed_stop else len(z["x"])):
        ours = run_opti(z, image)
        assert gap(ours.saliency, z["saliency"][image, 0]) < 1e-10
        assert gap(ours.u, z["w"][image]) < 1e-10
        assert len(ours.objective) == len(z["loss"])
        assert ours.stopped == json.loads(str(z["meta"]))["stopped"]
        sign = np.abs(z["f_orig"][image] - z["f_masked"][:, image])
        theirs = -sign if "_norm_" in name else z["f_masked"][:, image]
        assert gap(ours.objective, theirs) < 1e-10


def test_opti_cam_stops_per_image() -> None:
    ours = run_opti(stored("opti-cam", "tiny_s0_norm_max_min_b2_float64"), image=1)
    assert ours.stopped
    assert len(ours.objective) == 31  # 51 with the sum over the batch.


def test_opti_cam_matches_the_first_steps_in_float32() -> None:
    z = stored("opti-cam", "tiny_s0_plain_max_min_b1_float32")
    assert gap(run_opti(z).objective[:10], z["f_masked"][:10, 0]) < 1e-4


@pytest.mark.slow
def test_opti_cam_options_change_the_map() -> None:
    z = stored("opti-cam", "tiny_s0_norm_max_min_b1_float64")
    for option in (
        {"stop": None},
        {"objective": "mask"},
        {"norm": "max"},
        {"norm": "sigmoid"},
    ):
        assert gap(run_opti(z, **option).saliency, z["saliency"][0, 0]) > 1e-3, option


@pytest.mark.slow
def test_opti_cam_masks_raw_pixels_of_a_normalised_input() -> None:
    """Normalising outside of the model gives the same map, masking the normalised image gives another."""
    z = stored("opti-cam", "tiny_s0_plain_max_min_b1_float64")
    net = nets.tiny_opti(z)
    raw = torch.from_numpy(z["x"])
    x, inner = net[0](raw), net[1:]
    A = nets.activations(net, raw, ["4"])[0]
    outside: dict[str, Any] = {"mean": nets.IMAGENET_MEAN, "std": nets.IMAGENET_STD}
    ours = opti_cam(inner, x, A, int(z["c"][0]), **outside)
    assert gap(ours.saliency, z["saliency"][0, 0]) < 1e-10
    other = opti_cam(inner, x, A, int(z["c"][0]), mask_space="normalised", **outside)
    assert gap(other.saliency, z["saliency"][0, 0]) > 1e-3


def test_opti_cam_with_relu_and_with_constant_maps() -> None:
    z = stored("opti-cam", "tiny_s0_plain_max_min_b1_float64")
    net, x = nets.tiny_opti(z), torch.from_numpy(z["x"])
    signed = nets.activations(net, x, ["3"])[0]
    with_relu, without = (opti_cam(net, x, signed, 2, steps=5, relu=relu) for relu in (True, False))
    assert gap(with_relu.saliency, without.saliency) > 1e-3
    constant = stored("opti-cam", "tiny_constant_map_float64")
    assert np.isnan(constant["saliency"]).all()
    ours = run_opti(constant)
    assert ours.saliency.abs().max() == 0
    assert ours.objective == []


# --- Grad-CAM and Score-CAM, against libraries ---


@pytest.mark.parametrize("layer", ["r1", "r2", "r3"])
def test_grad_cam_agrees_with_captum_and_torchcam(layer: str) -> None:
    from captum.attr import LayerGradCam
    from torchcam.methods import GradCAM

    net = nets.tiny_cnn(1)
    module = dict(net.named_modules())[layer]
    x = torch.randn(1, 3, 24, 20, generator=torch.Generator().manual_seed(2))
    c = int(net(x).argmax())
    ours = grad_cam(net, x, module, c).map
    assert ours.max() > 0
    theirs = LayerGradCam(net, module).attribute(x, target=c, relu_attributions=True)[0, 0]
    assert gap(ours, theirs.detach()) < 2e-6
    with GradCAM(net, layer) as extractor:
        scores = net(x.clone().requires_grad_())
        (theirs,) = extractor(c, scores, normalized=False)
    assert gap(ours, theirs[0].relu().detach()) < 2e-6
    assert gap(ours, grad_cam(net, x, module, (c + 1) % 7).map) > 1e-3


def test_score_cam_agrees_with_torchcam_without_upsampling() -> None:
    """torchcam scales before upsampling. This is the same only at r1, whose maps have the size of the input."""
    from torchcam.methods import ScoreCAM

    net = nets.tiny_cnn(1)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    c = int(net(x).argmax())
    gaps = {}
    for layer in ("r1", "r2", "r3"):
        ours = score_cam(net, x, nets.activations(net, x, [layer])[0], c)
        with ScoreCAM(net, layer, input_shape=(3, 16, 16)) as extractor:
            net(x)
            (theirs,) = extractor(c, normalized=False)
        gaps[layer] = gap(ours.map, theirs[0])
        assert ours.weights.sum().item() == pytest.approx(1.0)
    assert gaps["r1"] < 2e-6
    assert gaps["r2"] > 1e-4
    assert gaps["r3"] > 1e-4


def test_score_cam_without_softmax_has_the_weights_of_poly_cam_plus() -> None:
    net = nets.tiny_cnn(1)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    A = nets.activations(net, x, ["r3"])[0]
    ours = score_cam(net, x, A, 1, score="probability", channel_softmax=False)
    assert gap(ours.weights, poly_cam(net, x, [A], 1, "p", "paper").channel_weights[0]) < 1e-6


# --- Insertion and deletion, average drop, increase and gain ---


@pytest.mark.parametrize("name", [name for name in POLY if name not in ROUNDING])
def test_insertion_deletion_reproduces_the_stored_curves(name: str) -> None:
    z, net, x, c, _ = poly_setup(name)
    ours = insertion_deletion(net, x, torch.from_numpy(z["map"]), c, steps=x.shape[2])
    assert gap(ours.insertion, z["ins"]) < 2e-5  # seen: 1e-7
    assert gap(ours.deletion, z["dele"]) < 2e-5
    assert ours.insertion_auc == pytest.approx(float(z["ins_auc"]), abs=2e-5)
    assert ours.deletion_auc == pytest.approx(float(z["del_auc"]), abs=2e-5)
    assert gap(ours.insertion, z["dele"]) > 1e-3


def test_insertion_deletion_with_ties_and_at_the_ends() -> None:
    assert falling_order(torch.tensor([[1.0, 3.0], [3.0, 1.0]])) == [2, 1, 3, 0]
    net = nets.tiny_cnn(0)
    x = torch.randn(1, 3, 9, 11, generator=torch.Generator().manual_seed(2))
    s = torch.rand(9, 11, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole, ground = (torch.softmax(net(rows)[0], 0)[1].item() for rows in (x, torch.zeros_like(x)))
    ours = insertion_deletion(net, x, s, 1, steps=10, baseline="mean")  # 10 pixels per step, 9 in the last one.
    assert len(ours.insertion) == 10
    assert ours.insertion[-1].item() == pytest.approx(whole, abs=1e-6)
    assert ours.deletion[-1].item() == pytest.approx(ground, abs=1e-6)
    both_ends = insertion_deletion(net, x, s, 1, steps=10, baseline="mean", auc="trapezoid")
    assert len(both_ends.insertion) == 11
    assert both_ends.insertion[0].item() == pytest.approx(ground, abs=1e-6)
    assert both_ends.insertion_auc == pytest.approx(np.trapezoid(both_ends.insertion.numpy(), dx=0.1), abs=1e-6)
    black = insertion_deletion(net, x, s, 1, steps=10, baseline="black")
    assert gap(black.insertion, ours.insertion) > 1e-4


def test_blur_agrees_with_torchvision() -> None:
    from torchvision.transforms.functional import gaussian_blur as theirs

    x = torch.randn(1, 3, 9, 14, generator=torch.Generator().manual_seed(2))
    assert gap(gaussian_blur(x), theirs(x, kernel_size=[11, 11], sigma=[5, 5])) < 1e-6


def test_average_by_hand() -> None:
    quarter, half, sure = [0.0, math.log(3)], [0.0, 0.0], [100.0, 0.0]
    dropped = average_of_one(half, quarter, 0)
    assert dropped.drop == pytest.approx(50)
    assert (dropped.increase, dropped.gain) == (0, 0)
    gained = average_of_one(quarter, half, 0)
    assert gained.gain == pytest.approx(100 / 3)
    assert (gained.drop, gained.increase) == (0, 100)
    certain = average_of_one(sure, half, 0)
    assert certain.drop == pytest.approx(50)
    assert (certain.increase, certain.gain) == (0, 0)
    assert average_of_one(sure, sure, 0).gain == 0
    both = average([half, quarter], [quarter, half], [0, 0])
    assert (both.drop, both.gain) == pytest.approx((25, 50 / 3))
    assert both.increase == 50


# --- Networks of the tests ---


def test_tiny_cnn_has_dead_constant_and_nearly_dead_channels() -> None:
    net = nets.tiny_cnn(3)
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for size in ((8, 8), (9, 13), (32, 20)):
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
        assert net(x).shape == (1, 7)
        for A in nets.activations(net, x, ["r1", "r2", "r3"]):
            assert A[0].abs().max() == 0
            assert A[1].min() == A[1].max() == 0.5
    for layer in ("r1", "r2", "r3"):
        alive = torch.stack([nets.activations(net, x[None], [layer])[0][2] > 0 for x in noise]).float().mean()
        assert 0 < alive < 0.05
    assert gap(net(noise), nets.tiny_cnn(3)(noise)) == 0
    assert gap(net(noise), nets.tiny_cnn(4)(noise)) > 0.1
    probabilities = torch.softmax(net(noise), 1)
    assert 0.2 < probabilities.max(1).values.mean() < 0.999
