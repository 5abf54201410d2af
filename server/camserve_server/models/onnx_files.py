"""Networks from ONNX files, converted to torch so that gradients and all layers are available."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
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
    """Convert an ONNX file to a torch network, and compare both.

    A final softmax, log-softmax or sigmoid is removed, so that the network returns logits.

    Args:
        path: ONNX file with one input, float32 [N, C, H, W] or [N, H, W, C], and one output [N, classes].
        config: Configuration of the model.
        where: Configuration key of the model, for errors.

    Returns:
        The network, [N, C, H, W] → logits [N, classes]. Its attribute `config_defaults` contains the input size and the
        head that the file defines.

    Raises:
        ConfigError: The file cannot be read or converted, or the converted network computes other logits.
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
    quantised = sorted({node.op_type for node in model.graph.node} & _QUANTISED)
    if quantised:
        raise ConfigError(
            f"{where}.source: the activations of the ONNX file are quantised ({', '.join(quantised)}), so its layers "
            "are integers without gradients; use the file from before the quantisation"
        )
    signature = _signature(model.graph, config, where)
    rows = np.random.default_rng(0).standard_normal((2, signature.channels, *signature.size)).astype(np.float32)
    reference = _Reference(model, signature, where)
    outputs = reference.run(rows)
    output = _only_logits(outputs, len(rows), where)
    keep_output(model.graph, output)
    removed = "" if config.head == "probabilities" else remove_head(model.graph)
    try:
        prepare_graph(model, signature.batch)
        network = convert(model, signature.layout)
    except Exception as error:
        operators = ", ".join(sorted({node.op_type for node in model.graph.node}))
        raise ConfigError(
            f"{where}.source: onnx2pytorch cannot convert the file: {type(error).__name__}: {_first_line(error)}; its "
            f"operators are {operators}; export the network with other operators, or serve its torch code with python:"
        ) from error
    defaults: dict[str, Any] = {"input_size": signature.size}
    if removed == "Sigmoid":
        defaults["head"] = "sigmoid"
    if signature.channels == 1:
        defaults |= {"mean": (0.5,), "std": (0.5,)}
    network.config_defaults = defaults  # type: ignore[assignment]  # torch declares tensors and modules only
    _compare(network, rows, outputs[output].reshape(len(rows), -1), removed, signature, where)
    log.info("converted from ONNX", model=config.name, layout=signature.layout, removed=removed or "nothing")
    return network


# ---- input and output ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signature:
    """Input of an ONNX graph. `batch` is the number of rows that the file fixes; 0 if it accepts any number."""

    name: str
    layout: Literal["NCHW", "NHWC"]
    channels: int
    size: tuple[int, int]
    batch: int

    def as_input(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return rows [N, C, H, W] in the layout of the file."""
        return rows if self.layout == "NCHW" else np.ascontiguousarray(rows.transpose(0, 2, 3, 1))


def _signature(graph: Any, config: ModelConfig, where: str) -> _Signature:
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
    return _Signature(inputs[0].name, layout, channels, size, batch)


def _describe(kind: Any) -> str:
    import onnx

    names = {value: name.lower() for name, value in onnx.TensorProto.DataType.items()}
    dims = ", ".join(str(dim.dim_value or dim.dim_param or "?") for dim in kind.shape.dim)
    return f"{names.get(kind.elem_type, 'undefined')} [{dims}]"


class _Reference:
    """ONNX Runtime, which runs the file as it is.

    Args:
        model: The file before any change.
        signature: Its input.
        where: Configuration key of the model, for errors.
    """

    def __init__(self, model: Any, signature: _Signature, where: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, too
        options.intra_op_num_threads = torch.get_num_threads()
        self._signature = signature
        self._where = where
        try:
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        except Exception as error:  # a file above 2 GiB, or an operator that ONNX Runtime does not have
            raise ConfigError(
                f"{where}.source: ONNX Runtime cannot load the file: {type(error).__name__}: {_first_line(error)}"
            ) from error

    def run(self, rows: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return the outputs for rows [N, C, H, W], which run one at a time."""
        names = [each.name for each in self._session.get_outputs()]
        results = []
        for row in rows:
            batch = np.repeat(row[None], self._signature.batch or 1, axis=0)
            try:
                results.append(self._session.run(names, {self._signature.name: self._signature.as_input(batch)}))
            except Exception as error:
                raise ConfigError(
                    f"{self._where}.input_size: the ONNX file does not run on an input of {[*batch.shape]}: "
                    f"{_first_line(error)}"
                ) from error
        return {name: np.stack([each[i][0] for each in results]) for i, name in enumerate(names)}


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


def _compare(
    network: nn.Module,
    rows: NDArray[np.float32],
    expected: NDArray[np.float32],
    removed: str,
    signature: _Signature,
    where: str,
) -> None:
    """Raise ConfigError if the converted network and ONNX Runtime, `expected` [N, classes], differ for a row alone."""
    heads = {"Softmax": torch.softmax, "LogSoftmax": torch.log_softmax}
    x = torch.from_numpy(rows)
    try:
        values = torch.cat([_run(network, row[None]) for row in x])
    except Exception as error:
        fixed = f"; the file fixes the number of images to {signature.batch}" if signature.batch > 1 else ""
        raise ConfigError(
            f"{where}.source: the converted network does not run: {type(error).__name__}: {_first_line(error)}{fixed}; "
            "export it with a dynamic batch axis and other operators, or serve its torch code with python:"
        ) from error
    values = heads[removed](values, -1) if removed in heads else values.sigmoid() if removed == "Sigmoid" else values
    off = float(np.abs(values.numpy() - expected).max()) if values.shape == expected.shape else np.inf
    if not off <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ConfigError(
            f"{where}.source: the converted network and ONNX Runtime differ by {off:.2g} (largest output "
            f"{np.abs(expected).max():.2g}, allowed {TOLERANCE}); export the network with other operators, or serve "
            "its torch code with python:"
        )


@torch.no_grad()
def _run(network: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once about the indexing of onnx2pytorch
        result: Tensor = network(x)
    return result


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
