"""The function that turns the output of a network into probabilities, and its removal from the end of a network."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from camserve_server.errors import ConfigError

Head = Literal["softmax", "sigmoid", "probabilities"]
Final = Literal["softmax", "sigmoid"]

_FINAL: dict[Any, Final] = {
    torch.softmax: "softmax",
    F.softmax: "softmax",
    Tensor.softmax: "softmax",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    Tensor.sigmoid_: "sigmoid",
    torch.special.expit: "sigmoid",
}
# Fewest values in [0, 1] that are a reason for a warning. That logits lie there by chance becomes unlikely.
_MANY_VALUES = 8


@dataclass(eq=False)
class FinalCalls(TorchFunctionMode):
    """Context that counts the calls of softmax and sigmoid in a forward pass, and keeps the last one.

    Attributes:
        count: Number of calls.
        kind: Function of the last call.
        output: Output of the last call.
    """

    count: int = 0
    kind: Final | None = None
    output: Tensor | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, kinds: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        result = func(*args, **(kwargs or {}))
        if func in _FINAL:
            self.count += 1
            self.kind, self.output = _FINAL[func], result.clone()
        return result

    def made(self, y: Tensor) -> bool:
        """Return True if the last call computed the output y of the network."""
        return self.output is not None and torch.equal(self.output.reshape(-1), y.reshape(-1))

    def has_size_of(self, y: Tensor) -> bool:
        """Return True if the output of the last call has as many values as y."""
        return self.output is not None and self.output.numel() == y.numel()


class _Skip(TorchFunctionMode):
    """Context in which one call of softmax or sigmoid returns its input."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def __torch_function__(self, func: Any, kinds: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in _FINAL:
            self._left -= 1
            if self._left == 0:
                return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def _forward_without_final(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _Skip(self.__dict__["_camserve_final_call"]):
        return type(self).forward(self, *args, **kwargs)


@dataclass(eq=False)
class ChosenHead:
    """Head of a network, and sentences about the choice."""

    head: Head
    warnings: list[str] = field(default_factory=list)


def choose_head(
    module: nn.Module,
    run: Callable[[], Tensor],
    y: Tensor,
    calls: FinalCalls,
    modules: Sequence[tuple[str, nn.Module]],
    configured: Head | None,
    where: str,
) -> ChosenHead:
    """Choose the head, and remove a softmax or sigmoid from the end of the network, in place.

    Args:
        module: Network.
        run: Function that runs the network on the first images of `y`.
        y: Outputs [N, classes] of the network for different images.
        calls: Calls of softmax and sigmoid in a forward pass on the first image.
        modules: Modules that ran in this pass, in the order of their ends.
        configured: Head in the configuration.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The configured head contradicts the network.
    """
    classes = y.shape[1]
    unit = bool(((y >= 0) & (y <= 1)).all()) and bool(y.any())  # all outputs of some untrained networks are 0
    sums = unit and classes > 1 and bool(((y.sum(dim=1) - 1).abs() < 1e-3).all())
    if configured == "probabilities":
        if not unit:
            raise ConfigError(
                f"{where}.head: the network returns values from {float(y.min()):.3g} to {float(y.max()):.3g}, which "
                'are not probabilities; set "softmax" or "sigmoid"'
            )
        return ChosenHead("probabilities")
    kind = calls.kind if calls.made(y[:1]) else None
    default: Head = configured or ("sigmoid" if classes == 1 else "softmax")
    if kind is not None and (kind == "sigmoid" or sums):
        if configured not in (None, kind):
            raise ConfigError(
                f'{where}.head: the network ends in a {kind}, but head is "{configured}"; set "{kind}", or '
                '"probabilities" to explain the probabilities'
            )
        if _remove(module, kind, calls.count, modules, run, y[:1]):
            warning = (
                f"the network ends in a {kind}; camserve removed it, because methods explain logits; set head = "
                f'"{kind}" to confirm, or "probabilities" to explain the probabilities'
            )
            return ChosenHead(kind, [] if configured else [warning])
    if sums or (kind is not None and unit):
        what = "sum to 1" if sums else "are the output of a sigmoid"
        if configured is not None:
            raise ConfigError(
                f"{where}.head: the network returns probabilities: its outputs {what}; return logits from the factory, "
                'or set head = "probabilities"'
            )
        return ChosenHead(
            "probabilities",
            [
                f"the network returns probabilities: its outputs {what}; methods explain them instead of logits; set "
                'head = "probabilities" to confirm, or return logits from the factory'
            ],
        )
    if unit and calls.has_size_of(y[:1]) and configured is None and classes > 1:
        return ChosenHead(
            "probabilities",
            [
                f"the outputs of the network lie in [0, 1] and come from a {calls.kind}; they are used as "
                'probabilities; set head = "probabilities" to confirm, or "softmax" or "sigmoid" if they are logits'
            ],
        )
    if unit and y.numel() >= _MANY_VALUES and configured is None:
        return ChosenHead(
            default,
            [
                f"the outputs of the network lie in [0, 1]; they are used as logits with head = {default!r}; set head "
                '= "probabilities" if they are probabilities'
            ],
        )
    return ChosenHead(default)


def _remove(
    module: nn.Module,
    kind: Final,
    number: int,
    modules: Sequence[tuple[str, nn.Module]],
    run: Callable[[], Tensor],
    y: Tensor,
) -> bool:
    """Remove the last softmax or sigmoid of the network, in place. Return False if that does not give the logits."""

    def gives_logits() -> bool:
        try:
            z = run()
        except Exception:  # the code of a network can raise any exception
            return False
        p = z.sigmoid() if kind == "sigmoid" else z.softmax(dim=1)
        return torch.allclose(p, y, rtol=0, atol=1e-5) and not torch.equal(z, y)

    final = {"softmax": (nn.Softmax, nn.Softmax2d), "sigmoid": (nn.Sigmoid,)}[kind]
    ends = [(name, each) for name, each in modules if type(each) in final]
    if ends and ends[-1][0] and sum(each is ends[-1][1] for _, each in ends) == 1:
        name, old = ends[-1]
        parent, _, last = name.rpartition(".")
        module.get_submodule(parent).add_module(last, nn.Identity())
        if gives_logits():
            return True
        module.get_submodule(parent).add_module(last, old)
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    module.__dict__["_camserve_final_call"] = number
    module.forward = types.MethodType(_forward_without_final, module)
    if gives_logits():
        return True
    del module.__dict__["forward"]
    return False
