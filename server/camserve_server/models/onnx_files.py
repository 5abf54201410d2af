"""Networks from ONNX files: converted to torch if possible, because ONNX Runtime has no gradients and few layers."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError
from camserve_server.models.onnx_graphs import convert, keep_output, prepare_graph, remove_head
from camserve_server.models.onnx_runtime import OnnxRuntimeNetwork, Session, Signature, in_segments

log = structlog.get_logger()

PACKAGES = ("onnx", "onnx2pytorch", "onnxruntime")
# Largest difference between the converted network and ONNX Runtime, relative to the largest logit or to 1.
TOLERANCE = 1e-4
# Nodes of files with quantised activations.
_QUANTISED = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}


def check_onnx(path: Path, where: str) -> None:
    """Check that the file exists and that the packages of the extra `onnx` are installed.

    Args:
        path: ONNX file.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The file or a package is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{where}.source: ONNX files need {', '.join(missing)}; install camserve[onnx]: "
            "pip install 'camserve[onnx]'"
        )
    if not path.is_file():
        raise ConfigError(f"{where}.source: there is no file {path}; expected onnx:FILE")


def build_onnx(path: Path, config: ModelConfig, where: str) -> nn.Module:
    """Convert an ONNX file to a torch network, or run it in ONNX Runtime if the conversion is impossible or wrong.

    A final softmax, log-softmax or sigmoid is removed, so that the network returns logits.

    Args:
        path: ONNX file with one input, float32 [N, C, H, W] or [N, H, W, C], and one output [N, classes].
        config: Configuration of the model.
        where: Configuration key of the model, for errors.

    Returns:
        The network, [N, C, H, W] → logits [N, classes]. Its attribute `config_defaults` contains the input size and the
        head that the file defines, and `own_warnings` the reason if ONNX Runtime runs it.

    Raises:
        ConfigError: The file cannot be read, or it is no image classifier that ONNX Runtime runs.
    """
    from camserve_server.torch_setup import torchvision_ops  # noqa: F401  (onnx2pytorch imports torchvision)

    import onnx  # isort: skip
    from onnx.external_data_helper import uses_external_data

    try:
        model = onnx.load(str(path), load_external_data=False)
        external = any(uses_external_data(tensor) for tensor in model.graph.initializer)
        if external and config.weights_sha256:
            raise ConfigError(
                f"{where}.weights_sha256: it would not pin {path}, which reads weights from other files; save the file "
                "with its weights inside, or remove the key"
            )
        model = onnx.load(str(path))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{where}.source: {path} cannot be read as ONNX: {type(error).__name__}: {_first_line(error)}"
        ) from error
    signature = _signature(model.graph, config, where)
    rows = np.random.default_rng(0).standard_normal((2, signature.channels, *signature.size)).astype(np.float32)
    outputs = _reference(model, signature, rows, where)
    output = _only_logits(outputs, len(rows), where)
    keep_output(model.graph, output)
    removed = "" if config.head == "probabilities" else remove_head(model.graph)
    if removed:  # probabilities near 0 and 1 would hide differences between logits
        outputs, output = _reference(model, signature, rows, where), model.graph.output[0].name
    expected = outputs[output].reshape(len(rows), -1)
    try:
        network = _convert(copy.deepcopy(model), signature, rows, expected)
        event = "converted from ONNX"
    except _Unsuitable as reason:
        network = _run_in_onnx_runtime(model, signature, rows, expected, config, str(reason), where)
        event = "runs in ONNX Runtime"
    defaults: dict[str, Any] = {"input_size": signature.size}
    if removed == "Sigmoid":
        defaults["head"] = "sigmoid"
    if signature.channels == 1:
        defaults |= {"mean": (0.5,), "std": (0.5,)}
    network.config_defaults = defaults  # type: ignore[assignment]  # torch declares tensors and modules only
    log.info(event, model=config.name, layout=signature.layout, removed=removed or "nothing")
    return network


class _Unsuitable(Exception):
    """A network does not compute what the file does. The text is the end of a sentence."""


def _convert(model: Any, signature: Signature, rows: NDArray[np.float32], expected: NDArray[np.float32]) -> nn.Module:
    """Convert the model, which is changed, to torch, or raise _Unsuitable."""
    quantised = sorted({node.op_type for node in model.graph.node} & _QUANTISED)
    if quantised:
        raise _Unsuitable(f"its activations are quantised ({', '.join(quantised)})")
    try:
        prepare_graph(model, signature.batch)
        network = convert(model, signature.layout)
    except Exception as error:  # onnx2pytorch raises many kinds
        raise _Unsuitable(f"onnx2pytorch cannot convert it ({type(error).__name__}: {_first_line(error)})") from error
    _compare(network, rows, expected, "the converted network")
    return network


def _run_in_onnx_runtime(
    model: Any,
    signature: Signature,
    rows: NDArray[np.float32],
    expected: NDArray[np.float32],
    config: ModelConfig,
    reason: str,
    where: str,
) -> nn.Module:
    """Return a network that ONNX Runtime runs, because of the reason: in segments if they give the same logits."""
    if config.precision not in (None, ("fp32",)):
        raise ConfigError(
            f"{where}.precision: the file runs in ONNX Runtime in fp32 only, because {reason}; "
            'set precision = "fp32" or leave the key out'
        )
    wanted = {name for name in (config.layer, *(config.layers or ())) if name}
    warning = f"the file runs in ONNX Runtime, because {reason}; methods that need gradients are not available"
    problem = ""

    def check(network: nn.Module) -> None:
        _compare(network, rows, expected, "the network in segments")

    for without_shapes in (True, False):
        try:
            network = in_segments(model, signature, rows, wanted, check, without_shapes=without_shapes)
            break
        except Exception as error:  # ONNX Runtime raises many kinds
            problem = str(error) if isinstance(error, _Unsuitable) else f"{type(error).__name__}: {_first_line(error)}"
    else:
        warning += f", and it has no layers, because it cannot be divided into segments ({problem})"
        network = OnnxRuntimeNetwork([model], [], signature, model.graph.SerializeToString())
        try:
            _compare(network, rows, expected, "the network")
        except _Unsuitable as last:
            raise ConfigError(
                f"{where}.source: {last}; export the network again, or serve its torch code with python:"
            ) from last
    network.own_warnings = (warning,)  # type: ignore[assignment]  # torch declares tensors and modules only
    return network


# ---- input and output ------------------------------------------------------------------------------------------------


def _signature(graph: Any, config: ModelConfig, where: str) -> Signature:
    constants = {each.name for each in graph.initializer}
    inputs = [each for each in graph.input if each.name not in constants]
    described = ", ".join(f"{each.name} {_describe(each.type.tensor_type)}" for each in inputs)
    kind = inputs[0].type.tensor_type if len(inputs) == 1 else None
    if kind is None or kind.elem_type != 1 or len(kind.shape.dim) != 4:
        raise ConfigError(
            f"{where}.source: the inputs of the ONNX file are {described or 'missing'}; expected one, float32 "
            "[N, C, H, W] or [N, H, W, C]; export the network with this input"
        )
    batch, *dims = (dim.dim_value for dim in kind.shape.dim)  # 0 if a size is not fixed
    layout: Literal["NCHW", "NHWC"] = "NHWC" if dims[2] in (1, 3) and dims[0] not in (1, 3) else "NCHW"
    channels, height, width = dims if layout == "NCHW" else (dims[2], dims[0], dims[1])
    channels = channels or len(config.mean)
    if (height or width) and "input_size" in config.model_fields_set:
        wanted = config.input_size
        if (height or wanted[0], width or wanted[1]) != wanted:
            raise ConfigError(
                f"{where}.input_size: the ONNX file has a fixed input of {height}x{width} pixels, not "
                f"{wanted[0]}x{wanted[1]}; remove the key, or export the network for this size"
            )
    size = (height or config.input_size[0], width or config.input_size[1])
    return Signature(inputs[0].name, layout, channels, size, batch)


def _describe(kind: Any) -> str:
    import onnx

    names = {value: name.lower() for name, value in onnx.TensorProto.DataType.items()}
    dims = ", ".join(str(dim.dim_value or dim.dim_param or "?") for dim in kind.shape.dim)
    return f"{names.get(kind.elem_type, 'undefined')} [{dims}]"


def _reference(
    model: Any, signature: Signature, rows: NDArray[np.float32], where: str
) -> dict[str, NDArray[np.float32]]:
    """Return the outputs of ONNX Runtime for rows [N, C, H, W], which run one at a time."""
    try:
        session = Session(model, signature.batch)
    except Exception as error:  # a file above 2 GiB, or an operator that ONNX Runtime does not have
        raise ConfigError(
            f"{where}.source: ONNX Runtime cannot load the file: {type(error).__name__}: {_first_line(error)}"
        ) from error
    try:
        results = [session.run(signature.as_input(row[None])) for row in rows]
    except Exception as error:
        shape = [signature.batch or 1, *rows.shape[1:]]
        raise ConfigError(
            f"{where}.input_size: the ONNX file does not run on an input of {shape}: {_first_line(error)}"
        ) from error
    return {name: np.concatenate([each[name] for each in results]) for name in session.names}


def _only_logits(outputs: Mapping[str, NDArray[np.float32]], rows: int, where: str) -> str:
    """Return the name of the only output [N, classes] or [N, classes, 1, 1]."""
    fitting = [
        name
        for name, value in outputs.items()
        if value.dtype == np.float32 and value.ndim >= 2 and value.size == rows * value.shape[1]
    ]
    if len(fitting) != 1:
        described = ", ".join(f"{name} {value.dtype} {[*value.shape]}" for name, value in outputs.items())
        raise ConfigError(
            f"{where}.source: the outputs of the ONNX file for {rows} images are {described}; expected exactly one "
            "float32 [N, classes]; export the network with this output only"
        )
    return fitting[0]


# ---- comparison ------------------------------------------------------------------------------------------------------


def _compare(network: nn.Module, rows: NDArray[np.float32], expected: NDArray[np.float32], what: str) -> None:
    """Raise _Unsuitable if the logits of the network for each row alone are not the expected ones [N, classes]."""
    try:
        values = torch.cat([_run(network, row[None]) for row in torch.from_numpy(rows)]).numpy()
    except Exception as error:
        raise _Unsuitable(f"{what} does not run ({type(error).__name__}: {_first_line(error)})") from error
    off = float(np.abs(values - expected).max()) if values.shape == expected.shape else np.inf
    if not off <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise _Unsuitable(
            f"{what} and ONNX Runtime differ by {off:.2g} (largest output {np.abs(expected).max():.2g}, allowed "
            f"{TOLERANCE})"
        )


@torch.no_grad()
def _run(network: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once about the indexing of onnx2pytorch
        result: Tensor = network(x)
    return result


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
