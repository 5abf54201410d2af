"""Image classifiers of Hugging Face: preprocessing, labels, and errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from structlog.testing import capture_logs

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models.huggingface import preprocessing
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.torch_setup import torchvision_ops  # noqa: F401  (transformers imports torchvision)
from tests.support import call, explained, noise

import huggingface_hub  # isort: skip
import transformers  # isort: skip
from transformers import (  # isort: skip
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

LABELS = {0: "cat", 1: "dog", 2: "bird"}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 48},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "resample": 3,
}


def saved(folder: Path, network: Any, processor: dict[str, Any] | None = PROCESSOR) -> Path:
    """Write the files of a network and of its image processor."""
    network.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def load_folder(folder: Path, **keys: Any) -> Model:
    model = load(ModelConfig(name="m", source=f"huggingface:{folder}", **keys), torch.device("cpu"))
    model.batch_sizes = {"forward": 4, "gradient": 4, "ascend": 4}
    return model


@pytest.fixture(scope="module")
def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    network: ResNetForImageClassification = ResNetForImageClassification(ResNetConfig(**RESNET, id2label=LABELS))
    network.train(False)
    return network


def test_directory_defines_preprocessing_labels_and_logits(resnet: Any, tmp_path: Path) -> None:
    model = load_folder(saved(tmp_path, resnet))
    assert str(model.preprocessing) == "squash 32x48 bicubic, mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6]"
    assert model.labels == ("cat", "dog", "bird")
    assert model.head == "softmax"
    x = noise(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), resnet(pixel_values=x).logits, atol=1e-5, rtol=0)
    assert explained(model, x[0], call(model, "grad-cam"), 1).maps.shape == (1, 32, 48)


def test_configured_keys_take_precedence(resnet: Any, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    folder = saved(tmp_path / "net", resnet)
    model = load_folder(folder, input_size=(64, 64), mean=[0.5] * 3, labels=str(tmp_path / "labels.txt"))
    assert str(model.preprocessing) == "squash 64x64 bicubic, mean [0.5, 0.5, 0.5], std [0.4, 0.5, 0.6]"
    assert model.labels == ("a", "b", "c")


def test_transformer_with_numbered_labels_has_no_labels(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    network = ViTForImageClassification(
        ViTConfig(**sizes, image_size=32, patch_size=8, id2label={i: f"LABEL_{i}" for i in range(4)})
    )
    model = load_folder(saved(tmp_path, network, PROCESSOR | {"size": {"height": 32, "width": 32}}))
    assert model.labels == ()
    assert model.classes == 4
    assert model.layer is not None
    assert (model.layer.height, model.layer.width) == (4, 4)


def test_several_labels_per_image_have_a_sigmoid(tmp_path: Path) -> None:
    config = ResNetConfig(**RESNET, id2label=LABELS, problem_type="multi_label_classification")
    assert load_folder(saved(tmp_path, ResNetForImageClassification(config))).head == "sigmoid"


@pytest.mark.parametrize(
    ("change", "warns"),
    [
        ({}, False),
        ({"do_center_crop": True, "crop_size": {"height": 32, "width": 48}, "size": {"shortest_edge": 64}}, True),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.9}, True),
    ],
)
def test_processor_that_crops_is_reported(resnet: Any, tmp_path: Path, change: dict[str, Any], warns: bool) -> None:
    folder = saved(tmp_path, resnet, PROCESSOR | change)
    with capture_logs() as logs:
        model = load_folder(folder)
    assert model.preprocessing.size[0] == 32
    assert any("the image processor crops" in each["event"] for each in logs) == warns


def test_channels_in_reverse_order_are_exchanged(resnet: Any, tmp_path: Path) -> None:
    model = load_folder(saved(tmp_path, resnet, PROCESSOR | {"image_processor_type": "MobileViTImageProcessor",
                                                             "do_flip_channel_order": True}))  # fmt: skip
    x = noise(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), resnet(pixel_values=x.flip(1)).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("ViT", {}),
        ("ViT", {"do_normalize": False}),
        ("ViT", {"do_rescale": False}),
        ("CLIP", {}),
        ("EfficientNet", {}),
        ("EfficientNet", {"include_top": False}),
        ("EfficientNet", {"rescale_factor": 1 / 127.5, "rescale_offset": True}),
        ("MobileViT", {}),
        ("Levit", {}),
    ],
)
def test_preprocessing_computes_the_same_as_the_processor(kind: str, change: dict[str, Any]) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessor")(**change, image_std=[0.2, 0.3, 0.4])
    keys = preprocessing(processor.to_dict(), "models.m")
    pixels = np.random.default_rng(0).integers(0, 256, (*keys["input_size"], 3), dtype=np.uint8)
    theirs = processor(PIL.Image.fromarray(pixels), return_tensors="np", do_resize=False, do_center_crop=False)
    ours = ((pixels / 255 - np.array(keys["mean"])) / np.array(keys["std"])).transpose(2, 0, 1)
    flipped = ours[::-1] if processor.to_dict().get("do_flip_channel_order") else ours
    np.testing.assert_allclose(theirs["pixel_values"][0], flipped, rtol=1e-5, atol=1e-5)


def cached(cache: Path, name: str, revision: str, network: Any) -> str:
    """Write a revision of a network to a cache of the Hub, and return its commit."""
    commit = hashlib.sha1(revision.encode()).hexdigest()
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    saved(folder / "snapshots" / commit, network)
    return commit


def test_name_of_the_hub_is_read_at_its_revision(resnet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    old = ResNetForImageClassification(ResNetConfig(**RESNET, id2label={0: "old", 1: "older"}))
    commit = cached(tmp_path, "lab/net", "v1", old)
    cached(tmp_path, "lab/net", "main", resnet)
    for name, labels in (
        ("lab/net", ("cat", "dog", "bird")),
        ("lab/net@main", ("cat", "dog", "bird")),
        ("lab/net@v1", ("old", "older")),
        (f"lab/net@{commit}", ("old", "older")),
    ):
        source = f"huggingface:{name}"
        assert load(ModelConfig(name="m", source=source), torch.device("cpu")).labels == labels
    with pytest.raises(ConfigError, match=r"models.m.source: lab/net@v2 cannot be loaded"):
        load(ModelConfig(name="m", source="huggingface:lab/net@v2"), torch.device("cpu"))


def test_digest_pins_the_weights_of_a_directory(resnet: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, resnet)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_folder(folder, weights_sha256=digest).labels == ("cat", "dog", "bird")
    refused(folder, "models.m.weights_sha256: expected 0000.* its sha256 is", weights_sha256=64 * "0")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    refused(folder, "weights_sha256: there is no file .*model.safetensors", weights_sha256=digest)


# ---- errors ----------------------------------------------------------------------------------------------------------


def refused(folder: Path, message: str, **keys: Any) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_folder(folder, **keys)
    assert "\n" not in str(caught.value)


def test_digest_does_not_pin_a_name_of_the_hub() -> None:
    refused(Path("lab/net"), "weights_sha256: .* pin a name of the Hub by its commit", weights_sha256=64 * "0")


def test_pickles_are_refused(resnet: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, resnet)
    (folder / "model.safetensors").unlink()
    torch.save(resnet.state_dict(), folder / "pytorch_model.bin")
    refused(folder, "models.m.source: .* expected model.safetensors, because pickles are not read")


def test_network_without_a_classifier_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, ResNetModel(ResNetConfig(**RESNET))), "has no weights for classifier")


def test_code_in_the_files_is_refused(resnet: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, resnet)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.N"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit('this code must not run')\n")
    refused(folder, "models.m.source: .* cannot be loaded as an image classifier of Hugging Face: ValueError")


def test_missing_processor_names_the_keys(resnet: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, resnet, None)
    refused(
        folder, "has no image processor: .*; add preprocessor_config.json, or set input_size, mean, std and interpo"
    )
    given = {"input_size": (32, 32), "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    assert load_folder(folder, **given).preprocessing.mean == (0.5,) * 3


def test_regression_is_refused(tmp_path: Path) -> None:
    config = ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1, id2label={0: "age"}, problem_type="regression")
    refused(saved(tmp_path, ConvNextForImageClassification(config)), "is a regression; expected an image classifier")


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    refused(tmp_path, "need transformers; install camserve.transformers.: pip install 'camserve.transformers.'")
