"""What each exact saving brings: the network step by step from as it is made to as it is served, and work not done."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import apart
from benchmarks.limit import Network, forward, forward_backward, timed
from benchmarks.peers import LOOP as LOOP_BATCH
from benchmarks.results import Chart, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import Rates, Side, Timed, alone, clock
from benchmarks.work import Bench
from camserve_server.engine.lanes.ascend import adam_ascent_step
from camserve_server.engine.lanes.fast_forward import build_fast_forward
from camserve_server.maps.channels import select_channels
from camserve_server.models.fold import fold_batch_norm, fold_padding
from camserve_server.rows import Masked


def section(bench: Bench) -> Result:
    """The steps of the network, then what is not done at all."""
    steps, less = Findings(), Findings()
    for subject in bench.subjects():
        _steps(bench, steps, subject)
        _rows(less, subject)
        _work(bench, less, subject)
    return Result(
        "What each saving brings",
        "None of them changes a map by more than rounding; the tests hold each to 1e-5. First the plain forward pass, "
        f"step by step, each on top of those before it: as the official loops run it (contiguous, batches of "
        f"{LOOP_BATCH}, glibc's defaults, in a process of its own), and then as the server does, all in turn. "
        "`compiled` is an option of the server's, off by default. Then work that is not done, on the photograph.",
        tables=[
            Table(
                "The plain forward pass, rows a second, median of the rounds:",
                ["model", "step", "batch", "rows/s", "brings", "in all", "logits differ by"],
                steps.rows,
            ),
            Table("Work not done:", ["model", "saving", "measured", "without", "with", "brings"], less.rows),
        ],
        charts=[Chart("The plain forward pass, step by step", "rows a second", steps.bars)],
    )


# ---- the network, step by step ---------------------------------------------------------------------------------------


def _steps(bench: Bench, found: Findings, subject: Subject) -> None:
    x, size = subject.image.tensor, subject.model.batch_sizes["forward"]
    nets = alone(_nets, subject, size)
    rows = max(2 * LOOP_BATCH, round(subject.limit.rate * bench.seconds))

    def plain(net: Network, batch: int, form: torch.memory_format) -> Timed:
        X = x.expand(batch, -1, -1, -1).contiguous(memory_format=form)
        return alone(partial(timed, forward, net, X, rows))

    sides: dict[str, Side] = {
        "as it is made": lambda: bench.apart(apart.plain, subject.config, LOOP_BATCH, rows),
        "freed memory kept": partial(plain, subject.made, LOOP_BATCH, torch.contiguous_format),
        "a batch size that fits": partial(plain, subject.made, size, torch.contiguous_format),
    }
    sides |= {name: partial(plain, net, size, torch.channels_last) for name, net in nets.items()}
    rates = bench.alternate(f"{subject.name}: step by step", sides)
    differ = alone(lambda: {name: _difference(net, subject.made, x) for name, net in nets.items()})
    first = before = rates["as it is made"]
    for name, of in rates.items():
        batch = str(LOOP_BATCH if name in ("as it is made", "freed memory kept") else size)
        brings = [f"{of.over(before):.2f}×", f"{of.over(first):.2f}×"]
        found.rows.append(
            [subject.name, name, batch, f"{of.rate:.1f}", *brings, f"{differ[name]:.0e}" if name in differ else "–"]
        )
        before = of
    found.bars[subject.name] = {name: of.rate for name, of in rates.items()}


def _nets(subject: Subject, size: int) -> dict[str, Network]:
    x = subject.image.tensor[None]
    nets: dict[str, Network] = {}
    net = nets["channels-last"] = copy.deepcopy(subject.made).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    padded = copy.deepcopy(net)
    fold_padding(padded, x)
    if any(type(a) is not type(b) for a, b in zip(padded.modules(), net.modules(), strict=True)):
        nets["padding by the convolutions"] = net = padded
    model = subject.model
    kept = {layer.module for layer in (*model.layers, model.layer, model.gap and model.gap.layer) if layer}
    folded = copy.deepcopy(net)
    if fold_batch_norm(folded, x, keep=kept):
        nets["batch norm in the convolutions"] = folded
    compiled = build_fast_forward(model.with_module(model.module, compile=True), size)
    if compiled is not None:
        nets["compiled"] = compiled
    return nets


@torch.no_grad()
def _difference(net: Network, made: nn.Module, x: Tensor) -> float:
    """Of logits, the largest, at one batch size."""
    X = x[None]
    return float((net(X.contiguous(memory_format=torch.channels_last)) - made(X)).abs().max())


# ---- work not done ---------------------------------------------------------------------------------------------------


def _rows(found: Findings, subject: Subject) -> None:
    """Counted, not timed: rows of a PCAM± of all layers."""
    layers = subject.model.layers
    A = alone(subject.activations, layers)
    all_, live = (
        2 * sum(counts) for counts in zip(*((len(a), len(select_channels(a, dead=False))) for a in A), strict=True)
    )
    found.rows += [
        _counted(subject, "channels that are zero everywhere owe no rows", all_, live),
        _counted(subject, "one prediction, and one look at the activations, for all levels", 2 * len(layers), 2),
    ]


def _counted(subject: Subject, saving: str, without: int, with_: int) -> list[str]:
    return [subject.name, saving, "rows of a PCAM±", str(without), str(with_), f"{without / with_:.2f}×"]


def _work(bench: Bench, found: Findings, subject: Subject) -> None:
    (layer,) = subject.model.default_layers(many=False)
    (a,) = alone(subject.activations, [layer])
    pairs = min(64, len(a))
    both = Masked(subject.image, a[:pairs], parts=("revealed", "hidden"))
    one_by_one = [Masked(subject.image, a[:pairs], parts=(part,)) for part in both.parts]
    compared: list[tuple[str, str, dict[str, Side]]] = [
        (
            "the two masked images of a channel share their mask",
            "rows made a second",
            {
                "without": lambda: alone(_making, one_by_one, pairs),
                "with": lambda: alone(_making, [both], pairs),
            },
        ),
        (
            "parameters get no gradients",
            "forward and backward passes a second",
            {"without": lambda: alone(_passes, subject, True), "with": lambda: alone(_passes, subject, False)},
        ),
        (
            "one step of Adam for all images of a batch",
            f"steps of {bench.images} images a second",
            {
                "without": lambda: alone(_adam, len(a), bench.images, False),
                "with": lambda: alone(_adam, len(a), bench.images, True),
            },
        ),
    ]
    for saving, measured, sides in compared:
        rates: dict[str, Rates] = bench.alternate(f"{subject.name}: {saving}", sides)
        cells = [f"{rates[side].rate:.1f}" for side in ("without", "with")]
        found.rows.append([subject.name, saving, measured, *cells, f"{rates['with'].over(rates['without']):.2f}×"])


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
    """With gradients of the parameters as well, as `loss.backward()` has them by default."""
    net, x = copy.deepcopy(subject.model.module).requires_grad_(parameters), subject.image.tensor
    X = x.expand(subject.model.batch_sizes["gradient"], -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def backward(_: Network, X: Tensor) -> None:
        with torch.enable_grad():
            logits: Tensor = net(X.detach().requires_grad_())
            torch.autograd.backward(logits[:, 0].sum())
        net.zero_grad()

    return timed(backward if parameters else forward_backward, net, X, 3 * len(X))


def _adam(size: int, images: int, together: bool) -> Timed:
    """Variables as large as the number of channels."""
    variables = [[torch.ones(size), *(torch.zeros(size) for _ in range(3)), torch.zeros(())] for _ in range(images)]
    groups = [variables] if together else [[each] for each in variables]
    start, steps = clock(torch.device("cpu")), 200
    for _ in range(steps):
        for group in groups:
            adam_ascent_step(0.1, group)
    return Timed(steps, clock(torch.device("cpu")) - start)
