"""The limit: the plain forward pass, and forward and backward, at the best batch size and memory format."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import Chart, Findings, Result, Table
from benchmarks.timing import Timed, alone, clock
from camserve_server.engine.warmup import SIZES
from camserve_server.models.fold import fold_batch_norm

if TYPE_CHECKING:
    from benchmarks.subjects import Subject
    from benchmarks.work import Bench

SLOW_S = 20.0  # a batch that takes longer is not tried in a larger size

# Rows a second: (memory format, batch size) → rate.
Grid = dict[tuple[str, int], float]
Network = Callable[[Tensor], Tensor]
Pass = Callable[[Network, Tensor], object]


@dataclass(eq=False)
class Limit:
    """Networks of the same logits in several memory formats, and the best of them."""

    x: Tensor
    formats: dict[str, nn.Module]
    forward: Grid
    difference: float

    @property
    def best(self) -> tuple[str, int]:
        """Memory format and batch size of the fastest plain forward pass."""
        return max(self.forward, key=lambda at: self.forward[at])

    @property
    def rate(self) -> float:
        """Rows a second there, when it was looked for."""
        return self.forward[self.best]

    def side(self, seconds: float) -> Callable[[], Timed]:
        """The plain forward pass at its best, for about so long."""
        form, size = self.best
        rows = max(1, round(self.rate * seconds))
        return lambda: alone(lambda: timed(forward, self.formats[form], self.batch(form, size), rows))

    def batch(self, form: str, size: int) -> Tensor:
        """The image, repeated, in that memory format."""
        return self.x.expand(size, -1, -1, -1).contiguous(memory_format=_memory_format(form))


def find_limit(made: nn.Module, served: nn.Module, x: Tensor, seconds: float) -> Limit:
    """Tries all formats and sizes of the network as it is made, which is compared with the one that is served."""
    formats, difference = in_formats(made, served, x[None])
    limit = Limit(x, formats, {}, difference)
    limit.forward = grid(limit, forward, seconds)
    return limit


def in_formats(module: nn.Module, served: nn.Module, x: Tensor) -> tuple[dict[str, nn.Module], float]:
    """The network by memory format, its batch norms folded or not, and how far the logits are from those served."""
    formats = {}
    folded = copy.deepcopy(module)
    names = fold_batch_norm(folded, x)
    for name, form in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
        formats[name] = copy.deepcopy(module).to(memory_format=form)  # type: ignore[call-overload]
        if names:
            formats[f"{name}, folded"] = copy.deepcopy(folded).to(memory_format=form)  # type: ignore[call-overload]
    with torch.no_grad():
        logits = served(x.contiguous(memory_format=torch.channels_last))
        difference = max(float((net(x) - logits).abs().max()) for net in formats.values())
    return formats, difference


def _memory_format(form: str) -> torch.memory_format:
    return torch.channels_last if form.startswith("channels-last") else torch.contiguous_format


# ---- passes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(net: Network, X: Tensor) -> Tensor:
    """Nothing but the network."""
    return net(X)


def forward_backward(net: Network, X: Tensor) -> Tensor:
    """And the gradient of one class's logit in the input; the parameters need none."""
    X = X.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(net(X)[:, 0].sum(), X)
    return gradient


def timed(pass_: Pass, net: Network, X: Tensor, rows: int) -> Timed:
    """At least so many rows, in batches of X; one before is not counted."""
    pass_(net, X)
    batches = math.ceil(rows / len(X))
    start = clock(X.device)
    for _ in range(batches):
        pass_(net, X)
    return Timed(batches * len(X), clock(X.device) - start)


def grid(limit: Limit, pass_: Pass, seconds: float, tick: Callable[[], None] = lambda: None) -> Grid:
    """Rates of all formats and sizes, each for about so long, at least two batches."""
    rates: Grid = {}
    for form, net in limit.formats.items():
        rate, took = 0.0, 0.0
        for size in SIZES[limit.x.device.type]:
            if took < SLOW_S:
                one = timed(pass_, net, limit.batch(form, size), max(2 * size, round(rate * seconds)))
                rate, took = one.rows / one.seconds, one.seconds * size / one.rows
                rates[form, size] = rate
            tick()
    return rates


# ---- the section -----------------------------------------------------------------------------------------------------


def section(bench: Bench) -> Result:
    """Table 1: every network, pass, format and batch size; table 2: how near that is to what the machine can do."""
    found, arithmetic = Findings(), Findings()
    fastest = alone(_fastest_convolution, bench.device, bench.seconds)
    for subject in bench.subjects():
        backward = alone(grid, subject.limit, forward_backward, bench.seconds / 4)
        for name, rates in (("forward", subject.limit.forward), ("forward + backward", backward)):
            for form in subject.limit.formats:
                found.rows.append(_row(subject, name, form, rates))
        operations = alone(_operations, subject) / 1e9
        done = operations * subject.limit.rate
        arithmetic.rows.append([subject.name, f"{operations:.1f}", f"{done:.0f}", f"{done / fastest:.0%}"])
        found.bars[subject.name] = {
            form: max(rate for (at, _), rate in subject.limit.forward.items() if at == form)
            for form in subject.limit.formats
        }
    sizes = [str(size) for size in SIZES[bench.device.type]]
    return Result(
        "The limit: plain passes",
        "Rows a second of nothing but the network on a ready-made batch, by memory format and batch size; `folded` has "
        "its batch norms folded into the convolutions before them. Backward is the gradient of one class's logit in "
        "the input. The fastest forward pass of a network is the limit that everything below is a share of; where a "
        "share is given, it was measured anew in turn with what it is a share of.",
        tables=[
            Table("", ["model", "pass", "format", *sizes, "logits differ by"], found.rows),
            Table(
                "How much is left to be won in the networks themselves: billions of operations (an addition or a "
                "multiplication) a row, those a second of the fastest forward pass, and what share that is of the "
                f"{fastest:.0f} a second of a single convolution that suits the machine well (512 channels to 512, "
                "3 × 3, on 28 × 28).",
                ["model", "a row", "a second", "share"],
                arithmetic.rows,
            ),
        ],
        charts=[Chart("Plain forward pass at the best batch size", "rows a second", found.bars)],
    )


@torch.no_grad()
def _operations(subject: Subject) -> int:
    """Of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        subject.made(subject.image.tensor[None])
    return int(counter.get_total_flops())


@torch.no_grad()
def _fastest_convolution(device: torch.device, seconds: float) -> float:
    """Billions of operations a second."""
    net = nn.Conv2d(512, 512, 3, padding=1).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    X = torch.randn(8, 512, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    once = timed(forward, net, X, 1)
    many = timed(forward, net, X, max(1, round(once.rows * seconds / once.seconds)))
    return 2 * 9 * 512 * 512 * 28 * 28 * many.rows / many.seconds / 1e9


def _row(subject: Subject, name: str, form: str, rates: Grid) -> list[str]:
    best = max(rates.values())
    cells = []
    for size in SIZES[subject.model.device.type]:
        rate = rates.get((form, size))
        cells.append("–" if rate is None else f"**{rate:.1f}**" if rate == best else f"{rate:.1f}")
    return [subject.name, name, form, *cells, f"{subject.limit.difference:.0e}"]
