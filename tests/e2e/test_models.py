"""Networks of all kinds on one real server: what each says it serves, it serves, and the rest is refused."""

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

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
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
# At most so many rows, where a method has one for each channel.
BUDGET = 40
ATTENTION = {"raw-attention", "attention-rollout"}


def grey_labels() -> nn.Module:
    """A grey-scale network of four labels that may all be right."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(360, 4)
    )


def one_logit() -> nn.Module:
    """Yes or no."""
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
    """torchvision's transformer, small."""
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401

    import torchvision  # isort: skip

    net: nn.Module = torchvision.models.VisionTransformer(48, 16, 2, 3, 48, 96, num_classes=6)
    nn.init.normal_(net.heads.head.weight)  # it starts with zeros
    return net


def small_swin() -> nn.Module:
    """torchvision's Swin, small."""
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401

    import torchvision  # isort: skip

    return torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=6)


def small_timm_swin() -> nn.Module:
    """timm's Swin, small."""
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401

    import timm  # isort: skip

    return timm.models.SwinTransformer(64, embed_dim=24, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=6)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Config(listen="127.0.0.1:0", models=MODELS)) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("name", [model.name for model in MODELS])
def test_what_is_listed_is_served(server: Server, name: str) -> None:
    with camserve.Client(server.address) as client:
        listed = next(model for model in client.models() if model.name == name)
        methods = {method.name: method for method in client.methods(name)}
        assert set(methods) == set(registry.METHODS)
        for method in methods.values():
            parameters = QUICK.get(method.name, {})
            budget = BUDGET if method.anytime else None
            if method.name not in listed.methods:
                assert method.unavailable
                with pytest.raises(camserve.FailedPrecondition, match="cannot serve"):
                    client.explain(PICTURE, model=name, method=method.name, parameters=parameters)
                continue
            explanation = client.explain(
                PICTURE, model=name, method=method.name, parameters=parameters, budget=budget, metrics=["average-gain"]
            )
            assert explanation.saliency.shape == tuple(listed.input_size)
            assert np.isfinite(explanation.saliency).all()
            assert explanation.cost.rows <= (BUDGET if method.anytime else 2 + method.rows)


def test_which_serves_what(server: Server) -> None:
    with camserve.Client(server.address) as client:
        models = {model.name: model for model in client.models()}
    everything = set(registry.METHODS)
    assert everything - set(models["resnet"].methods) == ATTENTION
    assert everything - set(models["one"].methods) == ATTENTION
    assert everything - set(models["grey"].methods) == {*ATTENTION, "cam"}, "no pooling before its linear layer"
    several = {"poly-cam", "poly-cam+", "poly-cam-", "layer-cam", "zoom-cam"}
    for name in ("vit", "deit", "torchvision-vit"):
        assert everything - set(models[name].methods) == {*several, "cam"}
    for name in ("swin", "timm-swin"):
        assert everything - set(models[name].methods) == {*several, *ATTENTION}, "windows have no class token"
    assert [layer.prefix_tokens for layer in models["deit"].named_layers if layer.name == "blocks.11.norm1"] == [2]
    assert (models["grey"].input_channels, models["grey"].head) == (1, "sigmoid")
    assert (models["one"].classes, models["one"].head) == (1, "sigmoid")


def test_labels_that_may_all_be_right_do_not_add_up(server: Server) -> None:
    with camserve.Client(server.address) as client:
        explanation = client.explain(PICTURE, model="grey", method="grad-cam", top_k=4)
        grey = PICTURE.mean(axis=2).astype(np.uint8)
        assert client.explain(grey, model="grey", method="grad-cam").saliency.shape == (40, 24)
        for baseline in ("blur", "black", "mean"):
            score = client.evaluate(
                grey, model="grey", method="grad-cam", metrics={"insertion": {"steps": 8, "baseline": baseline}}
            )
            assert 0 < score.scores["insertion"] < 1
    for prediction in explanation.predictions:
        assert prediction.probability == pytest.approx(1 / (1 + np.exp(-prediction.logit)), abs=1e-12)
    assert len(explanation.maps) == 4


def test_a_call_of_a_module_that_runs_several_times(server: Server) -> None:
    with camserve.Client(server.address) as client:
        by_call = client.explain(PICTURE, model="resnet", method="grad-cam", layers=["layer4.1.relu#2"])
        by_block = client.explain(PICTURE, model="resnet", method="grad-cam", layers=["layer4"])
        assert np.array_equal(by_call.saliency, by_block.saliency), "the block's output is that of its last activation"
        assert by_call.receipt.layers == ("layer4.1.relu#2",)
        with pytest.raises(camserve.InvalidArgument, match="name one call"):
            client.explain(PICTURE, model="resnet", method="grad-cam", layers=["layer4.1.relu"])
        several = client.explain(PICTURE, model="vit", method="layer-cam", layers=["blocks.5.norm1", "blocks.11.norm1"])
        assert several.saliency.shape == (64, 64)
