"""Less work or less precision by choice: what it does to the speed, the map and its scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import skimage.data
import torch
from torch import Tensor

from benchmarks import ours
from benchmarks.masked import explained_by
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import Side, Timed, alone
from benchmarks.work import Bench
from camserve_server.engine.warmup import warm_up
from camserve_server.models.model import Model
from camserve_server.models.pixels import from_pixels
from camserve_server.registry import METHODS, METRICS
from camserve_server.request_plan import MethodCall, MetricCall

BF16_AIM = 1.5
PHOTOGRAPHS = ("chelsea", "coffee", "cat")
TOLERANCES = (0.01, 0.05, 0.2)
BUDGETS = (0.1, 0.25, 0.5)  # of the rows that the whole map takes


@dataclass(frozen=True)
class Effect:
    """Of one way to make the map, beside the whole map in fp32. `rows` are shares of the rows of that."""

    rows: float
    correlation: float
    difference: float
    insertion: float
    deletion: float
    said: float


def section(bench: Bench) -> Result:
    """PCAM± in bf16, within a tolerance, and cut short by a budget."""
    speed, effect = Findings(), Findings()
    for subject in bench.subjects():
        _precision(bench, speed, subject)
    first = next(bench.subjects())
    for name, effects in _effects(bench, first).items():
        effect.rows.append(_row(name, effects))
    return Result(
        "Less work or precision, by choice",
        "PCAM± in bf16 against fp32, in turn, on the last layer. And what PCAM± loses where it is asked for less: "
        f"means over {len(PHOTOGRAPHS)} photographs of scikit-image ({', '.join(PHOTOGRAPHS)}) by {first.name}, beside "
        "the whole map in fp32. *Said* is what the answer itself says: for a tolerance the certified bound on any "
        "layer's sum, for a budget the share of the whole that it reached. A budget takes the strongest channels of "
        "the coarsest layers first.",
        claims=speed.claims,
        tables=[
            Table("Rows a second, median of the rounds:", ["model", "precision", "batch", "rows/s"], speed.rows),
            Table(
                "What is lost:",
                ["asked for", "rows", "said", "correlation", "mean difference", "insertion", "deletion"],
                effect.rows,
            ),
        ],
        charts=[Chart("PCAM±, by precision", "rows a second", speed.bars)],
    )


def _precision(bench: Bench, found: Findings, subject: Subject) -> None:
    models = {precision: subject.model.at(precision) for precision in ("fp32", "bf16")}
    if not models["bf16"].batch_sizes:
        bench.step(f"{subject.name}: warming up in bf16")
        alone(warm_up, models["bf16"], subject.config.batch_size)
    call = subject.call("poly-cam", (subject.model.layers[-1].name,))
    rows = max(64, round(subject.limit.rate * bench.seconds))

    def side(model: Model) -> Timed:
        return ours.run(model, subject.x, call, budget=2 + rows).timed

    sides: dict[str, Side] = {precision: partial(side, model) for precision, model in models.items()}
    rates = bench.alternate(f"{subject.name}: PCAM± in bf16", sides)
    claim = Claim(
        f"PCAM± in bf16, {subject.name}", "PCAM± in fp32", rates["bf16"].over(rates["fp32"]), BF16_AIM, "×", "see below"
    )
    found.claims += explained_by([claim], lambda: ours.where(models["bf16"], subject.x, call, budget=2 + rows))
    found.bars[subject.name] = {precision: of.rate for precision, of in rates.items()}
    for precision, of in rates.items():
        batch = str(models[precision].batch_sizes["forward"])
        found.rows.append([subject.name, precision, batch, f"{of.rate:.1f}"])


def _effects(bench: Bench, subject: Subject) -> dict[str, list[Effect]]:
    found: dict[str, list[Effect]] = {}
    for name in PHOTOGRAPHS:
        x = subject.model.preprocessing(from_pixels(getattr(skimage.data, name)()))
        bench.step(f"{name}: the whole map")
        whole = _run(subject.model, x)
        index, S = whole.result.targets.index, whole.result.maps[0]
        rows = whole.rows - _metric_rows(subject.model)
        found.setdefault("everything", []).append(_effect(whole, S, rows, 1.0))
        bench.step(f"{name}: in bf16")
        half = _run(subject.model.at("bf16"), x, index)
        found.setdefault("bf16", []).append(_effect(half, S, rows, 1.0))
        for tolerance in TOLERANCES:
            bench.step(f"{name}: tolerance {tolerance}")
            less = _run(subject.model, x, index, tolerance=tolerance)
            said = max((error for left in less.result.left_out for error in left.error), default=0.0)
            found.setdefault(f"`tolerance` {tolerance}", []).append(_effect(less, S, rows, said))
        for share in BUDGETS:
            bench.step(f"{name}: budget {share:.0%}")
            budget = round(share * rows) + _metric_rows(subject.model)
            less = _run(subject.model, x, index, budget=budget)
            found.setdefault(f"`budget` of {share:.0%}", []).append(_effect(less, S, rows, less.result.share))
    return found


def _metrics(model: Model) -> list[MetricCall]:
    steps = min(224, model.preprocessing.size[0])
    return [MetricCall(METRICS[n], METRICS[n].check({"steps": steps}, "")) for n in ("insertion", "deletion")]


def _metric_rows(model: Model) -> int:
    return 2 * min(224, model.preprocessing.size[0])


def _run(
    model: Model, x: Tensor, index: tuple[int, ...] | int = 1, *, budget: int = 0, tolerance: float = 0.0
) -> ours.Watched:
    method = METHODS["poly-cam"]
    call = MethodCall(method, method.check({"tolerance": tolerance}, ""), model.layers)
    return ours.run(model, x, call, _metrics(model), targets=index, budget=budget)


def _effect(run: ours.Watched, whole: Tensor, rows: int, said: float) -> Effect:
    S = run.result.maps[0]
    insertion, deletion = run.result.scores[0]
    return Effect(
        rows=(run.rows - _metric_rows(run.model)) / rows,
        correlation=float(torch.corrcoef(torch.stack([S.flatten(), whole.flatten()]).double())[0, 1]),
        difference=float((S - whole).abs().mean()),
        insertion=insertion.value,
        deletion=deletion.value,
        said=said,
    )


def _row(name: str, effects: list[Effect]) -> list[str]:
    def mean(of: str) -> float:
        return sum(float(getattr(effect, of)) for effect in effects) / len(effects)

    said = f"{mean('said'):.3f}" if "`" in name else ""
    figures = [f"{mean(of):.3f}" for of in ("correlation", "difference", "insertion", "deletion")]
    return [name, f"{mean('rows'):.0%}", said, *figures]
