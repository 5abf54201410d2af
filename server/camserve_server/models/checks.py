"""Checks of a network at load: it must return logits that depend on the image alone, whatever the batch contains."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from camserve_server.config import ModelConfig
from camserve_server.errors import OF_WHOLE_BATCH, ConfigError, describe
from camserve_server.models.features import Ran, check_classifier
from camserve_server.models.heads import FinalCalls, Head, choose_head
from camserve_server.models.layers import Layer, modules_with_hooks
from camserve_server.models.outputs import LogitsHook, UnsupportedOutput, further_inputs, pass_image_by_name
from camserve_server.models.sources import input_channels

# Largest difference of an output alone and in a batch: a share of the difference between images, or of the largest
# output, because other batch sizes round differently.
_SHARE_OF_SPREAD, _SHARE_OF_OUTPUT = 1e-3, 1e-5
_REPEATS = 8  # passes that compare the outputs of a network that draws random numbers


@dataclass(eq=False)
class Prepared:
    """Results of the checks of a network, which its runs must respect.

    Attributes:
        head: Function that turns its output into probabilities.
        channels_last: True if weights and batches have the memory format "channels last".
        one_row: True if a batch must contain one row only.
        warnings: Sentences for the operator.
    """

    head: Head
    channels_last: bool
    one_row: bool
    warnings: list[str] = field(default_factory=list)


def adapt(module: nn.Module) -> None:
    """Let a network take its image as the only argument, and return logits [N, classes], in place.

    Args:
        module: Network.
    """
    pass_image_by_name(module)
    module.register_forward_hook(LogitsHook())


def prepare(module: nn.Module, example: Tensor, config: ModelConfig, where: str) -> Prepared:
    """Find out how a network must be run, and remove a softmax or sigmoid from its end, in place.

    The network runs twice: on the example alone, and on a batch of another image, the example, zeros, and the example
    again.

    Args:
        module: Network in evaluation mode, on its device, after `adapt`.
        example: Input [1, C, H, W].
        config: Configuration of the model.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The network cannot be served.
    """
    ran: list[Ran] = []
    calls = FinalCalls()
    before = _random_state(example.device)
    try:
        with _recorded(module, ran), calls:
            y, channels_last = _run_somehow(module, example, ran)
    except torch.OutOfMemoryError:  # the network is not the reason
        raise
    except Exception as error:  # the code of a network can raise any exception
        raise ConfigError(f"{where}.{_reason(error, module, example, config)}") from error
    if bool(y.isnan().any()):
        raise ConfigError(
            f"{where}.source: the network returns NaN for normal noise; expected logits; correct the weights"
        )
    drew = _random_state(example.device) != before
    if drew and any(not torch.equal(_run(module, example), y) for _ in range(_REPEATS)):
        raise ConfigError(
            f"{where}.source: the network returns another output at each call, because it draws random numbers in "
            "evaluation mode; switch this off, for example with F.dropout(x, training=self.training)"
        )
    other = 3 * example.flip(-1) + 1
    images = torch.cat([other, example, torch.zeros_like(example), example])
    together, channels_last, problem = _in_company(module, images, y, channels_last)
    if problem and not _close(_run(module, example), y, y):
        raise ConfigError(
            f"{where}.source: the network returns another output at each call for the same image; expected an output "
            "that depends on the image alone; let forward() keep no state"
        )
    warnings: list[str] = []
    if problem:
        if config.batch_size is not None and config.batch_size > 1:
            raise ConfigError(f"{where}.batch_size: {problem}; set batch_size = 1 or leave the key out")
        warnings.append(f"{problem}; camserve runs it with batch size 1")
        together = torch.cat([_run(module, image[None]) for image in images])
    classes = y.shape[1]
    if config.classes not in (None, classes):
        raise ConfigError(f"{where}.classes: the network has {classes} classes, not {config.classes}; correct the key")
    if config.classes is None:
        check_classifier(module, ran, together, where)
    modules = [(each.name, each.module) for each in ran]
    outputs = torch.cat([y, together])

    def run(scale: float = 1) -> Tensor:
        return _run(module, scale * example)

    chosen = choose_head(module, run, outputs, calls, modules, config.head, where)
    return Prepared(chosen.head, channels_last, bool(problem), [*warnings, *chosen.warnings])


def require_hooks(module: nn.Module, example: Tensor, layers: Sequence[Layer], where: str) -> None:
    """Check that the hooks of all layers run.

    Args:
        module: Network as it is served.
        example: Input [1, C, H, W].
        layers: Layers that requests can name.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: A module does not run its hooks.
    """
    ran: list[Ran] = []
    with _recorded(module, ran):
        _run(module, example)
    names = {each.name for each in ran}
    silent = [layer.name for layer in layers if layer.module not in names]
    if silent:
        raise ConfigError(
            f"{where}.source: the modules of {len(silent)} layers do not run their hooks, among them {silent[0]}; "
            "return a network from the factory whose parts are called as modules, without torch.compile"
        )


# ---- forward passes --------------------------------------------------------------------------------------------------


def _run(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(images)
        return y.detach()


@contextmanager
def _recorded(module: nn.Module, ran: list[Ran]) -> Iterator[None]:
    """Record the modules that run, in the order of their ends."""

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, output: ran.append(Ran.of(name, module, output))

    handles = [each.register_forward_hook(record(name)) for name, each in modules_with_hooks(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_somehow(module: nn.Module, example: Tensor, ran: list[Ran]) -> tuple[Tensor, bool]:
    """Return the output, and True if the network accepts the memory format "channels last".

    `view` after a convolution needs contiguous tensors, and some networks register hooks on gradients.
    """
    set_memory_format(module, channels_last=True)
    try:
        return _run(module, example.contiguous(memory_format=torch.channels_last)), True
    except (UnsupportedOutput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = error
    ran.clear()
    if "register a hook" in str(first) and "forward" not in vars(module):
        module.forward = types.MethodType(_forward_with_gradients, module)
    set_memory_format(module, channels_last=False)
    try:
        return _run(module, example), False
    except (UnsupportedOutput, torch.OutOfMemoryError):
        raise
    except Exception:
        set_memory_format(module, channels_last=True)
        raise first from None


def _forward_with_gradients(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run `forward` with a gradient of its input, which networks need that register hooks on gradients."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return type(self).forward(self, x, *args, **kwargs)


def set_memory_format(module: nn.Module, *, channels_last: bool) -> None:
    """Convert all tensors of four dimensions to a memory format, in place.

    Args:
        module: Network.
        channels_last: True for "channels last", False for the contiguous format.
    """

    def convert(value: Tensor) -> Tensor:
        if value.ndim != 4 or value.is_quantized:
            return value
        if channels_last:
            return value.to(memory_format=torch.channels_last)
        # contiguous() would keep the strides of 1×1 kernels, which select the memory format of a convolution's output.
        return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)

    module._apply(convert)  # type: ignore[no-untyped-call]


def _in_company(module: nn.Module, images: Tensor, y: Tensor, channels_last: bool) -> tuple[Tensor, bool, str]:
    """Run the network on a batch whose second and last image gave the output y alone.

    Returns:
        The outputs; True if the memory format is "channels last"; and the problem of batches, if there is one.
    """
    for last in (True, False) if channels_last else (False,):
        if last != channels_last:
            set_memory_format(module, channels_last=False)
        try:
            form = torch.channels_last if last else torch.contiguous_format
            together = _run(module, images.contiguous(memory_format=form))
        except (*OF_WHOLE_BATCH, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the code of a network can raise any exception
            problem = f"the network takes only one image at a time ({describe(error)})"
            continue
        same = together.shape == (len(images), y.shape[1]) and _close(together[[1, -1]], y, together)
        return together, last, "" if same else "the output of the network for an image depends on the rest of the batch"
    if channels_last:
        set_memory_format(module, channels_last=True)
    return y, channels_last, problem


def _close(a: Tensor, b: Tensor, outputs: Tensor) -> bool:
    spread = (outputs - outputs[:1]).abs().max()
    tolerance = max(_SHARE_OF_SPREAD * float(spread), _SHARE_OF_OUTPUT * float(b.abs().max()))
    return torch.allclose(a, b.expand_as(a), rtol=0, atol=tolerance, equal_nan=True)


def _random_state(device: torch.device) -> tuple[object, ...]:
    """Return the states of the random generators that code of a network on the device may use."""
    numbers = np.random.get_state()
    states = [torch.get_rng_state().numpy().tobytes(), random.getstate(), numbers[1].tobytes(), numbers[2]]  # type: ignore[index]
    if device.type == "cuda":  # each GPU has a generator of its own
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(states)


# ---- messages --------------------------------------------------------------------------------------------------------


def _reason(error: Exception, module: nn.Module, example: Tensor, config: ModelConfig) -> str:
    """Return the key, the reason and the remedy of a failed forward pass."""
    if isinstance(error, UnsupportedOutput):
        return f"source: the network is not a classifier that camserve can explain: {error}"
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    first = next((n for each in module.modules() for n, kind in kinds.items() if isinstance(each, kind)), 2)
    if first != 2:
        return f"source: the network has {first}-D convolutions; only networks of 2-D images [N, C, H, W] are supported"
    missing = further_inputs(module)
    if missing and isinstance(error, TypeError):
        return (
            f"source: forward() needs the further inputs {', '.join(missing)}, but camserve passes only the image; "
            "give them defaults, or wrap the network in the factory"
        )
    taken, given = input_channels(module), len(config.mean)
    if taken is not None and 1 <= taken <= 16 and taken != given:
        return (
            f"mean: the network's input has {'one channel' if taken == 1 else f'{taken} channels'}, but mean has "
            f"{given} numbers; set mean and std to one number for each channel"
        )
    return (
        f"input_size: the network does not run on an input of shape {[*example.shape]}: {describe(error)}; set "
        "input_size, mean and std to the size and channels that the network expects"
    )
