"""Examination of one network: what the server offers for it, and the agreement of its results with plain torch."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import engine_runs
from benchmarks.sweep.networks import config_of
from camserve_server import registry
from camserve_server.engine.warmup import warm_up
from camserve_server.errors import ConfigError, describe
from camserve_server.model_probe import difference_to_original, example_image, input_of, original_network
from camserve_server.models.cuts import MAX_CUT, measure_cuts
from camserve_server.models.layers import Layer
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.models.servable import unsupported_reason
from camserve_server.registry import METHODS
from camserve_server.request_plan import MethodCall

SERVED, REFUSED, FAILED, TIMEOUT, MEMORY = "served", "refused", "failed", "time limit", "memory limit"


@dataclass
class Examined:
    """Result for one network.

    Attributes:
        name: "LIBRARY:NETWORK".
        outcome: One of `SERVED`, `REFUSED`, `FAILED`, `TIMEOUT` and `MEMORY`.
        reason: Why it is not served; empty if it is.
        seconds: Duration in seconds.
        date: Date of the examination.
        layer: Name of the default layer of methods that use one; empty if there is none.
        size: Its size (h, w).
        layers: Names of the default layers of methods that use several.
        cuts: Cut value of each default layer; None if the logits do not depend on the image.
        difference: Largest difference between the outputs of the served and the original network, as a share of the
            largest one; None if it is not known.
        grad_cam: Correlation of the served Grad-CAM map with that of plain torch; None if there is none to compare.
        missing: Methods that are not available.
        warnings: Warnings about the model.
    """

    name: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    date: str = ""
    layer: str = ""
    size: tuple[int, int] = (0, 0)
    layers: list[str] = field(default_factory=list)
    cuts: dict[str, float | None] = field(default_factory=dict)
    difference: float | None = None
    grad_cam: float | None = None
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def worst_cut(self) -> float | None:
        """Largest cut value of a default layer."""
        return max((cut for cut in self.cuts.values() if cut is not None), default=None)

    @property
    def breaks_promise(self) -> bool:
        """True if a default layer is not a cut and no warning says so."""
        return self.worst_cut is not None and self.worst_cut > MAX_CUT and not self.warnings


def examine(name: str, max_bytes: int) -> Examined:
    """Load a network as the server does, and examine it. Only for a process of its own: it limits the memory.

    Args:
        name: "LIBRARY:NETWORK".
        max_bytes: Memory limit of the process.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
    try:
        return _examined(name)
    except Exception as error:  # the code of a network can raise any exception
        text = str(error).partition("\n")[0] if isinstance(error, ConfigError) else describe(error)
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return Examined(name, MEMORY, text)
        return Examined(name, REFUSED if isinstance(error, ConfigError) else FAILED, text)


def _examined(name: str) -> Examined:
    registry.discover()
    with config_of(name) as config:
        model = load(config, torch.device("cpu"))
        original = original_network(config, model)
    warm_up(model, batch_size=1)
    x = input_of(model, example_image())
    defaults = {each.name: each for each in (*model.layers, model.layer) if each}
    result = Examined(
        name,
        SERVED,
        layers=[each.name for each in model.layers],
        cuts={each.name: each.cut for each in measure_cuts(model.module, x, defaults.values())},
        missing=[each for each in sorted(METHODS) if unsupported_reason(METHODS[each], model)],
        warnings=[*model.warnings],
    )
    if original is not None:
        kind, result.difference = difference_to_original(model, original, x)
        if model.layer and "grad-cam" not in result.missing and kind == "logits":
            result.grad_cam = _correlation_of_grad_cam(model, model.layer, original, x)
    if model.layer:
        result.layer, result.size = model.layer.name, (model.layer.height, model.layer.width)
    return result


def _correlation_of_grad_cam(model: Model, layer: Layer, original: nn.Module, x: Tensor) -> float | None:
    with torch.no_grad():
        index = int(original(x)[0].argmax())
    method = METHODS["grad-cam"]
    call = MethodCall(method, method.check({}, ""), (layer,))
    served = engine_runs.run(model, x[0], call, targets=[index]).result.maps[0].numpy()
    return correlation(served, grad_cam(original, layer, x, index))


def grad_cam(network: nn.Module, layer: Layer, x: Tensor, index: int) -> NDArray[np.float32]:
    """Compute Grad-CAM (arXiv:1610.02391) with a hook and autograd, independently of the server's implementation.

    Args:
        network: Network in evaluation mode, [1, C, H, W] → logits [1, classes].
        layer: Layer with the activations.
        x: Input [1, C, H, W].
        index: Index of the class.

    Returns:
        Map [H, W] ≥ 0.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Any) -> Any:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        copy = outputs[-1].clone()  # operations in place change the copy
        return (copy, *output[1:]) if isinstance(output, tuple) else copy

    handle = network.get_submodule(layer.module).register_forward_hook(keep)
    try:
        # Two copies: for a single image, torch's batch norm on CPUs may compute a wrong gradient (docs/design.md).
        y = network(x.repeat(2, 1, 1, 1).requires_grad_())
    finally:
        handle.remove()
    output = outputs[layer.call - 1]
    [gradient] = torch.autograd.grad(y[0, index], [output])
    A, dA = (_as_maps(each.detach(), layer) for each in (output, gradient))
    S = (dA.mean(dim=(1, 2))[:, None, None] * A).sum(0).relu()
    return F.interpolate(S[None, None], x.shape[2:], mode="bilinear", align_corners=False)[0, 0].numpy()


def _as_maps(output: Tensor, layer: Layer) -> Tensor:
    """Return the output of a layer for one image as [K, h, w]."""
    rows = output.movedim(layer.batch_dim, 0)[0]
    match layer.form:
        case "NCHW":
            return rows
        case "NHWC":
            return rows.permute(2, 0, 1)
        case "tokens":
            tokens = rows[layer.prefix : layer.prefix + layer.height * layer.width]
            return tokens.T.reshape(-1, layer.height, layer.width)


def correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float | None:
    """Return the Pearson correlation of two maps: 1 if both are constant, None if only one is.

    Args:
        a: Map.
        b: Map of the same shape.
    """
    constant = [float(np.ptp(each)) <= 1e-6 * float(np.abs(each).max()) for each in (a, b)]
    if any(constant):
        return 1.0 if all(constant) else None
    return float(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])
