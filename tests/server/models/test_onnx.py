"""Models from ONNX files: conversion, recognition of inputs and outputs, and errors."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models import onnx_files
from camserve_server.models.load import load
from camserve_server.models.model import Model
from tests.support import as_model, call, explained, noise

RNG = np.random.default_rng(0)
SIZE = 16


class Net(nn.Module):
    """Two convolutions with a batch norm, a SiLU and a residual addition, in front of average pooling and a head."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 5)
        self.head = head or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.relu(self.norm(self.conv(x)) + x)
        result: Tensor = self.head(self.fc(x.mean(dim=(2, 3))))
        return result


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    net.norm.running_mean = torch.randn(8) / 4
    net.norm.running_var = torch.rand(8) + 0.5
    return net


def export(net: nn.Module, path: Path, *, rows: int = 2, fixed: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = None if fixed else ({0: torch.export.Dim.DYNAMIC},)
        x = torch.zeros(rows, 3, SIZE, SIZE)
        torch.onnx.export(
            net, (x,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, optimize=True
        )
    return path


def load_onnx(path: Path, **keys: Any) -> Model:
    model = load(ModelConfig(name="m", source=f"onnx:{path}", **keys), torch.device("cpu"))
    model.batch_sizes = {"forward": 4, "gradient": 4, "ascend": 4}
    return model


def tensor(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32) / 2, name)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[TensorProto],
    shape: Sequence[int | str | None] = ("N", 3, SIZE, SIZE),
    kind: int = TensorProto.FLOAT,
    outputs: Sequence[str] = ("y",),
) -> Path:
    """Write an ONNX file with the input x and the outputs `outputs`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def classifier(before: str = "x", ends: Sequence[onnx.NodeProto] = (), output: str = "y") -> list[onnx.NodeProto]:
    """Return a convolution, a ReLU, average pooling and a linear layer to `output`, and further nodes."""
    return [
        helper.make_node("Conv", [before, "w", "b"], ["c"], "features.conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"], "features.relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], "pool"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "v", "u"], [output], "fc", transB=1),
        *ends,
    ]


WEIGHTS = [tensor("w", 6, 3, 3, 3), tensor("b", 6), tensor("v", 4, 6), tensor("u", 4)]


def ran(path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the output of ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path))
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: x})[0]
    return result


def logits(model: Model, x: Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = model.module(x).numpy()
    return result


# ---- networks exported by torch --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exported_network_has_the_same_logits_layers_and_maps(net: Net, tmp_path: Path) -> None:
    model = load_onnx(export(net, tmp_path / "net.onnx"), fold_batch_norm=False)
    original = load_original(net)
    x = noise(3, 3, SIZE, SIZE)
    np.testing.assert_allclose(logits(model, x), logits(original, x), atol=1e-5)
    assert model.preprocessing.size == (SIZE, SIZE), "the file defines the size"
    assert model.layer is not None
    assert original.layer is not None
    assert (model.layer.height, model.layer.channels) == (original.layer.height, original.layer.channels)
    for method in ("grad-cam", "cam", "integrated-gradients", "occlusion"):
        ours = explained(model, x[0], call(model, method), 1).maps
        theirs = explained(original, x[0], call(original, method), 1).maps
        np.testing.assert_allclose(ours, theirs, atol=1e-3, err_msg=method)


def load_original(net: Net) -> Model:
    return as_model(net, (SIZE, SIZE))


@pytest.mark.slow
def test_silu_is_one_layer(net: Net, tmp_path: Path) -> None:
    model = load_onnx(export(net, tmp_path / "net.onnx"))
    kinds = [type(each) for each in model.module.modules()]
    assert nn.SiLU in kinds
    assert nn.Sigmoid not in kinds, "the gate alone is not an output of an activation"


@pytest.mark.slow
def test_file_with_a_fixed_number_of_images_accepts_any_number(net: Net, tmp_path: Path) -> None:
    for rows in (1, 4):
        model = load_onnx(export(net, tmp_path / f"{rows}.onnx", rows=rows, fixed=True))
        x = noise(3, 3, SIZE, SIZE)
        np.testing.assert_allclose(logits(model, x), logits(load_original(net), x), atol=1e-5)


@pytest.mark.slow
def test_final_softmax_and_sigmoid_are_removed(net: Net, tmp_path: Path) -> None:
    x = noise(2, 3, SIZE, SIZE)
    expected = logits(load_original(net), x)
    for head, kind in ((nn.Softmax(dim=1), "softmax"), (nn.Sigmoid(), "sigmoid")):
        ending = Net(head).eval()
        ending.load_state_dict(net.state_dict())
        model = load_onnx(export(ending, tmp_path / f"{kind}.onnx"))
        np.testing.assert_allclose(logits(model, x), expected, atol=1e-5)
        assert model.head == kind


# ---- hand-written files ----------------------------------------------------------------------------------------------


def test_layers_have_the_names_of_the_nodes(tmp_path: Path) -> None:
    model = load_onnx(write(tmp_path / "a.onnx", classifier(), WEIGHTS))
    assert {"features_conv", "features_relu"} <= set(model.spatial)
    assert [layer.name for layer in model.layers] == ["features_relu"]
    assert model.gap is not None


def test_nhwc_input_and_softmax_of_tf2onnx_are_recognised(tmp_path: Path) -> None:
    ends = [helper.make_node("Softmax", ["l"], ["s"], "softmax"), helper.make_node("Identity", ["s"], ["y"], "out")]
    nodes = [helper.make_node("Transpose", ["x"], ["t"], "t", perm=[0, 3, 1, 2]), *classifier("t", ends, "l")]
    path = write(tmp_path / "tf.onnx", nodes, WEIGHTS, ("N", SIZE, SIZE + 4, 3))
    model = load_onnx(path)
    assert model.preprocessing.size == (SIZE, SIZE + 4)
    x = noise(2, 3, SIZE, SIZE + 4)
    expected = ran(path, np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy()))
    np.testing.assert_allclose(model.probabilities(torch.from_numpy(logits(model, x))), expected, atol=1e-6)


@pytest.mark.parametrize("before", ["Identity", "Constant"])
def test_weights_behind_constant_nodes_are_read(before: str, tmp_path: Path) -> None:
    weight, *others = WEIGHTS
    if before == "Identity":
        first = helper.make_node("Identity", ["original"], ["w"])
        others.append(numpy_helper.from_array(numpy_helper.to_array(weight), "original"))
    else:
        first = helper.make_node("Constant", [], ["w"], value=weight)
    path = write(tmp_path / "a.onnx", [first, *classifier()], others)
    x = noise(2, 3, SIZE, SIZE)
    np.testing.assert_allclose(logits(load_onnx(path), x), ran(path, x.numpy()), atol=1e-5)


def test_old_files_list_weights_as_inputs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", classifier(), WEIGHTS)
    model = onnx.load(path)
    for weight in WEIGHTS:
        model.graph.input.append(helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, weight.dims))
    onnx.save(model, path)
    x = noise(2, 3, SIZE, SIZE)
    np.testing.assert_allclose(logits(load_onnx(path), x), ran(path, x.numpy()), atol=1e-5)


def test_weights_that_are_computed_from_constants_are_read(tmp_path: Path) -> None:
    """Quantised weights, and weights in another layout."""
    weight, *others = WEIGHTS
    quantised = (numpy_helper.to_array(weight).transpose(2, 3, 1, 0) * 50).round().astype(np.int8)
    constants = {"q": quantised, "scale": np.float32(0.02), "zero": np.int8(0)}
    others += [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    first = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Transpose", ["d"], ["w"], perm=[3, 2, 0, 1]),
    ]
    path = write(tmp_path / "a.onnx", [*first, *classifier()], others)
    x = noise(2, 3, SIZE, SIZE)
    model = load_onnx(path)
    np.testing.assert_allclose(logits(model, x), ran(path, x.numpy()), atol=1e-5)
    assert "features_conv" in model.spatial


def test_nodes_without_effect_at_inference_are_skipped(tmp_path: Path) -> None:
    nodes = classifier()
    nodes[1:2] = [
        helper.make_node("BatchNormalization", ["c", "b", "b", "b", "v1"], ["n"], "norm", training_mode=0),
        helper.make_node("Dropout", ["n"], ["o"], "drop"),
        helper.make_node("Relu", ["o"], ["r"], "features.relu"),
    ]
    positive = numpy_helper.from_array(RNG.random(6).astype(np.float32) + 0.5, "v1")
    path = write(tmp_path / "a.onnx", nodes, [*WEIGHTS, positive])
    x = noise(2, 3, SIZE, SIZE)
    np.testing.assert_allclose(logits(load_onnx(path), x), ran(path, x.numpy()), atol=1e-5)


def test_softmax_is_kept_if_the_configuration_asks_for_it(tmp_path: Path) -> None:
    ends = [helper.make_node("Softmax", ["l"], ["y"], "softmax")]
    model = load_onnx(write(tmp_path / "a.onnx", classifier(ends=ends, output="l"), WEIGHTS), head="probabilities")
    assert model.head == "probabilities"
    np.testing.assert_allclose(logits(model, noise(2, 3, SIZE, SIZE)).sum(axis=1), 1, atol=1e-6)


def test_grey_scale_file_gets_grey_scale_preprocessing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", classifier(), [tensor("w", 6, 1, 3, 3), *WEIGHTS[1:]], ("N", 1, SIZE, SIZE))
    assert load_onnx(path).preprocessing.mean == (0.5,)


def test_input_size_is_that_of_the_configuration_if_the_file_defines_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", classifier(), WEIGHTS, ("N", 3, None, None))
    assert load_onnx(path, input_size=(20, 12)).preprocessing.size == (20, 12)


def test_digest_depends_on_the_weights(tmp_path: Path) -> None:
    first = load_onnx(write(tmp_path / "a.onnx", classifier(), WEIGHTS)).digest
    other = load_onnx(write(tmp_path / "b.onnx", classifier(), [*WEIGHTS[:3], tensor("u", 4)])).digest
    assert first == load_onnx(write(tmp_path / "c.onnx", classifier(), WEIGHTS)).digest != other


# ---- errors ----------------------------------------------------------------------------------------------------------


def refused(path: Path, message: str, **keys: Any) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_onnx(path, **keys)
    assert "\n" not in str(caught.value)


def test_missing_file_and_other_content_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", r"models.m.source: there is no file .*none\.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    refused(tmp_path / "text.onnx", "models.m.source: .* cannot be read as ONNX")


@pytest.mark.parametrize("package", onnx_files.PACKAGES)
def test_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = onnx_files.importlib.util.find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == package else find(name))
    refused(tmp_path / "a.onnx", f"ONNX files need {package}; install camserve.onnx.: pip install 'camserve.onnx.'")


@pytest.mark.parametrize(
    ("shape", "kind", "described"),
    [
        (("N", 3, SIZE), TensorProto.FLOAT, r"x float \[N, 3, 16\]"),
        (("N", 3, SIZE, SIZE), TensorProto.UINT8, r"x uint8 \[N, 3, 16, 16\]"),
    ],
)
def test_other_inputs_are_refused(shape: tuple[Any, ...], kind: int, described: str, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    write(path, [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], [], shape, kind)
    refused(path, f"the inputs of the ONNX file are {described}; expected one, float32")


def test_several_outputs_are_refused(tmp_path: Path) -> None:
    ends = [helper.make_node("Relu", ["y"], ["z"])]
    path = write(tmp_path / "a.onnx", classifier(ends=ends), WEIGHTS, outputs=("y", "z"))
    refused(path, r"outputs .* are y float32 \[2, 4\], z float32 \[2, 4\]; expected exactly one")


def test_other_input_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", classifier(), WEIGHTS)
    refused(path, "models.m.input_size: .* fixed input of 16x16 pixels, not 32x32", input_size=(32, 32))


def test_file_that_runs_on_one_image_only_has_batch_size_1(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([1, 6 * 64]), "shape")
    nodes = classifier()
    nodes[2:4] = [
        helper.make_node("Reshape", ["r", "shape"], ["f"]),
        helper.make_node("Concat", ["f", "one"], ["h"], axis=1),
    ]
    nodes[4].input[0] = "h"
    one = tensor("one", 1, 1)
    path = write(
        tmp_path / "a.onnx", nodes, [*WEIGHTS[:2], tensor("v", 4, 385), WEIGHTS[3], shape, one], (1, 3, 16, 16)
    )
    model = load_onnx(path)
    assert model.one_row
    (warning,) = model.warnings
    assert "one image at a time" in warning
    x = noise(1, 3, SIZE, SIZE)
    np.testing.assert_allclose(logits(model, x), ran(path, x.numpy()), atol=1e-5)


def test_pinned_file_is_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", classifier(), WEIGHTS)
    refused(path, "models.m.weights_sha256: expected 0000.* differs", weights_sha256="0" * 64)


def test_pinned_file_must_contain_its_weights(net: Net, tmp_path: Path) -> None:
    """The digest of the file would not cover weights in another file."""
    path = export(net, tmp_path / "m.onnx")
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="m.data", size_threshold=0)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    refused(path, "weights_sha256: .* reads weights from other files", weights_sha256=digest)
    assert load_onnx(path).classes == load_original(net).classes
