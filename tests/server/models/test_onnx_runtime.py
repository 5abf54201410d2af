"""ONNX files that ONNX Runtime runs, because they are not converted to torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from structlog.testing import capture_logs
from torch import Tensor, nn

import camserve
from camserve_server.config import Config, ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models import onnx_files, onnx_graphs
from camserve_server.models.load import load, state_digest
from camserve_server.models.model import Model
from camserve_server.models.onnx_runtime import OnnxRuntimeNetwork
from tests import nets
from tests.conftest import serving
from tests.support import as_model, call, explained, noise

SIZE = 32
# Methods and their parameters; all need forward passes only.
METHODS: dict[str, dict[str, Any]] = {
    "score-cam": {},
    "poly-cam": {},
    "ablation-cam": {},
    "rise": {"masks": 40},
    "occlusion": {},
}


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, NDArray[Any]],
    shape: Sequence[int | str] = ("N", 3, SIZE, SIZE),
) -> Path:
    """Write an ONNX file with the input x and the output y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def tiny_nodes(first: str = "x", last: str = "y", fused: bool = True) -> list[onnx.NodeProto]:
    """Return the nodes of `nets.tiny_cnn`. Fused convolutions are those that ONNX Runtime saves in optimised files."""
    nodes = []
    for i in (1, 2, 3):
        names = [first, f"c{i}.weight", f"c{i}.bias"]
        if fused:
            nodes.append(
                helper.make_node(
                    "FusedConv",
                    names,
                    [f"r{i}"],
                    f"/part.{i}/relu",
                    "",
                    "com.microsoft",
                    pads=[1] * 4,
                    activation="Relu",
                )
            )
        else:
            nodes.append(helper.make_node("Conv", names, [f"c{i}"], f"conv{i}", pads=[1] * 4))
            nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"))
        sizes: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}
        nodes += [helper.make_node("MaxPool", [f"r{i}"], [f"p{i}"], f"pool{i}", **sizes)] if i < 3 else []
        first = f"p{i}"
    return [
        *nodes,
        helper.make_node("GlobalAveragePool", ["r3"], ["g"], "gap"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], [last], "fc", transB=1),
    ]


def weights(seed: int = 0) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in nets.tiny_cnn(seed).state_dict().items()}


def tiny(path: Path, *, seed: int = 0, shape: Sequence[int | str] = ("N", 3, SIZE, SIZE), fused: bool = True) -> Path:
    return write(path, tiny_nodes(fused=fused), weights(seed), shape)


class Noise(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no annotations
    """Eight images for the calibration of quantised activations."""

    def __init__(self) -> None:
        self._images = iter(noise(8, 1, 3, SIZE, SIZE))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._images, None)
        return None if image is None else {"x": image.numpy()}


def quantised(path: Path, form: QuantFormat) -> Path:
    """Quantise the tiny network, as production models are."""
    plain = tiny(path.with_suffix(".float.onnx"), fused=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logging.warning", lambda *_: None)  # asks for a preprocessing that needs symbolic shapes
        quantize_static(str(plain), str(path), Noise(), quant_format=form)
    return path


def load_onnx(path: Path, **keys: Any) -> Model:
    model = load(ModelConfig(name="m", source=f"onnx:{path}", **keys), torch.device("cpu"))
    model.batch_sizes = {"forward": 4, "gradient": 4, "ascend": 4}
    assert isinstance(model.module, OnnxRuntimeNetwork)
    return model


def ran(path: Path, x: Tensor, outputs: Sequence[str] = ("y",)) -> list[NDArray[np.float32]]:
    """Return outputs of ONNX Runtime for the whole file."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result: list[NDArray[np.float32]] = session.run(list(outputs), {"x": x.numpy()})
    return result


@torch.no_grad()
def activations(model: Model, x: Tensor, name: str) -> Tensor:
    """Return the output of a layer as maps [N, K, h, w]."""
    layer, found = model.spatial[name], list[Tensor]()
    handle = model.module.get_submodule(name).register_forward_hook(lambda *args: found.append(args[2]))
    model.module(x)
    handle.remove()
    return layer.grid(found[0])


@torch.no_grad()
def logits(model: Model, x: Tensor) -> Tensor:
    result: Tensor = model.module(x)
    return result


@pytest.fixture(scope="module")
def original() -> Model:
    return as_model(nets.tiny_cnn(), (SIZE, SIZE))


# ---- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[camserve.Client]:
    """Return a client of a server with the network as Python code, as an ONNX file and as a quantised ONNX file."""
    folder = tmp_path_factory.mktemp("files")
    sources = {
        "torch": "python:tests.nets:tiny_cnn",
        "fused": f"onnx:{tiny(folder / 'a.onnx')}",
        "int8": f"onnx:{quantised(folder / 'q.onnx', QuantFormat.QDQ)}",
    }
    models = [
        ModelConfig(name=name, source=source, input_size=(SIZE, SIZE), batch_size=4) for name, source in sources.items()
    ]
    config = Config(listen="127.0.0.1:0", health_listen="127.0.0.1:0", models=models)
    with serving(config) as server, camserve.Client(server.address, timeout=120) as client:
        yield client


IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_maps_and_metrics_are_those_of_the_network_in_torch(client: camserve.Client, method: str) -> None:
    ours, theirs = (
        client.explain(
            IMAGE,
            model=model,
            method=method,
            parameters=METHODS[method],
            target=2,
            metrics=["insertion", "deletion"],
            raw=True,
        )
        for model in ("fused", "torch")
    )
    np.testing.assert_allclose(ours.saliency, theirs.saliency, atol=1e-4)
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
    assert ours.predictions[0].probability == pytest.approx(theirs.predictions[0].probability, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["score-cam", "poly-cam", "rise"])
def test_maps_of_the_quantised_network_are_close(client: camserve.Client, method: str) -> None:
    maps = [
        client.explain(IMAGE, model=model, method=method, parameters=METHODS[method], target=2).saliency
        for model in ("int8", "torch")
    ]
    assert np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grad-cam", "integrated-gradients", "opti-cam"])
def test_gradients_are_refused_with_the_reason(client: camserve.Client, method: str) -> None:
    with pytest.raises(camserve.CamserveError, match=f"fused cannot serve {method}.* computes no gradients; choose a"):
        client.explain(IMAGE, model="fused", method=method)


@pytest.mark.slow
def test_list_of_models_shows_the_reason_and_the_methods(client: camserve.Client) -> None:
    models = {model.name: model for model in client.models()}
    (warning,) = models["fused"].warnings
    assert warning.startswith("the file runs in ONNX Runtime, because onnx2pytorch cannot convert it (")
    assert "FusedConv" in warning
    assert warning.endswith("; methods that need gradients are not available")
    assert set(models["fused"].unavailable) == {"gradient", "ascend"}
    assert {*METHODS, "eigen-cam", "fake-cam"} <= set(models["fused"].methods)
    assert not {"grad-cam", "opti-cam", "smooth-grad"} & set(models["fused"].methods)
    assert "its activations are quantised (QuantizeLinear)" in models["int8"].warnings[0]


@pytest.mark.slow
def test_company_does_not_change_a_map(client: camserve.Client) -> None:
    def map_of(method: str) -> NDArray[np.float32]:
        result: NDArray[np.float32] = client.explain(
            IMAGE, model="fused", method=method, parameters=METHODS[method], target=2
        ).saliency
        return result

    alone = {method: map_of(method) for method in METHODS}
    with ThreadPoolExecutor(len(METHODS)) as pool:
        together = dict(zip(METHODS, pool.map(map_of, METHODS), strict=True))
    for method in METHODS:
        np.testing.assert_allclose(together[method], alone[method], atol=1e-4, err_msg=method)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_default_layers_are_those_of_the_network_in_torch(original: Model, tmp_path: Path) -> None:
    model, x = load_onnx(tiny(tmp_path / "a.onnx")), noise(3, 3, SIZE, SIZE)
    assert [layer.name for layer in model.layers] == ["part_1/relu", "part_2/relu", "part_3/relu"]
    assert [layer.cut for layer in model.layers] == [0, 0, 0]
    assert model.layer == model.layers[-1]
    torch.testing.assert_close(logits(model, x), logits(original, x))
    for ours, theirs in zip(model.layers, original.layers, strict=True):
        torch.testing.assert_close(activations(model, x, ours.name), activations(original, x, theirs.name))


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_layers_of_a_quantised_network_are_its_activations(form: QuantFormat, original: Model, tmp_path: Path) -> None:
    path = quantised(tmp_path / "q.onnx", form)
    model, x = load_onnx(path), noise(3, 3, SIZE, SIZE)
    np.testing.assert_array_equal(logits(model, x).numpy(), ran(path, x)[0])
    assert [(layer.channels, layer.height, layer.cut) for layer in model.layers] == [
        (12, 32, 0),
        (16, 16, 0),
        (20, 8, 0),
    ]
    assert not any(layer.signed for layer in model.layers)
    for ours, theirs in zip(model.layers, original.layers, strict=True):
        real = activations(original, x, theirs.name)
        assert (activations(model, x, ours.name) - real).abs().max() < 0.1 * real.max()


def test_configured_layers_are_offered(tmp_path: Path) -> None:
    """Only the last layers of each resolution are offered otherwise."""
    extra = helper.make_node("Mul", ["r3", "two"], ["m"], "twice", domain="")
    nodes = tiny_nodes()
    nodes[-3].input[0] = "m"
    path = write(
        tmp_path / "a.onnx", [*nodes[:-3], extra, *nodes[-3:]], {**weights(), "two": np.array([2], np.float32)}
    )
    assert list(load_onnx(path).spatial) == ["part_1/relu", "part_2/relu", "twice"]
    model = load_onnx(path, layer="part_3/relu")
    assert list(model.spatial) == ["part_1/relu", "part_2/relu", "part_3/relu", "twice"]
    assert model.layer is not None
    assert (model.layer.name, model.layer.cut) == ("part_3/relu", 0)


def test_signed_layers_do_not_replace_those_without_negative_values(tmp_path: Path) -> None:
    nodes = tiny_nodes()
    nodes[-3].input[0] = "m"
    extra = helper.make_node("Sub", ["r3", "two"], ["m"], "minus")
    path = write(
        tmp_path / "a.onnx", [*nodes[:-3], extra, *nodes[-3:]], {**weights(), "two": np.array([2], np.float32)}
    )
    model = load_onnx(path)
    assert model.layers[-1].name == "part_3/relu"
    assert model.layer is not None
    assert model.layer.name == "minus"


def test_side_branches_are_no_layers(tmp_path: Path) -> None:
    nodes = tiny_nodes()
    nodes[-3].input[0] = "m"
    skip = [
        helper.make_node("FusedConv", ["r3", "k"], ["s"], "side", domain="com.microsoft", activation="Relu"),
        helper.make_node("Add", ["s", "r3"], ["m"], "sum"),
    ]
    kernel = np.random.default_rng(0).standard_normal((20, 20, 1, 1)).astype(np.float32)
    path = write(tmp_path / "a.onnx", [*nodes[:-3], *skip, *nodes[-3:]], {**weights(), "k": kernel})
    assert list(load_onnx(path).spatial) == ["part_1/relu", "part_2/relu", "sum"]


def attention(x: str, y: str) -> list[onnx.NodeProto]:
    """Return a block that mixes the tokens x [N, L, K] by their similarity."""
    return [
        helper.make_node("Transpose", [x], [f"{y}t"], f"{y}.t", perm=[0, 2, 1]),
        helper.make_node("MatMul", [x, f"{y}t"], [f"{y}s"], f"{y}.similarity"),
        helper.make_node("Softmax", [f"{y}s"], [f"{y}w"], f"{y}.softmax", axis=-1),
        helper.make_node("MatMul", [f"{y}w", x], [f"{y}m"], f"{y}.mix"),
        helper.make_node("Add", [x, f"{y}m"], [y], f"{y}.sum"),
    ]


def transformer(path: Path) -> Path:
    """Write a transformer with a class token, which reads the number of images from the input, as exporters do."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Gather", ["shape", "zero"], ["n"], "n"),
        helper.make_node("FusedConv", ["x", "k"], ["c"], "c", "", "com.microsoft", activation="Tanh", strides=[8, 8]),
        helper.make_node("Concat", ["n", "maps"], ["flat"], "flat", axis=0),
        helper.make_node("Reshape", ["c", "flat"], ["r"], "r"),
        helper.make_node("Transpose", ["r"], ["patches"], "patches", perm=[0, 2, 1]),
        helper.make_node("Concat", ["n", "token"], ["size"], "size", axis=0),
        helper.make_node("Expand", ["class", "size"], ["cls"], "cls"),
        helper.make_node("Concat", ["cls", "patches"], ["tokens"], "tokens", axis=1),
        *[node for x, y in (("tokens", "b1"), ("b1", "b2"), ("b2", "b3")) for node in attention(x, y)],
        helper.make_node("Concat", ["n", "all"], ["again"], "again", axis=0),
        helper.make_node("Reshape", ["b3", "again"], ["out"], "out"),
        helper.make_node("Gather", ["out", "first"], ["f"], "f", axis=1),
        helper.make_node("MatMul", ["f", "v"], ["y"], "head"),
    ]
    rng = np.random.default_rng(0)
    values = {"k": (6, 3, 8, 8), "class": (1, 1, 6), "v": (6, 4)}
    constants: dict[str, NDArray[Any]] = {name: rng.standard_normal(shape) / 4 for name, shape in values.items()}
    integers = {"zero": [0], "maps": [6, 16], "token": [1, 6], "all": [17, 6], "first": 0}
    numbers = {name: value.astype(np.float32) for name, value in constants.items()}
    return write(path, nodes, numbers | {name: np.array(value, np.int64) for name, value in integers.items()})


def test_tokens_are_layers_if_the_logits_depend_on_them(tmp_path: Path) -> None:
    """Behind the last block, the logits depend on the class token alone."""
    path = transformer(tmp_path / "a.onnx")
    model, x = load_onnx(path), noise(3, 3, SIZE, SIZE)
    np.testing.assert_allclose(logits(model, x), ran(path, x)[0], atol=1e-5)
    assert list(model.spatial) == ["c", "tokens", "b2_sum"]
    layer = model.layer
    assert layer is not None
    assert (layer.name, layer.form, layer.prefix, layer.height, layer.cut) == ("b2_sum", "tokens", 1, 4, 0)
    expected = torch.from_numpy(ran(path, x, ["b2"])[0])[:, 1:]
    torch.testing.assert_close(activations(model, x, "b2_sum").flatten(2).transpose(1, 2), expected)


def test_bodies_of_control_flow_read_tensors_but_contain_no_layers(original: Model, tmp_path: Path) -> None:
    def body(kind: str) -> onnx.GraphProto:
        made = [helper.make_node("Relu", ["r2"], [f"{kind}1"]), helper.make_node(kind, [f"{kind}1"], [f"{kind}2"])]
        return helper.make_graph(made, kind, [], [helper.make_tensor_value_info(f"{kind}2", TensorProto.FLOAT, None)])

    nodes = tiny_nodes()
    branch = helper.make_node("If", ["yes"], ["i"], "branch", then_branch=body("Identity"), else_branch=body("Neg"))
    nodes[3].input[0] = "i"  # the pooling behind r2
    path = write(tmp_path / "a.onnx", [*nodes[:3], branch, *nodes[3:]], {**weights(), "yes": np.array(True)})
    model, x = load_onnx(path), noise(3, 3, SIZE, SIZE)
    assert list(model.spatial) == ["part_1/relu", "branch", "part_3/relu"]
    torch.testing.assert_close(logits(model, x), logits(original, x))
    model = load_onnx(path, layers=["part_1/relu", "part_2/relu"])
    assert [layer.cut for layer in model.layers] == [0, 0]
    torch.testing.assert_close(logits(model, x), logits(original, x))


def test_functions_of_the_file_are_available_in_each_segment(original: Model, tmp_path: Path) -> None:
    nodes = tiny_nodes()
    for i in (1, 2, 3):
        conv = next(node for node in nodes if node.output[0] == f"r{i}")
        conv.CopyFrom(helper.make_node("ConvRelu", [*conv.input], [*conv.output], f"relu{i}", domain="local"))
    path = write(tmp_path / "a.onnx", nodes, weights())
    model = onnx.load(path)
    steps = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
    ]
    opset = helper.make_opsetid("", 17)
    model.functions.append(helper.make_function("local", "ConvRelu", ["x", "w", "b"], ["r"], steps, [opset]))
    model.opset_import.append(helper.make_opsetid("local", 1))
    onnx.save(model, path)
    loaded, x = load_onnx(path), noise(3, 3, SIZE, SIZE)
    assert list(loaded.spatial) == ["relu1", "relu2", "relu3"]
    torch.testing.assert_close(logits(loaded, x), logits(original, x))


def test_layer_whose_division_changes_the_logits_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime can merge quantised nodes on both sides of a layer."""
    compare = onnx_files._compare

    def check(network: nn.Module, *args: Any) -> None:
        if "part_2/relu" in dict(network.named_modules()):
            raise ValueError("other logits")
        compare(network, *args)

    monkeypatch.setattr(onnx_files, "_compare", check)
    model = load_onnx(tiny(tmp_path / "a.onnx"))
    assert list(model.spatial) == ["part_1/relu", "part_3/relu"]


@pytest.mark.slow
def test_graph_that_cannot_be_divided_is_served_without_layers(
    original: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no cut")

    monkeypatch.setattr(onnx_files, "in_segments", fails)
    model, x = load_onnx(tiny(tmp_path / "a.onnx")), noise(3, 3, SIZE, SIZE)
    assert not model.spatial
    assert model.warnings[0].endswith(
        "it has no layers, because it cannot be divided into segments (ValueError: no cut)"
    )
    ours, theirs = (explained(each, x[0], call(each, "occlusion"), 1).maps for each in (model, original))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# ---- inputs and outputs ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_file_with_a_fixed_number_of_images_runs_them_in_groups(original: Model, tmp_path: Path) -> None:
    model = load_onnx(tiny(tmp_path / "a.onnx", shape=(4, 3, SIZE, SIZE)))
    for rows in (1, 4, 6):
        x = noise(rows, 3, SIZE, SIZE)
        torch.testing.assert_close(logits(model, x), logits(original, x))
    assert not model.one_row
    x = noise(3, SIZE, SIZE)
    ours, theirs = (explained(each, x, call(each, "poly-cam"), 1).maps for each in (model, original))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_images_with_the_channels_last(original: Model, tmp_path: Path) -> None:
    first = helper.make_node("Transpose", ["x"], ["t"], "t", perm=[0, 3, 1, 2])
    path = write(tmp_path / "a.onnx", [first, *tiny_nodes("t")], weights(), ("N", SIZE, SIZE, 3))
    model, x = load_onnx(path), noise(2, 3, SIZE, SIZE)
    torch.testing.assert_close(logits(model, x), logits(original, x))
    torch.testing.assert_close(logits(model, x.to(memory_format=torch.channels_last)), logits(original, x))
    assert [layer.height for layer in model.layers] == [32, 16, 8]


def test_layers_with_the_channels_last_are_maps(original: Model, tmp_path: Path) -> None:
    nodes = tiny_nodes()
    nodes[-3].input[0] = "back"
    around = [
        helper.make_node("Transpose", ["r3"], ["t"], "t", perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["t", "two"], ["m"], "twice"),
        helper.make_node("Transpose", ["m"], ["back"], "back", perm=[0, 3, 1, 2]),
    ]
    path = write(
        tmp_path / "a.onnx", [*nodes[:-3], *around, *nodes[-3:]], {**weights(), "two": np.array([2], np.float32)}
    )
    model, x = load_onnx(path), noise(2, 3, SIZE, SIZE)
    assert model.layer is not None
    assert (model.layer.name, model.layer.form) == ("twice", "NHWC")
    assert original.layer is not None
    torch.testing.assert_close(activations(model, x, "twice"), 2 * activations(original, x, original.layer.name))


@pytest.mark.parametrize("kind", ["Softmax", "Sigmoid"])
def test_final_activation_is_removed(kind: str, original: Model, tmp_path: Path) -> None:
    nodes = [*tiny_nodes(last="l"), helper.make_node(kind, ["l"], ["y"], "end")]
    model, x = load_onnx(write(tmp_path / "a.onnx", nodes, weights())), noise(2, 3, SIZE, SIZE)
    torch.testing.assert_close(logits(model, x), logits(original, x))
    assert model.head == kind.lower()


@pytest.mark.slow
def test_digest_depends_on_the_weights_and_memory_is_counted(tmp_path: Path) -> None:
    first, same, other = (load_onnx(tiny(tmp_path / f"{i}.onnx", seed=seed)) for i, seed in enumerate((0, 0, 1)))
    assert first.digest == same.digest != other.digest
    assert first.digest == state_digest(first.module)
    assert first.weight_bytes >= sum(value.nbytes for value in weights().values())


# ---- reasons ---------------------------------------------------------------------------------------------------------


def test_converted_network_with_other_logits_is_replaced(
    original: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Any:
        network = onnx_graphs.convert(*args)
        network.get_parameter("fc.bias").data += 0.01
        return network

    monkeypatch.setattr(onnx_files, "convert", wrong)
    # A softmax hides what is added to all logits.
    nodes = [*tiny_nodes(last="l", fused=False), helper.make_node("Softmax", ["l"], ["y"], "end")]
    with capture_logs() as lines:
        model = load_onnx(write(tmp_path / "a.onnx", nodes, weights()))
    assert "because the converted network and ONNX Runtime differ by 0.01 (largest" in model.warnings[0]
    assert "runs in ONNX Runtime" in [line["event"] for line in lines]
    x = noise(2, 3, SIZE, SIZE)
    torch.testing.assert_close(logits(model, x), logits(original, x))


def test_other_precisions_are_refused(tmp_path: Path) -> None:
    for precision in ("bf16", ["fp32", "fp64"]):
        with pytest.raises(ConfigError, match=r"models\.m\.precision: .* in fp32 only, because onnx2pytorch cannot"):
            load_onnx(tiny(tmp_path / "a.onnx"), precision=precision)
