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
    run: Callable[[float], Tensor],
    y: Tensor,
    calls: FinalCalls,
    modules: Sequence[tuple[str, nn.Module]],
    configured: Head | None,
    where: str,
) -> ChosenHead:
    """Choose the head, and remove a softmax or sigmoid from the end of the network, in place.

    Args:
        module: Network.
        run: Function that runs the network on the first image of `y`, multiplied by a number.
        y: Outputs [N, classes] of the network for different images.
        calls: Calls of softmax and sigmoid in a forward pass on the first image.
        modules: Modules that ran in this pass, in the order of their ends.
        configured: Head in the configuration.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The configured head contradicts the network.
    """
    classes = y.shape[1]
    unit = _in_unit_interval(y)
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
    # Logits leave [0, 1] for images of large or negative values.
    if unit and all(_in_unit_interval(run(scale)) for scale in (-1000, -30, 30, 1000)):
        warning = (
            'the outputs of the network lie in [0, 1] for all images; set head = "probabilities" if they are '
            "probabilities"
        )
        if configured is not None:
            return ChosenHead(configured, [warning])
        return ChosenHead("probabilities", [f"{warning}, as camserve assumes, or another head if they are logits"])
    return ChosenHead(default)


def _in_unit_interval(y: Tensor) -> bool:
    # All outputs of some untrained networks are 0.
    return bool(((y >= 0) & (y <= 1)).all()) and bool(y.any())


def _remove(
    module: nn.Module,
    kind: Final,
    number: int,
    modules: Sequence[tuple[str, nn.Module]],
    run: Callable[[float], Tensor],
    y: Tensor,
) -> bool:
    """Remove the last softmax or sigmoid of the network, in place. Return False if that does not give the logits."""

    def gives_logits() -> bool:
        try:
            z = run(1)
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
    del module.__dict__["forward"], module.__dict__["_camserve_final_call"]
    return False
