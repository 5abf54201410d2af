"""Networks of several architectures on one server: it serves the methods that it lists and refuses the others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from torch import nn

import camserve
from camserve_server import registry
from camserve_server.config import Config, ModelConfig
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.processes import patient_client

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
QUICK: dict[str, dict[str, object]] = {
    "opti-cam": {"steps": 2},
    "rise": {"masks": 4},
    "ss-cam": {"samples": 1},
    "is-cam": {"steps": 1},
    "integrated-gradients": {"steps": 2},
    "smooth-grad": {"samples": 2},
    "gradient-shap": {"samples": 2},
    "occlusion": {"window": 16, "stride": 16},
}
# The limit of rows for methods that use one for each channel.
BUDGET = 40
ATTENTION = {"raw-attention", "attention-rollout"}


def grey_labels() -> nn.Module:
    """Return a greyscale network with four labels that do not exclude each other."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(360, 4)
    )


def one_logit() -> nn.Module:
    """Return a network with a single output."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))


def model(name: str, source: str, size: tuple[int, int], **more: object) -> ModelConfig:
    untrained = source.startswith(("timm", "torchvision"))
    return ModelConfig.model_validate(
        {"name": name, "source": source, "input_size": size, "batch_size": 4, "allow_random_weights": untrained, **more}
    )


MODELS = [
    model("resnet", "torchvision:resnet18", (48, 80)),
    model("vit", "timm:vit_tiny_patch16_224", (64, 64)),
    model("deit", "timm:deit_tiny_distilled_patch16_224", (64, 64)),
    model("torchvision-vit", "python:tests.e2e.test_models:small_vit", (48, 48)),
    model("swin", "python:tests.e2e.test_models:small_swin", (32, 64)),
    model("timm-swin", "python:tests.e2e.test_models:small_timm_swin", (64, 64)),
    model("grey", "python:tests.e2e.test_models:grey_labels", (40, 24), mean=[0.5], std=[0.25], head="sigmoid"),
    model("one", "python:tests.e2e.test_models:one_logit", (33, 33)),
]


def small_vit() -> nn.Module:
    """Return a small vision transformer of torchvision."""
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401

    import torchvision  # isort: skip

    net: nn.Module = torchvision.models.VisionTransformer(48, 16, 2, 3, 48, 96, num_classes=6)
    head = net.get_parameter("heads.head.weight")
    nn.init.normal_(head)  # torchvision initialises it with zeros
    return net


def small_swin() -> nn.Module:
    """Return a small Swin transformer of torchvision."""
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401

    import torchvision  # isort: skip

    net: nn.Module = torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=6)
    return net


def small_timm_swin() -> nn.Module:
    """Return a small Swin transformer of timm."""
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401

    import timm  # isort: skip

    net: nn.Module = timm.models.SwinTransformer(
        64, embed_dim=24, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=6
    )
    return net


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Config(listen="127.0.0.1:0", models=MODELS)) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("name", [model.name for model in MODELS])
def test_listed_methods_are_served_and_others_refused(server: Server, name: str) -> None:
    with patient_client(server.address) as client:
        listed = next(model for model in client.models() if model.name == name)
        methods = {method.name: method for method in client.methods(name)}
        assert set(methods) == set(registry.METHODS)
        for method in methods.values():
            parameters = QUICK.get(method.name, {})
            budget = BUDGET if method.anytime else None
            if method.name not in listed.methods:
                assert method.unavailable
                with pytest.raises(camserve.FailedPrecondition, match="cannot serve"):
                    client.explain(IMAGE, model=name, method=method.name, parameters=parameters)
                continue
            explanation = client.explain(
                IMAGE, model=name, method=method.name, parameters=parameters, budget=budget, metrics=["average-gain"]
            )
            assert explanation.saliency.shape == tuple(listed.input_size)
            assert np.isfinite(explanation.saliency).all()
            assert explanation.cost.rows <= (BUDGET if method.anytime else 2 + method.rows)


@pytest.mark.slow
def test_methods_of_each_architecture(server: Server) -> None:
    with patient_client(server.address) as client:
        models = {model.name: model for model in client.models()}
    everything = set(registry.METHODS)
    assert everything - set(models["resnet"].methods) == ATTENTION
    assert everything - set(models["one"].methods) == ATTENTION
    assert everything - set(models["grey"].methods) == {*ATTENTION, "cam"}, "it has no pooling before its linear layer"
    for name in ("vit", "deit", "torchvision-vit"):
        assert everything - set(models[name].methods) == {"cam"}
        assert len(models[name].layers) == 1
    for name in ("swin", "timm-swin"):
        assert everything - set(models[name].methods) == ATTENTION, "they have no class token"
    assert [layer.prefix_tokens for layer in models["deit"].named_layers if layer.name == "blocks.11.norm1"] == [2]
    assert (models["grey"].input_channels, models["grey"].head) == (1, "sigmoid")
    assert (models["one"].classes, models["one"].head) == (2, "sigmoid")
    assert models["one"].labels == ("positive", "negative")
    assert all(layer.cut is not None and layer.cut < 0.05 for model in models.values() for layer in model.layers)


@pytest.mark.slow
def test_sigmoid_probabilities_are_independent(server: Server) -> None:
    with patient_client(server.address) as client:
        explanation = client.explain(IMAGE, model="grey", method="grad-cam", top_k=4)
        grey = IMAGE.mean(axis=2).astype(np.uint8)
        assert client.explain(grey, model="grey", method="grad-cam").saliency.shape == (40, 24)
        for baseline in ("blur", "black", "mean"):
            score = client.evaluate(
                grey, model="grey", method="grad-cam", metrics={"insertion": {"steps": 8, "baseline": baseline}}
            )
            assert 0 < score.scores["insertion"] < 1
    for prediction in explanation.predictions:
        assert prediction.probability == pytest.approx(1 / (1 + np.exp(-prediction.logit)), abs=1e-12)
    assert len(explanation.maps) == 4


@pytest.mark.slow
def test_layer_can_name_one_call_of_a_repeated_module(server: Server) -> None:
    with patient_client(server.address) as client:
        by_call = client.explain(IMAGE, model="resnet", method="grad-cam", layers=["layer4.1.relu#2"])
        by_block = client.explain(IMAGE, model="resnet", method="grad-cam", layers=["layer4"])
        assert np.array_equal(by_call.saliency, by_block.saliency), "the block returns its last activation"
        assert by_call.receipt.layers == ("layer4.1.relu#2",)
        with pytest.raises(camserve.InvalidArgument, match="name one call"):
            client.explain(IMAGE, model="resnet", method="grad-cam", layers=["layer4.1.relu"])
        several = client.explain(IMAGE, model="vit", method="layer-cam", layers=["blocks.5.norm1", "blocks.11.norm1"])
        assert several.saliency.shape == (64, 64)
