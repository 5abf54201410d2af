"""Weights files: entries, averaged weights, prefixes of keys, and the messages of files that do not fit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models.load import load, state_digest
from tests.nets import tiny_cnn

HERE = "python:tests.server.models.test_checkpoints"
State = dict[str, Tensor]


def plain() -> nn.Module:
    return tiny_cnn(0)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return net.append(nn.Linear(4, 3))


def in_wrapper() -> nn.Module:
    outer = nn.Module()
    outer.backbone = tiny_cnn(0)
    outer.forward = outer.backbone.forward
    return outer


def trained() -> State:
    return dict(tiny_cnn(5).state_dict())


def averaged() -> State:
    return dict(tiny_cnn(6).state_dict())


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def digest_of(contents: object, folder: Path, factory: str = "plain", **keys: Any) -> str:
    torch.save(contents, folder / "w.pt")
    config = ModelConfig(name="m", source=f"{HERE}:{factory}", weights=str(folder / "w.pt"), **keys)
    return load(config.model_copy(update={"input_size": (32, 32)}), torch.device("cpu")).digest


TRAINED, AVERAGED = state_digest(tiny_cnn(5)), state_digest(tiny_cnn(6))


@pytest.mark.parametrize(
    "contents",
    [
        trained(),
        {"state_dict": trained(), "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(1)}}, "param_groups": []}},
        {"model": trained()},
        {"net": trained()},
        {"model_state_dict": trained(), "loss": torch.tensor(0.5)},
        {"model": {"state_dict": trained()}},
        {"classifier": trained()},
        prefixed(trained(), "module."),
        prefixed(trained(), "model."),
        prefixed(trained(), "net."),
        prefixed(trained(), "backbone."),
        prefixed(trained(), "_orig_mod."),
        prefixed(trained(), "module._orig_mod."),
        {"state_dict": prefixed(trained(), "model._orig_mod.") | {"criterion.weight": torch.ones(3)}},
        {key.replace("c1.", "c1._orig_mod."): value for key, value in trained().items()},
        prefixed(trained(), "module.") | {"n_averaged": torch.tensor(3)},
    ],
    ids=lambda contents: "+".join(list(contents)[:2]),
)
def test_usual_checkpoints_are_loaded(contents: object, tmp_path: Path) -> None:
    assert digest_of(contents, tmp_path) == TRAINED


def test_log_says_what_was_loaded(tmp_path: Path) -> None:
    with capture_logs() as lines:
        digest_of({"state_dict": prefixed(trained(), "model.") | {"loss.w": torch.ones(1)}}, tmp_path)
    [line] = [line for line in lines if line["event"] == "loaded weights from a checkpoint"]
    assert line["steps"] == [
        "took the entry state_dict",
        "removed model. from the keys",
        "ignored 1 other keys: loss.w",
    ]


def test_prefix_of_the_network_is_added(tmp_path: Path) -> None:
    net = in_wrapper()
    net.load_state_dict(prefixed(trained(), "backbone."))
    assert digest_of(trained(), tmp_path, "in_wrapper") == state_digest(net)


def test_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    state = {k: v for k, v in with_batch_norm().state_dict().items() if not k.endswith("num_batches_tracked")}
    assert digest_of(prefixed(state, "module."), tmp_path, "with_batch_norm") == state_digest(with_batch_norm())


@pytest.mark.parametrize(
    ("contents", "key"),
    [
        ({"state_dict": trained(), "state_dict_ema": averaged()}, "state_dict_ema"),
        ({"model": trained(), "model_ema": averaged()}, "model_ema"),
        ({"params": trained(), "params_ema": averaged()}, "params_ema"),
        ({"model": trained(), "ema": {"module": averaged()}}, "ema"),
        ({"model": trained(), "ema": {"module": averaged(), "updates": 3}}, "ema.module"),
        ({"state_dict": prefixed(trained(), "model.") | prefixed(averaged(), "ema_model.module.")}, "ema_model"),
        (prefixed(trained(), "model.") | prefixed(averaged(), "model_ema."), "model_ema"),
    ],
)
def test_averaged_weights_are_reported_and_can_be_chosen(contents: object, key: str, tmp_path: Path) -> None:
    with capture_logs() as lines:
        assert digest_of(contents, tmp_path) == TRAINED
    assert any("averaged weights" in line["event"] and line["averaged"] for line in lines)
    with capture_logs() as lines:
        assert digest_of(contents, tmp_path, weights_key=key) == AVERAGED
    assert not any("averaged weights" in line["event"] for line in lines)


def test_file_with_averaged_weights_only_is_loaded(tmp_path: Path) -> None:
    assert digest_of({"ema": averaged(), "step": 3}, tmp_path) == AVERAGED


def refusal(contents: object, folder: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as error:
        digest_of(contents, folder, **keys)
    return str(error.value)


def test_choice_between_state_dicts_is_left_to_the_configuration(tmp_path: Path) -> None:
    contents = {"student": trained(), "teacher": averaged()}
    message = refusal(contents, tmp_path)
    assert message.startswith("models.m.weights_key:")
    assert "student, teacher" in message
    assert digest_of(contents, tmp_path, weights_key="teacher") == AVERAGED
    assert "the entries with weights are: student, teacher" in refusal(contents, tmp_path, weights_key="nix")


def test_weights_key_needs_a_file() -> None:
    config = ModelConfig(name="m", source=f"{HERE}:plain", weights_key="ema")
    with pytest.raises(ConfigError, match=r"models\.m\.weights_key: .* set weights or remove weights_key"):
        load(config, torch.device("cpu"))


def test_message_lists_at_most_ten_keys(tmp_path: Path) -> None:
    message = refusal({f"layer{i}.weight": torch.ones(1) for i in range(40)}, tmp_path)
    assert "40 keys of the file are not in the network: layer0.weight" in message
    assert "layer9.weight and 30 more" in message
    assert len(message) < 1500


def test_message_names_tensors_of_another_shape(tmp_path: Path) -> None:
    state = trained() | {"fc.weight": torch.ones(9, 20)}
    message = refusal(state, tmp_path)
    assert "1 tensors have another shape: fc.weight is [9, 20] in the file and [7, 20] in the network" in message


@pytest.mark.parametrize(
    "contents", [{"state_dict": trained(), "args": argparse.Namespace(lr=1)}, nn.Linear(2, 2), argparse.Namespace()]
)
def test_code_in_a_file_is_refused_with_a_remedy(contents: object, tmp_path: Path) -> None:
    message = refusal(contents, tmp_path)
    assert "contains the Python object " in message
    assert "torch.save(model.state_dict(), FILE)" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "text"), [(b"version https://git-lfs", "cannot be read: "), (b"", "cannot be read: EOFError")]
)
def test_other_files_are_refused(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(data)
    config = ModelConfig(name="m", source=f"{HERE}:plain", weights=str(tmp_path / "w.pth"))
    with pytest.raises(ConfigError) as error:
        load(config, torch.device("cpu"))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_archive_as_weights_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "w.pt"))  # type: ignore[no-untyped-call]
    config = ModelConfig(name="m", source=f"{HERE}:plain", weights=str(tmp_path / "w.pt"))
    with pytest.raises(ConfigError, match="TorchScript archive, which contains code; save the weights alone"):
        load(config, torch.device("cpu"))


def test_file_without_weights_is_refused(tmp_path: Path) -> None:
    assert "contains no state dict" in refusal({"epoch": 3}, tmp_path)
    assert "contains no state dict" in refusal([torch.ones(1)], tmp_path)
