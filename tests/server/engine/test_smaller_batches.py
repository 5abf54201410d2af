"""Small batches give the bits of full ones, and networks for which they do not run in full batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camserve_server.engine.lanes.smaller_batches import batch_size_for, compare_sizes, find_linear_layers
from camserve_server.engine.warmup import warm_up
from camserve_server.models.model import Model
from tests import nets
from tests.support import TIMEOUT_S, as_model, call, noise, running, submit

X = noise(3, 32, 32)


class BySize(nn.Module):
    """Network whose arithmetic depends on the number of rows, as with a library that chooses kernels by it."""

    def __init__(self, smallest: int, gradient_only: bool = False) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()
        self.smallest, self.gradient_only = smallest, gradient_only

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < self.smallest and (x.requires_grad or not self.gradient_only):
            x = x * (1 + 1e-6)
        return self.net(x)  # type: ignore[no-any-return]


def sizes_of(model: Model, full: int, *, gradients: bool = False) -> tuple[int, ...]:
    model.linear_layers = find_linear_layers(model)
    steps = compare_sizes(model, full, gradients=gradients)
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


@pytest.mark.parametrize(("smallest", "sizes"), [(1, (1, 2, 4, 8)), (4, (4, 8)), (5, (8,)), (100, (1, 2, 4, 8))])
def test_sizes_end_at_the_first_that_gives_other_bits(smallest: int, sizes: tuple[int, ...]) -> None:
    assert sizes_of(as_model(BySize(smallest)), 8) == sizes


class Picky(nn.Module):
    """Network that drops the dimension of the batch for one row, or fails for fewer rows than `least`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()
        self.least = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < self.least:
            raise ValueError("too few rows")
        y: Tensor = self.net(x)
        return y.squeeze(0) if self.least else y


@pytest.mark.parametrize(("least", "sizes"), [(1, (2, 4, 8)), (3, (4, 8)), (9, (8,))])
def test_sizes_for_which_the_network_fails_are_not_used(least: int, sizes: tuple[int, ...]) -> None:
    network = Picky()
    model = as_model(network)
    network.least = least
    assert sizes_of(model, 8) == sizes


def test_gradients_are_compared_for_lanes_that_compute_them() -> None:
    model = as_model(BySize(4, gradient_only=True))
    assert sizes_of(model, 8) == (1, 2, 4, 8)
    assert sizes_of(model, 8, gradients=True) == (4, 8)


def test_smallest_size_that_holds_the_rows() -> None:
    assert [batch_size_for((2, 4, 16), 16, rows) for rows in (1, 2, 3, 5, 16)] == [2, 2, 4, 16, 16]
    assert batch_size_for((), 16, 1) == 16
    assert batch_size_for((2, 4, 16), 8, 1) == 8, "the sizes have been compared with 16 and not with 8"


class Head(nn.Module):
    """Network with linear layers for vectors of images and of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.positions(x.permute(0, 2, 3, 1)).mean((1, 2))).relu())  # type: ignore[no-any-return]


def test_linear_layers_of_vectors_run_with_the_rows_of_a_full_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_model(Head())
    warm_up(model, 8)
    assert model.linear_layers == ("first", "last")
    last, rows = model.module.get_submodule("last"), list[int]()
    compute = last.forward

    def counting(x: Tensor) -> Tensor:
        rows.append(len(x))
        return compute(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(last, "forward", counting)
    with running() as engine:
        submit(engine, model, X, call(model, "input-x-gradient")).future.result(TIMEOUT_S)
        assert engine.counters.padding < 14, "two batches with one row of eight each"
    assert set(rows) == {8}


@pytest.mark.parametrize("network", [nets.tiny_cnn, lambda: BySize(3), Head])
@pytest.mark.parametrize("method", ["input-x-gradient", "rise", "opti-cam", "grad-cam", "ablation-cam"])
def test_maps_do_not_depend_on_the_size_of_the_batches(network: Callable[[], nn.Module], method: str) -> None:
    """A request alone gives the same bits in small batches, in full ones, and beside other requests."""
    model = as_model(network())
    warm_up(model, 8)
    if method in ("opti-cam", "grad-cam", "ablation-cam") and model.layer is None:
        pytest.skip("the network has no layer")
    parameters: dict[str, Any] = {"rise": {"masks": 13}, "opti-cam": {"steps": 3}}.get(method, {})
    equal = {**model.equal_sizes}
    with running() as engine:

        def maps(others: int = 0) -> Tensor:
            jobs = [submit(engine, model, X, call(model, method, **parameters), [1]) for _ in range(1 + others)]
            results = [job.future.result(TIMEOUT_S).maps for job in jobs]
            return torch.stack(results)

        padding = [engine.counters.padding]
        small = maps()
        padding.append(engine.counters.padding)
        together = maps(others=4)
        padding.append(engine.counters.padding)
        model.equal_sizes.clear()
        full = maps()
        padding.append(engine.counters.padding)
    assert all(torch.equal(each, small[0]) for each in (*together, *full))
    if equal["forward"] != (8,) or equal["gradient"] != (8,):
        assert padding[1] - padding[0] < padding[3] - padding[2], "small batches have fewer padding rows"
