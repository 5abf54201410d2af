"""Inputs and outputs of networks: which argument takes the image, and which part of the output is the logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPER = (
    "wrap the network in the factory, for example: class Classifier(nn.Module): def __init__(self): "
    "super().__init__(); self.net = make_network(); def forward(self, x): return self.net(x)[{!r}]"
)


def pass_image_by_name(module: nn.Module) -> None:
    """Let the network receive its image as a keyword argument if its first argument is not the image, in place.

    Args:
        module: Network. It is called with the image as the only argument.
    """
    name = _keyword(module)
    if name is not None:

        def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args[1:], {name: args[0], **kwargs}

        module.register_forward_pre_hook(by_name, with_kwargs=True)


def further_inputs(module: nn.Module) -> list[str]:
    """Return the names of arguments of `forward` that have no default, after the first one."""
    required = [
        parameter.name
        for parameter in _parameters(module)
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return required[1:]


def _keyword(module: nn.Module) -> str | None:
    """Return the name of the argument that takes the image; None if it is the first positional one."""
    parameters = _parameters(module)
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if any(each.name == "pixel_values" for each in named) and parameters[0].name != "pixel_values":
        return "pixel_values"
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not named or any(each.kind in (*positional, each.VAR_POSITIONAL) for each in parameters):
        return None
    return next((each.name for each in named if each.default is each.empty), named[0].name)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # TorchScript
        return []


class UnsupportedOutput(Exception):
    """The output of a network contains no logits. The message is the problem and the remedy."""


class LogitsHook:
    """Forward hook that replaces the output of a network by its logits [N, classes]."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the logits, or None if the output needs no change."""
        rows = next((len(value) for value in args if isinstance(value, Tensor)), None)
        logits = find_logits(output, rows)
        return None if logits is output else logits


def find_logits(output: Any, rows: int | None) -> Tensor:
    """Return the logits in the output of a network.

    Args:
        output: A tensor [N, classes], [N, classes, 1, 1], [N] for a single logit, or [classes] for one image; an
            object or dictionary with `logits`; or a tuple with one tensor [N, classes].
        rows: Number of images N; None if it is unknown.

    Returns:
        The logits [N, classes].

    Raises:
        UnsupportedOutput: The output contains no logits, or several tensors that may be the logits.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif isinstance(getattr(output, "logits", None), Tensor):
        output = output.logits
    elif isinstance(output, (tuple, list)):
        found = [each for each in output if isinstance(each, Tensor) and each.ndim == 2 and rows in (None, len(each))]
        if len(found) != 1:
            raise UnsupportedOutput(
                f"it returns {_described(output)}, in which {len(found) or 'no'} tensors have the shape [N, classes]; "
                f"expected one; {_WRAPPER.format(0)}"
            )
        output = found[0]
    if not isinstance(output, Tensor):
        key = next((str(key) for key in output), "out") if isinstance(output, Mapping) else "out"
        raise UnsupportedOutput(
            f"it returns {_described(output)}; expected logits [N, classes], or a dictionary with logits; "
            f"{_WRAPPER.format(key)}"
        )
    if not output.is_floating_point():
        raise UnsupportedOutput(
            f"it returns {_described(output)}; expected logits, which are floating-point numbers; return the output "
            "of the last linear layer"
        )
    if output.ndim == 2:
        return output
    if output.ndim == 4 and output.shape[2:] == (1, 1):
        return output.flatten(1)
    if output.ndim < 2 and rows in (None, 1, len(output) if output.ndim else 1):
        return output.reshape(rows or 1, -1)
    raise UnsupportedOutput(
        f"it returns {_described(output)}; expected logits [N, classes], one row for each image; return the mean over "
        "other dimensions, or the logits of one position"
    )


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)} of {str(output.dtype).removeprefix('torch.')}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with the keys {', '.join(map(str, list(output)[:10]))}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {', '.join(_described(each) for each in output[:10]) or 'nothing'}"
    return f"a {type(output).__name__}"


def two_classes(module: nn.Module, *, probabilities: bool) -> None:
    """Let a network with one output return two, in place: for the positive class (0) and for the negative class (1).

    Args:
        module: Network with the output [N, 1].
        probabilities: True if the output is the probability p of the positive class. The classes then have p and
            1 − p. Otherwise it is a logit y, and the classes have y and −y.
    """
    module.register_forward_hook(_BothProbabilities() if probabilities else _BothLogits())


class _BothLogits:
    def __call__(self, module: nn.Module, args: object, y: Tensor) -> Tensor:
        return torch.cat([y, -y], dim=1)


class _BothProbabilities:
    def __call__(self, module: nn.Module, args: object, p: Tensor) -> Tensor:
        return torch.cat([p, 1 - p], dim=1)
