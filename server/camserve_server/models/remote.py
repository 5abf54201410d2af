"""Networks that another server runs, which implements the Open Inference Protocol (Triton, KServe, MLServer)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import CamserveError, ConfigError, RemoteFailed, Unservable
from camserve_server.models.layers import ReadOnlyOutput

if TYPE_CHECKING:  # the stubs register the protobuf package "inference", which code of users may do, too
    from camserve_server.open_inference.connection import Answer, RemoteModel, TensorInfo

NO_GRADIENTS = "a remote server runs the network and returns no gradients"
NO_ACTIVATIONS = "the remote server returns no activations that are maps of the image, only logits"
NOT_VERIFIED = (
    "the weights of a remote model are not verified: its digest covers name, version, platform and signature only, so "
    "a replay does not notice other weights under the same version"
)


@dataclass(frozen=True)
class _Input:
    """Input of a remote network.

    Attributes:
        name: Name of the input.
        declared: The input in the metadata of the server, as a text.
        layout: Order of the dimensions.
        channels: Number of channels.
        size: Height and width.
        batch: Number of rows that the server fixes; 0 if it accepts any number.
    """

    name: str
    declared: str
    layout: Literal["NCHW", "NHWC"]
    channels: int
    size: tuple[int, int]
    batch: int


class RemoteNetwork(nn.Module):
    """Network that another server runs: [N, C, H, W] → logits [N, classes], without gradients.

    The further outputs of the network pass through a submodule each, so that hooks read them like the outputs of
    layers. An output is requested only if its submodule has a hook.

    Args:
        connection: The model on its server.
        input_: Input of the network.
        answer: Outputs for one batch of `batch` rows or of one.
        platform: Platform of the model, as the server describes it.
        max_rows: Number of rows of a request; more rows take several requests. If None, a request may have any number.

    Attributes:
        connection: The model on its server.
        max_rows: As above.
        config_defaults: Defaults of the configuration (`sources.with_network_defaults`).
    """

    signature: Tensor

    def __init__(
        self, connection: RemoteModel, input_: _Input, answer: Answer, platform: str, max_rows: int | None
    ) -> None:
        super().__init__()
        self.connection = connection
        self.max_rows = max_rows
        self.config_defaults: dict[str, Any] = {"input_size": input_.size}
        if input_.channels != 3:
            self.config_defaults |= {"mean": (0.5,) * input_.channels, "std": (0.5,) * input_.channels}
        self._input = input_
        self._served_version = answer.version
        self._shapes = {name: value.shape[1:] for name, value in answer.outputs.items()}
        [self._logits] = [name for name, shape in self._shapes.items() if len(shape) == 1]
        # The only state, which is the content of the digest. It does not depend on the configuration.
        dimensions = {name: shape if len(shape) == 1 else len(shape) for name, shape in self._shapes.items()}
        facts = [connection.model, self._served_version, platform, input_.declared, dimensions]
        text = json.dumps(facts, sort_keys=True).encode()
        self.register_buffer("signature", torch.frombuffer(bytearray(text), dtype=torch.uint8))
        maps = [name for name, shape in self._shapes.items() if len(shape) in (2, 3)]
        self._modules_of_outputs = {_add(self, name): name for name in maps}

    @property
    def output_modules(self) -> Sequence[str]:
        """Names of the submodules that pass on activations."""
        return [*self._modules_of_outputs]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, classes] of x [N, C, H, W], and pass activations through the submodules with hooks."""
        modules = {output: self.get_submodule(name) for name, output in self._modules_of_outputs.items()}
        read = [output for output, module in modules.items() if module._forward_hooks or module._forward_pre_hooks]
        wanted = (self._logits, *read)
        rows = x.detach().float().cpu()
        parts = [self._request(part, wanted) for part in torch.split(rows, self.max_rows or len(rows))]
        found = {name: torch.cat([part[name] for part in parts]).to(x.dtype) for name in wanted}
        for output in read:
            modules[output](found[output])
        return found[self._logits]

    def _request(self, rows: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        batch = max(self._input.batch, len(rows))
        answer = self.connection.infer(self._input.name, _as_input(rows, self._input, batch), wanted)
        if answer.version != self._served_version:
            raise Unservable(
                f"the remote model {self.connection.name} has the version {answer.version!r} now, not "
                f"{self._served_version!r}; reload the model",
                reason="REMOTE_CHANGED",
            )
        for name in wanted:
            value = answer.outputs.get(name)
            if value is None or value.shape != (batch, *self._shapes[name]):
                shape = "no such output" if value is None else list(value.shape)
                raise RemoteFailed(
                    f"the remote model {self.connection.name} returns {shape} for {name}; expected "
                    f"{[batch, *self._shapes[name]]}; reload the model if it has changed"
                )
        return {name: torch.from_numpy(answer.outputs[name][: len(rows)]) for name in wanted}


def check_remote(config: ModelConfig, where: str) -> bytes | None:
    """Return the root certificates of the remote server; None for a plaintext connection.

    Args:
        config: Configuration of the model.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The file of the certificates cannot be read or contains none.
    """
    if config.remote_ca is None:
        return None
    path = config.resolve(config.remote_ca)
    try:
        roots = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}.remote_ca: {path}: {error.strerror}; expected a file with certificates") from error
    if b"-----BEGIN CERTIFICATE-----" not in roots:
        raise ConfigError(f"{where}.remote_ca: {path} contains no certificate; expected a PEM file")
    return roots


def build_remote(config: ModelConfig, where: str) -> RemoteNetwork:
    """Connect to a remote model and run it once on zeros.

    Args:
        config: Configuration of the model.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The server cannot be reached, the model is not ready, or its inputs or outputs are not those of a
            classifier of images.
    """
    from camserve_server.open_inference.connection import RemoteModel

    assert config.remote is not None, "sources.build_network calls this for triton: only"
    connection = RemoteModel(*config.remote, roots=check_remote(config, where), proxy=config.images_leave)
    try:
        if not connection.ready():
            raise ConfigError(
                f"{where}.source: the remote model {connection.name} is not ready; load it on its server, or correct "
                "the name"
            )
        platform, inputs = connection.metadata()
        input_ = _only_input(inputs, config, where)
        zeros = torch.zeros(input_.batch or 1, input_.channels, *input_.size)
        answer = connection.infer(input_.name, _as_input(zeros, input_, len(zeros)))
    except CamserveError as error:
        raise ConfigError(
            f"{where}.source: {error.message}; check the address, the name of the model, and remote_ca"
        ) from error
    _check_outputs(answer, len(zeros), connection.name, where)
    max_rows = config.batch_size or input_.batch or None
    return RemoteNetwork(connection, input_, answer, platform, max_rows)


def warnings_about(network: RemoteNetwork, layers: Mapping[str, object], config: ModelConfig) -> tuple[str, ...]:
    """Return the sentences for the operator about a remote network.

    Args:
        network: The network.
        layers: Its layers by name.
        config: Configuration of the model.
    """
    sentences = [NOT_VERIFIED]
    if layers:
        names = ", ".join(layers)
        sentences.append(
            f"whether all information in the logits passes through the activations of the remote model ({names}) is "
            "unknown: its layers cannot be replaced, so cut values are not measured"
        )
    unused = [name for name in network.output_modules if name not in layers]
    if unused:
        sentences.append(
            f"the outputs {', '.join(unused)} of the remote model are not used: they are no maps of the image"
        )
    if config.images_leave and config.remote_ca is None:
        sentences.append("images travel to the remote server without encryption; set remote_ca")
    return tuple(sentences)


def _add(network: nn.Module, output: str) -> str:
    """Add a submodule for an output and return its name: that of the output, as far as torch accepts it."""
    parent = network
    *path, last = [part for part in output.replace("#", "_").split(".") if part] or ["output"]
    for i, part in enumerate(path):
        if part not in parent._modules:
            path[i] = _free(parent, part)
            parent.add_module(path[i], nn.Module())
        parent = parent.get_submodule(path[i])
    last = _free(parent, last)
    parent.add_module(last, ReadOnlyOutput())
    return ".".join([*path, last])


def _free(parent: nn.Module, name: str) -> str:
    """Return a name that is no attribute of the module yet."""
    while hasattr(parent, name):
        name += "_"
    return name


def _as_input(rows: Tensor, input_: _Input, batch: int) -> NDArray[np.float32]:
    """Return rows [N, C, H, W] in the layout of the input, completed with zeros to a number of rows."""
    if len(rows) < batch:
        rows = torch.cat([rows, rows.new_zeros(batch - len(rows), *rows.shape[1:])])
    values: NDArray[np.float32] = rows.numpy()
    return np.ascontiguousarray(values if input_.layout == "NCHW" else values.transpose(0, 2, 3, 1))


# ---- signature -------------------------------------------------------------------------------------------------------


def _only_input(inputs: Sequence[TensorInfo], config: ModelConfig, where: str) -> _Input:
    """Return the input of the network. Sizes that can vary are those of the configuration."""
    if len(inputs) != 1 or inputs[0].datatype != "FP32" or len(inputs[0].shape) != 4:
        raise ConfigError(
            f"{where}.source: the inputs of the remote model are {', '.join(map(str, inputs)) or 'not described'}; "
            "expected one, FP32 [N, C, H, W] or [N, H, W, C]; serve the network with this input, and describe it there"
        )
    [found] = inputs
    batch, *dims = (max(0, size) for size in found.shape)  # 0 for a size that can vary
    layout: Literal["NCHW", "NHWC"] = "NHWC" if dims[2] in (1, 3) and dims[0] not in (1, 3) else "NCHW"
    channels, height, width = dims if layout == "NCHW" else (dims[2], dims[0], dims[1])
    wanted = config.input_size
    if "input_size" in config.model_fields_set and (height or wanted[0], width or wanted[1]) != wanted:
        raise ConfigError(
            f"{where}.input_size: the remote model has a fixed input of {height}x{width} pixels, not "
            f"{wanted[0]}x{wanted[1]}; remove the key"
        )
    if "mean" in config.model_fields_set and channels not in (0, len(config.mean)):
        raise ConfigError(
            f"{where}.mean: the input of the remote model has {channels} channels, but mean has {len(config.mean)} "
            "numbers; set mean and std to one number for each channel"
        )
    if batch and (config.batch_size or 0) > batch:
        raise ConfigError(
            f"{where}.batch_size: the remote model takes {batch} images in a request, not {config.batch_size}; remove "
            "the key"
        )
    size = (height or wanted[0], width or wanted[1])
    return _Input(found.name, str(found), layout, channels or len(config.mean), size, batch)


def _check_outputs(answer: Answer, rows: int, name: str, where: str) -> None:
    from camserve_server.open_inference.connection import described

    logits = [value for value in answer.outputs.values() if value.ndim == 2]
    if len(logits) != 1 or any(len(value) != rows for value in answer.outputs.values() if value.ndim in (2, 3, 4)):
        raise ConfigError(
            f"{where}.source: for {rows} images, the outputs of the remote model {name} are "
            f"{described(answer.outputs, answer.others)}; expected exactly one FP32 [N, classes], and activations FP32 "
            "[N, K, h, w] if there are further outputs; serve the network with these outputs"
        )
