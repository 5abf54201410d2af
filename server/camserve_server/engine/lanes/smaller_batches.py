"""Batches with fewer rows than their lane's size that give the same bits.

With few padding rows, a single request takes a fraction of the time. Nearly all kernels compute a row in the same way
in batches of several sizes. The exception is the linear layer at the end of a network, for which libraries choose a
kernel by the number of rows. It costs little, so it always runs with as many rows as in a full batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from camserve_server.engine.lanes.batch import padded_batch
from camserve_server.engine.lanes.hooks import hooks
from camserve_server.models.model import Model


def batch_size_for(sizes: tuple[int, ...], full: int, rows: int) -> int:
    """Return the smallest batch size that holds the rows and gives the same bits as a full batch.

    Args:
        sizes: Sizes that give the same bits, ascending (`Model.equal_sizes`).
        full: Number of rows of a full batch.
        rows: Number of rows to run.
    """
    if not sizes or sizes[-1] != full:  # the sizes were compared with another one
        return full
    return next((size for size in sizes if size >= rows), full)


@contextmanager
def full_linear_layers(model: Model, size: int, full: int) -> Iterator[None]:
    """Let the linear layers whose input is one vector per image run with the rows of a full batch.

    Args:
        model: Model whose network runs inside the context.
        size: Number of rows of the batch.
        full: Number of rows of a full batch.
    """
    handles = []
    if size < full:
        for name in model.linear_layers:
            layer = model.module.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(_padding_to(size, full)))
            handles.append(layer.register_forward_hook(_cutting_to(size)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _padding_to(size: int, full: int) -> Any:
    def pad(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = args
        return (torch.cat([x, x.new_zeros(full - size, *x.shape[1:])]), *others)

    return pad


def _cutting_to(size: int) -> Any:
    def cut(layer: nn.Module, args: object, output: Tensor) -> Tensor:
        return output[:size]

    return cut


def compare_sizes(model: Model, full: int, *, gradients: bool) -> Generator[None, None, tuple[int, ...]]:
    """Find the sizes below `full` whose batches give the same bits, in descending order until one differs.

    The comparison includes the logits, the outputs of the default layers and, with `gradients`, the gradients of a
    logit for these layers and for the input. Rows have other places in the small batch than in the full one.

    Args:
        model: Model on a CPU. Kernels of GPUs split their work by the whole batch.
        full: Number of rows of a full batch.
        gradients: Compare the gradients, too.

    Yields:
        None, before each batch.

    Returns:
        The sizes that give the same bits, ascending, and `full` at the end.
    """
    shape = (full, model.preprocessing.channels, *model.preprocessing.size)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    yield
    expected = _results(model, rows, full, gradients)
    sizes, size = [full], full // 2
    while size and expected:
        yield
        found = _results(model, rows[-size:], full, gradients)
        if len(found) != len(expected) or not all(map(torch.equal, found, (b[-size:] for b in expected))):
            break
        sizes.append(size)
        size //= 2
    return tuple(sizes[::-1])


def find_linear_layers(model: Model) -> tuple[str, ...]:
    """Return the names of the linear layers whose input is one vector per image; none if the network fails."""
    names: list[str] = []
    rows = 3

    def record(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if len(args) == 1 and args[0].ndim == 2 and len(args[0]) == rows:
                names.append(name)

        return hook

    linear = [(name, each) for name, each in model.module.named_modules() if isinstance(each, nn.Linear)]
    handles = [each.register_forward_pre_hook(record(name)) for name, each in linear]
    shape = (rows, model.preprocessing.channels, *model.preprocessing.size)
    try:
        with torch.no_grad():
            model.module(padded_batch(model, [torch.zeros(shape, device=model.device)], rows))
    except Exception:  # the code of a network can raise any exception, for example for this number of rows
        return ()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(dict.fromkeys(names))


def _results(model: Model, rows: Tensor, full: int, gradients: bool) -> list[Tensor]:
    """Run rows in a batch of their number. Return the results for each row; none if the network fails."""
    outputs: list[Tensor] = []
    kept: list[Tensor] = []

    def record(layer: str, output: Tensor) -> Tensor | None:
        outputs.append(output)
        kept.append(output.detach().clone())
        return output.clone() if gradients else None  # a later module may work in place on it

    layers = dict.fromkeys(each.name for each in (*model.layers, model.layer) if each)
    X = padded_batch(model, [rows], len(rows))
    try:
        with (
            full_linear_layers(model, len(rows), full),
            hooks(model, layers, record),
            torch.set_grad_enabled(gradients),
        ):
            y: Tensor = model.module(X.requires_grad_(gradients))
            if gradients:
                inputs = [X, *(A for A in outputs if A.requires_grad)]
                kept += [g for g in torch.autograd.grad(y[:, 0].sum(), inputs, allow_unused=True) if g is not None]
    except Exception:  # the code of a network can raise any exception, for example for this number of rows
        return []
    return [y.detach(), *kept]
