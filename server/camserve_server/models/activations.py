"""The activation in the output of a module, which is a tensor or the first element of a tuple."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["activation_of", "with_activation"]


def activation_of(output: object) -> Tensor | None:
    """Return the activation in the output of a module, or None if there is none.

    Blocks of many transformers return a tuple of their tokens and, for example, attention weights or None. The elements
    of a list are taken for branches, none of which is the activation.
    """
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def with_activation(output: Any, activation: Tensor) -> Any:
    """Return the output of a module with another activation.

    Args:
        output: A tensor, or a tuple whose first element is one.
        activation: The tensor that replaces it.
    """
    if not isinstance(output, tuple):
        return activation
    elements = (activation, *output[1:])
    return type(output)(*elements) if hasattr(output, "_fields") else elements
