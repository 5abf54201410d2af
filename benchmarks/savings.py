"""Effect of each exact optimisation: of the network, step by step, and of work that is avoided."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import separate_process
from benchmarks.bench_setup import Bench
from benchmarks.limit import Network, forward, forward_backward, timed
from benchmarks.peers import LOOP as LOOP_BATCH
from benchmarks.results import Chart, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import Rates, Side, Timed, clock, run_on_thread
from camserve_server.engine.lanes.ascend import adam_ascent_step
from camserve_server.engine.lanes.fast_forward import build_fast_forward
from camserve_server.maps.channels import select_channels
from camserve_server.models.fold import fold_batch_norm, fold_padding
from camserve_server.rows import Masked

TEXT = (
    "These optimisations change maps only by rounding; the tests allow 1e-5. The first table adds the optimisations "
    "of the network step by step. It starts like the official loops (contiguous, batches of {batch}, default "
    "allocator, separate process). `torch.compile` is an option of the server that is off by default on CPUs. The "
    "second table shows avoided work for the photograph."
)


def section(bench: Bench) -> Result:
    """Measure the optimisations of the network, then the avoided work."""
    steps, avoided = Findings(), Findings()
    for subject in bench.subjects():
        _steps(bench, steps, subject)
        _rows(avoided, subject)
        _work(bench, avoided, subject)
    return Result(
        "Exact optimisations",
        TEXT.format(batch=LOOP_BATCH),
        tables=[
            Table(
                "Plain forward pass in rows per second, median of the rounds:",
                ["model", "step", "batch", "rows/s", "speedup", "total", "max. logit difference"],
                steps.rows,
            ),
            Table("Avoided work:", ["model", "optimisation", "measured", "without", "with", "speedup"], avoided.rows),
        ],
        charts=[Chart("Plain forward pass, step by step", "rows per second", steps.bars)],
    )


# ---- the network, step by step ---------------------------------------------------------------------------------------


def _steps(bench: Bench, findings: Findings, subject: Subject) -> None:
    x, size = subject.image.tensor, subject.model.batch_sizes["forward"]
    nets = run_on_thread(_nets, subject, size)
    rows = max(2 * LOOP_BATCH, round(subject.limit.rate * bench.seconds))

    def plain(net: Network, batch: int, form: torch.memory_format) -> Timed:
        X = x.expand(batch, -1, -1, -1).contiguous(memory_format=form)
        return run_on_thread(partial(timed, forward, net, X, rows))

    sides: dict[str, Side] = {
        "original network": lambda: bench.separate(separate_process.plain, subject.config, LOOP_BATCH, rows),
        "+ allocator settings": partial(plain, subject.made, LOOP_BATCH, torch.contiguous_format),
        "+ measured batch size": partial(plain, subject.made, size, torch.contiguous_format),
    }
    sides |= {name: partial(plain, net, size, torch.channels_last) for name, net in nets.items()}
    rates = bench.alternate(f"{subject.name}: step by step", sides)
    differ = run_on_thread(lambda: {name: _difference(net, subject.made, x) for name, net in nets.items()})
    first = before = rates["original network"]
    for name, of in rates.items():
        batch = str(LOOP_BATCH if name in ("original network", "+ allocator settings") else size)
        brings = [f"{of.over(before):.2f}×", f"{of.over(first):.2f}×"]
        findings.rows.append(
            [subject.name, name, batch, f"{of.rate:.1f}", *brings, f"{differ[name]:.0e}" if name in differ else "–"]
        )
        before = of
    findings.bars[subject.name] = {name: of.rate for name, of in rates.items()}


def _nets(subject: Subject, size: int) -> dict[str, Network]:
    x = subject.image.tensor[None]
    nets: dict[str, Network] = {}
    net = nets["+ channels-last"] = copy.deepcopy(subject.made).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    padded = copy.deepcopy(net)
    fold_padding(padded, x)
    if any(type(a) is not type(b) for a, b in zip(padded.modules(), net.modules(), strict=True)):
        nets["+ padding folded into convolutions"] = net = padded
    model = subject.model
    kept = {layer.module for layer in (*model.layers, model.layer, model.gap and model.gap.layer) if layer}
    folded = copy.deepcopy(net)
    if fold_batch_norm(folded, x, keep=kept):
        nets["+ batch norm folded into convolutions"] = folded
    compiled = build_fast_forward(model.with_module(model.module, compile=True), size)
    if compiled is not None:
        nets["torch.compile"] = compiled
    return nets


@torch.no_grad()
def _difference(net: Network, made: nn.Module, x: Tensor) -> float:
    """Return the largest difference of the logits."""
    X = x[None]
    return float((net(X.contiguous(memory_format=torch.channels_last)) - made(X)).abs().max())


# ---- avoided work ----------------------------------------------------------------------------------------------------


def _rows(findings: Findings, subject: Subject) -> None:
    """Count the rows of a PCAM± of all layers."""
    layers = subject.model.layers
    A = run_on_thread(subject.activations, layers)
    all_, live = (
        2 * sum(counts)
        for counts in zip(*((len(a), len(select_channels(a, include_zero=False))) for a in A), strict=True)
    )
    findings.rows += [
        _counted(subject, "no rows for channels that are zero everywhere", all_, live),
        _counted(subject, "one prediction and one activation capture for all levels", 2 * len(layers), 2),
    ]


def _counted(subject: Subject, saving: str, without: int, with_: int) -> list[str]:
    return [subject.name, saving, "rows of PCAM±", str(without), str(with_), f"{without / with_:.2f}×"]


def _work(bench: Bench, findings: Findings, subject: Subject) -> None:
    (layer,) = subject.model.default_layers(many=False)
    (a,) = run_on_thread(subject.activations, [layer])
    pairs = min(64, len(a))
    both = Masked(subject.image, a[:pairs], parts=("revealed", "hidden"))
    one_by_one = [Masked(subject.image, a[:pairs], parts=(part,)) for part in both.parts]
    compared: list[tuple[str, str, dict[str, Side]]] = [
        (
            "one mask for both masked images of a channel",
            "rows created/s",
            {
                "without": lambda: run_on_thread(_making, one_by_one, pairs),
                "with": lambda: run_on_thread(_making, [both], pairs),
            },
        ),
        (
            "no gradients of parameters",
            "forward + backward passes/s",
            {
                "without": lambda: run_on_thread(_passes, subject, True),
                "with": lambda: run_on_thread(_passes, subject, False),
            },
        ),
        (
            "one Adam step for all images of a batch",
            f"steps of {bench.images} images/s",
            {
                "without": lambda: run_on_thread(_adam, len(a), bench.images, False),
                "with": lambda: run_on_thread(_adam, len(a), bench.images, True),
            },
        ),
    ]
    for saving, measured, sides in compared:
        rates: dict[str, Rates] = bench.alternate(f"{subject.name}: {saving}", sides)
        cells = [f"{rates[side].rate:.1f}" for side in ("without", "with")]
        findings.rows.append([subject.name, saving, measured, *cells, f"{rates['with'].over(rates['without']):.2f}×"])


def _making(rows: Sequence[Masked], pairs: int) -> Timed:
    device = rows[0].activations.device
    for each in rows:
        each.make(0, 8)
    start, step = clock(device), 8
    for each in rows:
        for at in range(0, len(each), step):
            each.make(at, min(len(each), at + step))
    return Timed(2 * pairs, clock(device) - start)


def _passes(subject: Subject, parameters: bool) -> Timed:
    """Time forward and backward passes, with or without the gradients of the parameters."""
    net, x = copy.deepcopy(subject.model.module).requires_grad_(parameters), subject.image.tensor
    X = x.expand(subject.model.batch_sizes["gradient"], -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def backward(_: Network, X: Tensor) -> None:
        with torch.enable_grad():
            logits: Tensor = net(X.detach().requires_grad_())
            torch.autograd.backward(logits[:, 0].sum())
        net.zero_grad()

    return timed(backward if parameters else forward_backward, net, X, 3 * len(X))


def _adam(size: int, images: int, together: bool) -> Timed:
    """Time steps of Adam on variables of the size of the number of channels."""
    variables = [[torch.ones(size), *(torch.zeros(size) for _ in range(3)), torch.zeros(())] for _ in range(images)]
    groups = [variables] if together else [[each] for each in variables]
    start, steps = clock(torch.device("cpu")), 200
    for _ in range(steps):
        for group in groups:
            adam_ascent_step(0.1, group)
    return Timed(steps, clock(torch.device("cpu")) - start)
