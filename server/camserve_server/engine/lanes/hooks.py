"""Hooks that read and replace the outputs of layers during a forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from camserve_server.models.activations import activation_of, with_activation
from camserve_server.models.layers import Layer
from camserve_server.models.model import Model
from camserve_server.plan import INPUT

# Receives a layer's name and its output. A tensor that it returns replaces the output.
OnOutput = Callable[[str, Tensor], Tensor | None]


@contextmanager
def hooks(model: Model, layers: Iterable[str], on_output: OnOutput) -> Iterator[None]:
    """Call `on_output` for each layer that runs inside the context.

    Args:
        model: Model whose network runs.
        layers: Names of layers (`Model.spatial`). "NAME<input>" stands for the input of the module NAME, which
            `on_output` can read but not replace.
        on_output: Callback. A tensor that it returns replaces the layer's output. The batch is the first dimension of
            both.
    """
    handles = []
    calls_by_module: dict[str, dict[int, Layer]] = {}  # module → call → layer
    for name in layers:
        if name.endswith(INPUT):
            module = model.module.get_submodule(name.removesuffix(INPUT))
            handles.append(module.register_forward_pre_hook(_input_hook(name, on_output)))
        else:
            layer = model.spatial[name]
            calls_by_module.setdefault(layer.module, {})[layer.call] = layer
    for owner, calls in calls_by_module.items():
        handles.append(model.module.get_submodule(owner).register_forward_hook(_output_hook(calls, on_output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(name: str, on_output: OnOutput) -> Callable[..., None]:
    def hook(module: object, args: tuple[Tensor, ...]) -> None:
        on_output(name, args[0])

    return hook


def _output_hook(calls: Mapping[int, Layer], on_output: OnOutput) -> Callable[..., Any]:
    count = itertools.count(1)

    def hook(module: object, args: object, output: Any) -> Any:
        layer = calls.get(next(count))
        if layer is None:
            return None
        activation = activation_of(output)
        assert activation is not None, "the module had an activation when the model was loaded"
        if layer.batch_dim == 0:
            changed = on_output(layer.name, activation)
        else:
            changed = on_output(layer.name, activation.transpose(0, layer.batch_dim))
            changed = None if changed is None else changed.transpose(0, layer.batch_dim)
        return None if changed is None else with_activation(output, changed)

    return hook
