"""Plain forward and backward passes at all batch sizes and memory formats. The fastest is the limit of a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arithmetic import tf32 as tf32_setting
from benchmarks.results import Chart, Findings, Result, Table
from benchmarks.timing import Timed, clock, run_on_thread
from camserve_server.engine.warmup import SIZES
from camserve_server.models.fold import fold_batch_norm

if TYPE_CHECKING:
    from benchmarks.bench_setup import Bench
    from benchmarks.subjects import Subject

# If a batch takes longer, larger batches are not measured.
SLOW_S = 20.0
COMPILED = "compiled"  # by torch.compile, from the fastest other format

# (memory format, batch size) → rows per second.
Grid = dict[tuple[str, int], float]
Network = Callable[[Tensor], Tensor]
Pass = Callable[[Network, Tensor], object]

TEXT = (
    "Rows per second of the network alone, by memory format and batch size. *Folded*: batch norms are folded into the "
    "preceding convolutions. Backward: gradient of one logit with respect to the input. The fastest forward pass is "
    "the limit that other sections refer to; they measure it again next to their own sides."
)
ARITHMETIC_TEXT = (
    "Arithmetic of the fastest forward pass, as a share of the {fastest:.0f} GFLOP/s of a single large convolution "
    "(512 to 512 channels, 3 × 3, on 28 × 28):"
)


@dataclass(eq=False)
class Limit:
    """Fastest plain forward pass of a network.

    Attributes:
        x: The image [C, H, W] in the data type of the passes.
        formats: The network by memory format. All variants have the same logits up to rounding.
        forward: Rate of each memory format and batch size.
        difference: Largest difference of the logits from those of the served model.
        tf32: True if float32 may be rounded to TF32.
    """

    x: Tensor
    formats: dict[str, Network]
    forward: Grid
    difference: float
    tf32: bool = False

    @property
    def with_gradients(self) -> tuple[str, int]:
        """Memory format and batch size of the fastest forward pass that is not compiled."""
        return max((at for at in self.forward if at[0] != COMPILED), key=lambda at: self.forward[at])

    @property
    def best(self) -> tuple[str, int]:
        """Memory format and batch size of the fastest forward pass."""
        return max(self.forward, key=lambda at: self.forward[at])

    @property
    def rate(self) -> float:
        """Rate of the fastest forward pass in rows per second."""
        return self.forward[self.best]

    def side(self, seconds: float) -> Callable[[], Timed]:
        """Return a side that runs the fastest forward pass for about this duration."""
        form, size = self.best
        rows = max(1, round(self.rate * seconds))
        return lambda: self.timed(forward, form, size, rows)

    def timed(self, pass_: Pass, form: str, size: int, rows: int) -> Timed:
        """Time a pass on a new thread, see `timed`."""
        with tf32_setting(self.tf32):
            return run_on_thread(lambda: timed(pass_, self.formats[form], self.batch(form, size), rows))

    def batch(self, form: str, size: int) -> Tensor:
        """Return a batch of copies of the image in a memory format."""
        return self.x.expand(size, -1, -1, -1).contiguous(memory_format=_memory_format(form))


def find_limit(
    made: nn.Module, served: nn.Module, x: Tensor, seconds: float, *, tf32: bool = False, compiled: bool = False
) -> Limit:
    """Measure the forward pass of the original network in all formats and batch sizes.

    Args:
        made: The original network.
        served: The network of the served model.
        x: The image [C, H, W] in the data type of the passes.
        seconds: Approximate duration of a measurement.
        tf32: True if float32 may be rounded to TF32.
        compiled: True to measure a compiled forward pass, too.
    """
    with tf32_setting(tf32):
        formats, difference = in_formats(made, served, x[None])
        limit = Limit(x, {**formats}, {}, difference, tf32)
        limit.forward = grid(limit, forward, seconds)
        if compiled:
            form, size = limit.best
            limit.formats[COMPILED] = torch.compile(formats[form], dynamic=False)
            for n in dict.fromkeys((size, max(SIZES[x.device.type]))):
                X = limit.batch(form, n)
                one = timed(forward, limit.formats[COMPILED], X, max(2 * n, round(limit.rate * seconds)))
                limit.forward[COMPILED, n] = one.rows / one.seconds
    return limit


def in_formats(module: nn.Module, served: nn.Module, x: Tensor) -> tuple[dict[str, nn.Module], float]:
    """Return the network by memory format, with and without folded batch norms, and the largest logit difference."""
    formats = {}
    folded = copy.deepcopy(module)
    names = fold_batch_norm(folded, x.to(next((weight.dtype for weight in module.parameters()), x.dtype)))
    for name, form in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
        formats[name] = copy.deepcopy(module).to(x.dtype, memory_format=form)  # type: ignore[call-overload]
        if names:
            formats[f"{name}, folded"] = copy.deepcopy(folded).to(x.dtype, memory_format=form)  # type: ignore[call-overload]
    with torch.no_grad():
        logits = served(x.contiguous(memory_format=torch.channels_last)).float()
        difference = max(float((net(x).float() - logits).abs().max()) for net in formats.values())
    return formats, difference


def _memory_format(form: str) -> torch.memory_format:
    return torch.contiguous_format if form.startswith("contiguous") else torch.channels_last


# ---- passes ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(net: Network, X: Tensor) -> Tensor:
    """Run the network without gradients."""
    return net(X)


def forward_backward(net: Network, X: Tensor) -> Tensor:
    """Return the gradient of the logit of class 0 with respect to the input."""
    X = X.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(net(X)[:, 0].sum(), X)
    return gradient


def timed(pass_: Pass, net: Network, X: Tensor, rows: int) -> Timed:
    """Run at least this number of rows in batches X, after one batch that is not timed."""
    pass_(net, X)
    batches = math.ceil(rows / len(X))
    start = clock(X.device)
    for _ in range(batches):
        pass_(net, X)
    return Timed(batches * len(X), clock(X.device) - start)


def grid(limit: Limit, pass_: Pass, seconds: float, tick: Callable[[], None] = lambda: None) -> Grid:
    """Measure all formats and batch sizes, each for about this duration and at least two batches."""
    rates: Grid = {}
    for form, net in limit.formats.items():
        if form == COMPILED:
            continue
        rate, took = 0.0, 0.0
        for size in SIZES[limit.x.device.type]:
            if took < SLOW_S:
                one = timed(pass_, net, limit.batch(form, size), max(2 * size, round(rate * seconds)))
                rate, took = one.rows / one.seconds, one.seconds * size / one.rows
                rates[form, size] = rate
            tick()
    return rates


def recorded_ascent(net: nn.Module, X: Tensor, channels: int, steps: int, branches: int = 1) -> Timed:
    """Time steps of Opti-CAM, forward and backward, on a GPU as a recorded CUDA graph. Each image counts as one row.

    Args:
        net: The network, in the data type of its arithmetic.
        X: Images [N, C, H, W].
        channels: Number of channels of the activations, which are random and have 7 × 7 positions.
        steps: Number of steps.
        branches: Number of parts of the batch that the GPU may run side by side.
    """
    run = _recorded([_ascent_step(net, part, channels) for part in X.chunk(branches)], X.device)
    run()
    start = clock(X.device)
    for _ in range(steps):
        run()
    return Timed(steps * len(X), clock(X.device) - start)


def _ascent_step(net: nn.Module, X: Tensor, channels: int) -> Callable[[], Tensor]:
    A = torch.rand(len(X), channels, 7, 7, device=X.device)
    u = torch.zeros(len(X), channels, device=X.device, requires_grad=True)
    weight = next(net.parameters())

    def step() -> Tensor:
        S = torch.einsum("nk,nkhw->nhw", u.softmax(1), A)[:, None]
        S = F.interpolate(S, X.shape[-2:], mode="bilinear")
        low, high = S.amin((2, 3), keepdim=True), S.amax((2, 3), keepdim=True)
        masked = (X * (S - low) / (high - low)).to(weight.dtype, memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(net(masked)[:, 0].float().sum(), u)
        return gradient

    return step


def _recorded(steps: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """Return a function that runs the steps, on a GPU by a replay of their kernels as parallel branches."""

    def run() -> None:
        for step in steps:
            step()

    if device.type != "cuda":
        return run
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    streams = [torch.cuda.Stream() for _ in steps]  # type: ignore[no-untyped-call]

    def run_branches() -> None:
        for step, stream in zip(steps, streams, strict=True):
            stream.wait_stream(aside)
            with torch.cuda.stream(stream):
                step()
        for stream in streams:
            aside.wait_stream(stream)

    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run_branches()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        run_branches()
    return graph.replay


# ---- the section -----------------------------------------------------------------------------------------------------


def section(bench: Bench) -> Result:
    """Measure all passes, and compare the fastest with the fastest convolution of the machine."""
    findings, arithmetic = Findings(), Findings()
    fastest = 0.0
    for subject in bench.subjects():
        fastest = fastest or subject.alike(_fastest_convolution, subject.limit.x, bench.seconds)
        backward = subject.alike(grid, subject.limit, forward_backward, bench.seconds / 4)
        for name, rates in (("forward", subject.limit.forward), ("forward + backward", backward)):
            for form in dict.fromkeys(form for form, _ in rates):
                findings.rows.append(_row(subject, name, form, rates))
        operations = run_on_thread(_operations, subject) / 1e9
        done = operations * subject.limit.rate
        arithmetic.rows.append([subject.name, f"{operations:.1f}", f"{done:.0f}", f"{done / fastest:.0%}"])
        findings.bars[subject.name] = {
            form: max(rate for (at, _), rate in subject.limit.forward.items() if at == form)
            for form in subject.limit.formats
        }
    sizes = [str(size) for size in SIZES[bench.device.type]]
    return Result(
        "Plain passes",
        TEXT,
        tables=[
            Table("", ["model", "pass", "format", *sizes, "max. logit difference"], findings.rows),
            Table(
                ARITHMETIC_TEXT.format(fastest=fastest),
                ["model", "GFLOP per row", "GFLOP/s", "share"],
                arithmetic.rows,
            ),
        ],
        charts=[Chart("Plain forward pass at the best batch size", "rows per second", findings.bars)],
    )


@torch.no_grad()
def _operations(subject: Subject) -> int:
    """Return the number of floating-point operations of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        subject.made(subject.image.tensor[None])
    return int(counter.get_total_flops())


@torch.no_grad()
def _fastest_convolution(like: Tensor, seconds: float) -> float:
    """Return the rate of a large convolution in GFLOP/s, on the device and in the data type of a tensor."""
    net = nn.Conv2d(512, 512, 3, padding=1).to(like, memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = 8 if like.device.type == "cpu" else 256
    X = torch.randn(rows, 512, 28, 28).to(like).contiguous(memory_format=torch.channels_last)
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
