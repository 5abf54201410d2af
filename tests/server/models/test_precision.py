"""One network at several precisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import skimage.data
import torch
from torch import Tensor, nn

import camserve
from camserve_server.config import Config, ModelConfig, embedded_model, read_config
from camserve_server.errors import ConfigError, Unservable
from camserve_server.models.load import load
from camserve_server.models.model import Model, Precision
from camserve_server.models.randomise import RandomCopy, weighted_layers
from camserve_server.service.server import Server
from camserve_server.torch_setup.arithmetic import gpu_arithmetic
from tests import nets
from tests.conftest import serving
from tests.support import TIMEOUT_S, call, explained, metric, noise, running, submit

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "name": "small",
    "source": "python:tests.nets:tiny_cnn",
    "input_size": (32, 32),
    "batch_size": 4,
}


def load_small(*precision: Precision) -> Model:
    model = load(ModelConfig(**SMALL, precision=precision), CPU)
    for each in model.precisions.values():
        each.batch_sizes = {"forward": 4, "gradient": 4, "ascend": 4}
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return load_small("fp32", "bf16", "fp16", "fp64")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return noise(3, 32, 32)


def test_each_precision_has_its_own_network(model: Model) -> None:
    assert [*model.precisions] == ["fp32", "bf16", "fp16", "fp64"]
    for precision, compute_dtype, dtype in (
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ):
        at = model.at(precision)
        assert {each.dtype for each in at.module.parameters()} == {compute_dtype}
        assert (at.precision, at.dtype, at.digest) == (precision, dtype, model.digest)
        assert at.gap is not None
        assert at.gap.weight(at.module).dtype == compute_dtype
    assert model.at("") is model
    with pytest.raises(Unservable, match="small computes in fp32, bf16, fp16, fp64, not in tf32"):
        model.at("tf32")


def test_weights_that_precisions_share_count_once() -> None:
    full, half = (sum(each.nbytes for each in load_small(at).module.parameters()) for at in ("fp32", "fp16"))
    model = load_small("fp32", "fp16")
    assert model.weight_bytes == full + half
    model.others = {**model.others, "tf32": model.with_module(model.module, precision="tf32")}
    assert model.weight_bytes == full + half


@pytest.mark.parametrize(
    "method", ["cam", "grad-cam", "layer-cam", "poly-cam", "opti-cam", "ablation-cam", "input-x-gradient", "rise"]
)
def test_maps_differ_by_rounding_only(model: Model, x: Tensor, method: str) -> None:
    shorter: dict[str, dict[str, Any]] = {"opti-cam": {"steps": 3}, "rise": {"masks": 50}}
    parameters = shorter.get(method, {})
    maps = {
        precision: explained(at, x, call(at, method, **parameters), [2]).maps
        for precision, at in model.precisions.items()
    }
    torch.testing.assert_close(maps["fp32"].double(), maps["fp64"].double(), rtol=0, atol=1e-4)
    assert (maps["bf16"] - maps["fp64"]).abs().mean() < 0.03
    assert (maps["fp16"] - maps["fp64"]).abs().mean() < 0.005
    for half in (maps["bf16"], maps["fp16"]):
        assert half.dtype == torch.float32 and not torch.equal(half, maps["fp32"])


def test_attention_and_random_copies_run_in_bf16(x: Tensor) -> None:
    model = load(ModelConfig(**{**SMALL, "source": "python:tests.nets:tiny_vit"}, precision=("bf16", "fp32")), CPU)
    for each in model.precisions.values():
        each.batch_sizes = {"forward": 4, "gradient": 4, "ascend": 4}
    assert model.precision == "bf16"
    whole = model.at("fp32")
    got, want = (explained(at, x, call(at, "raw-attention"), [2]).maps for at in (model, whole))
    torch.testing.assert_close(got, want, rtol=0, atol=0.15)
    checked = explained(model, x, call(model, "grad-cam"), [2], [metric("randomisation-ssim", steps=2)])
    assert -1 <= checked.scores[0][0].value <= 1


def test_bits_do_not_depend_on_requests_at_other_precisions(model: Model, x: Tensor) -> None:
    at = model.at("bf16")
    alone = explained(at, x, call(at, "poly-cam"), [2]).maps
    with running() as engine:
        others = [
            submit(engine, model.at(each), noise(3, 32, 32, seed=i), call(model, "rise", masks=30))
            for i, each in enumerate(["bf16", "fp32", "fp64", "bf16"])
        ]
        mine = submit(engine, at, x, call(at, "poly-cam"), [2])
        assert torch.equal(mine.future.result(TIMEOUT_S).maps, alone)
        for other in others:
            other.future.result(TIMEOUT_S)


def test_out_of_memory_halves_batches_of_its_own_precision_only(
    model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = load_small("fp32", "bf16").at("bf16")
    forward = nn.Module.__call__

    def limited(self: nn.Module, X: Tensor) -> Tensor:
        if self is at.module and len(X) > 2:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, X)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(at.module), "__call__", limited)
    explained(at, x, call(at, "poly-cam"), [2])
    assert at.batch_sizes["forward"] == 2 and model.batch_sizes["forward"] == 4


@pytest.mark.slow
def test_embedded_network_in_bf16_agrees_with_fp32() -> None:
    model = load(embedded_model().model_copy(update={"precision": ("fp32", "bf16")}), CPU)
    x = model.preprocessing(skimage.data.chelsea())
    maps = []
    for at in model.precisions.values():
        at.batch_sizes = {"forward": 2, "gradient": 2, "ascend": 2}
        result = explained(at, x, call(at, "grad-cam"))
        assert at.label(result.targets.index[0]) == "Egyptian cat"
        maps.append(result.maps[0].flatten())
    assert torch.corrcoef(torch.stack(maps))[0, 1] > 0.99


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"models\.small\.precision: only GPUs compute in tf32"):
        load_small("tf32")


@pytest.mark.parametrize("value", ['"bf16"', '["fp32", "bf16"]'])
def test_configuration_takes_one_or_several_precisions(tmp_path: Path, value: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'models = [{{name = "m", source = "torchvision:resnet18", precision = {value}}}]')
    assert (read_config(path).models[0].precision or ())[-1] == "bf16"
    path.write_text('models = [{name = "m", source = "torchvision:resnet18", precision = ["fp8"]}]')
    with pytest.raises(ConfigError, match=r"models\.m\.precision\.0"):
        read_config(path)


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    with serving(Config(listen="127.0.0.1:0", models=[ModelConfig(**SMALL, precision=("fp32", "bf16"))])) as server:
        yield server


@pytest.mark.slow
def test_requests_choose_a_precision(served: Server) -> None:
    image = skimage.data.chelsea()
    with camserve.Client(served.address) as client:
        (listed,) = client.models()
        assert (listed.precision, listed.precisions) == ("fp32", ("fp32", "bf16"))
        own = client.explain(image, method="poly-cam")
        half = client.explain(image, method="poly-cam", precision="bf16", target=own.target.index)
        assert (own.receipt.precision, half.receipt.precision) == ("fp32", "bf16")
        assert own.receipt.map_digests != half.receipt.map_digests
        assert client.replay(half.receipt, image).same
        scores = [
            client.evaluate(image, method="grad-cam", metrics="average-drop", precision=each).receipt.precision
            for each in ("bf16", None)
        ]
        assert scores == ["bf16", "fp32"]
        with pytest.raises(camserve.FailedPrecondition, match="small computes in fp32, bf16, not in fp64"):
            client.explain(image, precision="fp64")


# ---- fp16 and tf32 --------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A network whose input is multiplied by a factor and divided by it, and whose logits are multiplied by another."""

    def __init__(self, inner: float, outer: float) -> None:
        super().__init__()
        self.net, self.inner, self.outer = nets.tiny_cnn(), inner, outer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x * self.inner / self.inner) * self.outer
        return y


def too_large() -> nn.Module:
    """Return a network whose logits exceed the range of fp16; the configuration names this factory."""
    return Scaled(1, 1e7)


def too_small() -> nn.Module:
    """Return a network whose input becomes zero in fp16."""
    return Scaled(1e-8, 1)


@pytest.mark.parametrize(("factory", "problem"), [("too_large", "are not finite"), ("too_small", "differ by")])
def test_networks_that_fp16_changes_are_refused(factory: str, problem: str) -> None:
    config = SMALL | {"source": f"python:tests.server.models.test_precision:{factory}"}
    with pytest.raises(ConfigError, match=f"^models.small.precision: in fp16, the logits {problem}.*; choose bf16"):
        load(ModelConfig(**config, precision=("fp16",)), CPU)
    load(ModelConfig(**config, precision=("bf16",)), CPU)


def normed_head() -> nn.Module:
    """Return a network whose head computes its weights from others; the configuration names this factory."""
    net = nets.tiny_cnn()
    net.fc = nn.utils.parametrizations.weight_norm(net.fc)
    return net


def test_head_with_computed_weights_has_those_of_each_copy() -> None:
    config = SMALL | {"source": "python:tests.server.models.test_precision:normed_head"}
    model = load(ModelConfig(**config, precision=("fp32", "bf16")), CPU)
    copy = RandomCopy(model)
    for each in (model, model.at("bf16"), copy.model):
        name, weights = each.class_weights([2, 0])
        torch.testing.assert_close(weights, nets.tiny_cnn().fc.weight[[2, 0]].detach(), rtol=1e-2, atol=0)
        assert name == "r3"
    before = model.class_weights([2])[1]
    copy.randomise([name for name in weighted_layers(model) if name.startswith("fc")], seed=1)
    assert not torch.allclose(copy.model.class_weights([2])[1], before)
    assert torch.equal(model.class_weights([2])[1], before)


def settings_of_process() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.deterministic


class Watched(nn.Module):
    """A network that records the settings of TF32 each time that it runs."""

    seen: ClassVar[list[tuple[bool, bool, bool]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(settings_of_process())
        y: Tensor = self.net(x)
        return y


@pytest.fixture(params=[(True, True, False), (False, False, True), (True, False, False)])
def settings(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool, bool]]:
    """Set the process to these settings, as a program may that embeds the engine."""
    before = settings_of_process()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = request.param
    yield request.param
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before


@pytest.mark.parametrize("method", ["rise", "grad-cam", "opti-cam"])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_settings_of_the_process_change_no_batch(
    settings: tuple[bool, bool, bool], precision: Precision, method: str
) -> None:
    """Each batch of each lane runs with the settings of its model, and the process keeps its own."""
    model = load(ModelConfig(**SMALL | {"source": "python:tests.server.models.test_precision:Watched"}), CPU)
    assert settings_of_process() == settings
    assert {*Watched.seen} == {(False, False, True)}, "layers are detected in full precision"
    model = replace(model, precision=precision, batch_sizes={"forward": 4, "gradient": 4, "ascend": 4})
    Watched.seen.clear()
    parameters: dict[str, Any] = {"opti-cam": {"steps": 2}, "rise": {"masks": 8}}.get(method, {})
    explained(model, noise(3, 32, 32), call(model, method, **parameters), [1])
    assert {*Watched.seen} == {(precision == "tf32", precision == "tf32", True)}
    Watched.seen.clear()
    assert settings_of_process() == settings


def test_settings_of_newer_names_are_restored() -> None:
    """torch has them since 2.9. The older names raise errors if the newer ones are used."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    if not hasattr(cudnn, "conv"):
        pytest.skip("this version of torch has only the older names")
    settings = (cudnn.conv, cudnn.rnn, matmul)
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision = "ieee", "ieee", "tf32"
        with gpu_arithmetic(tf32=True):
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, True)
        assert [each.fp32_precision for each in settings] == ["ieee", "ieee", "tf32"]
    finally:  # the older names set the newer ones, too
        cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.gpu
def test_gpus_compute_in_tf32_by_default() -> None:
    assert load(ModelConfig(**SMALL), torch.device("cuda")).precision == "tf32"
