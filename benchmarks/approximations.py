"""Lower precision, tolerances and budgets: their effect on the rate, the map and its scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import skimage.data
import torch
from torch import Tensor

from benchmarks import engine_runs
from benchmarks.bench_setup import Bench
from benchmarks.channel_masking import explained_by
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import Side, Timed, run_on_thread
from camserve_server.engine.warmup import warm_up
from camserve_server.models.model import Model
from camserve_server.registry import METHODS, METRICS
from camserve_server.request_plan import MethodCall, MetricCall

BF16_AIM = 1.5
PHOTOGRAPHS = ("chelsea", "coffee", "cat")
TOLERANCES = (0.01, 0.05, 0.2)
BUDGETS = (0.1, 0.25, 0.5)  # as fractions of the rows of the full map

TEXT = (
    "First table: rate of PCAM± in bf16 and fp32 on the last layer. Second table: PCAM± with less work compared with "
    "the full map in fp32, as means over {count} photographs of scikit-image ({photographs}) with {model}. "
    "*Reported*: for a tolerance, the certified bound of the error of a layer's sum; for a budget, the completed "
    "share. A budget processes the strongest channels of the coarsest layers first."
)


@dataclass(frozen=True)
class Effect:
    """Comparison of a map with the full map in fp32.

    Attributes:
        rows: Rows as a fraction of the rows of the full map.
        correlation: Correlation of the maps.
        difference: Mean absolute difference of the maps.
        insertion: Insertion score.
        deletion: Deletion score.
        reported: Share or certified bound that the response reports.
    """

    rows: float
    correlation: float
    difference: float
    insertion: float
    deletion: float
    reported: float


def section(bench: Bench) -> Result:
    """Measure PCAM± in bf16 and fp16, with tolerances and with budgets."""
    speed, effect = Findings(), Findings()
    for subject in bench.subjects():
        _precision(bench, speed, subject)
    first = next(bench.subjects())
    for name, effects in _effects(bench, first).items():
        effect.rows.append(_row(name, effects))
    return Result(
        "Approximations",
        TEXT.format(count=len(PHOTOGRAPHS), photographs=", ".join(PHOTOGRAPHS), model=first.name),
        claims=speed.claims,
        tables=[
            Table("Rows per second, median of the rounds:", ["model", "precision", "batch", "rows/s"], speed.rows),
            Table(
                "Effect on map and scores:",
                ["setting", "rows", "reported", "correlation", "mean difference", "insertion", "deletion"],
                effect.rows,
            ),
        ],
        charts=[Chart("PCAM±, by precision", "rows per second", speed.bars)],
    )


def _precision(bench: Bench, findings: Findings, subject: Subject) -> None:
    models = {precision: warm(bench, subject, precision) for precision in ("fp32", "bf16")}
    call = subject.call("poly-cam", (subject.model.layers[-1].name,))
    rows = max(64, round(subject.limit.rate * bench.seconds))

    def side(model: Model) -> Timed:
        return engine_runs.run(model, subject.x, call, budget=2 + rows).timed

    sides: dict[str, Side] = {precision: partial(side, model) for precision, model in models.items()}
    rates = bench.alternate(f"{subject.name}: PCAM± in bf16", sides)
    claim = Claim(
        f"PCAM± in bf16, {subject.name}", "PCAM± in fp32", rates["bf16"].over(rates["fp32"]), BF16_AIM, "×", "see below"
    )
    findings.claims += explained_by(
        [claim], lambda: engine_runs.time_profile(models["bf16"], subject.x, call, budget=2 + rows)
    )
    findings.bars[subject.name] = {precision: of.rate for precision, of in rates.items()}
    for precision, of in rates.items():
        batch = str(models[precision].batch_sizes["forward"])
        findings.rows.append([subject.name, precision, batch, f"{of.rate:.1f}"])


def warm(bench: Bench, subject: Subject, precision: str) -> Model:
    """Return the model at a precision, warmed up."""
    model = subject.model.at(precision)
    if not model.batch_sizes:
        bench.step(f"{subject.name}: warming up in {precision}")
        run_on_thread(warm_up, model, subject.config.batch_size)
    return model


def _effects(bench: Bench, subject: Subject) -> dict[str, list[Effect]]:
    findings: dict[str, list[Effect]] = {}
    for name in PHOTOGRAPHS:
        x = subject.model.preprocessing(getattr(skimage.data, name)())
        bench.step(f"{name}: the whole map")
        whole = _run(subject.model, x)
        index, S = whole.result.targets.index, whole.result.maps[0]
        rows = whole.rows - _metric_rows(subject.model)
        findings.setdefault("full map, fp32", []).append(_effect(whole, S, rows, 1.0))
        for precision in ("bf16", "fp16"):
            bench.step(f"{name}: in {precision}")
            half = _run(warm(bench, subject, precision), x, index)
            findings.setdefault(precision, []).append(_effect(half, S, rows, 1.0))
        for tolerance in TOLERANCES:
            bench.step(f"{name}: tolerance {tolerance}")
            less = _run(subject.model, x, index, tolerance=tolerance)
            said = max((error for left in less.result.left_out for error in left.error), default=0.0)
            findings.setdefault(f"`tolerance` {tolerance}", []).append(_effect(less, S, rows, said))
        for share in BUDGETS:
            bench.step(f"{name}: budget {share:.0%}")
            budget = round(share * rows) + _metric_rows(subject.model)
            less = _run(subject.model, x, index, budget=budget)
            findings.setdefault(f"`budget` of {share:.0%}", []).append(_effect(less, S, rows, less.result.share))
    return findings


def _metrics(model: Model) -> list[MetricCall]:
    steps = min(224, model.preprocessing.size[0])
    return [MetricCall(METRICS[n], METRICS[n].check({"steps": steps}, "")) for n in ("insertion", "deletion")]


def _metric_rows(model: Model) -> int:
    return 2 * min(224, model.preprocessing.size[0])


def _run(
    model: Model, x: Tensor, index: tuple[int, ...] | int = 1, *, budget: int = 0, tolerance: float = 0.0
) -> engine_runs.TimedJob:
    method = METHODS["poly-cam"]
    call = MethodCall(method, method.check({"tolerance": tolerance}, ""), model.layers)
    return engine_runs.run(model, x, call, _metrics(model), targets=index, budget=budget)


def _effect(run: engine_runs.TimedJob, whole: Tensor, rows: int, reported: float) -> Effect:
    S = run.result.maps[0]
    insertion, deletion = run.result.scores[0]
    return Effect(
        rows=(run.rows - _metric_rows(run.model)) / rows,
        correlation=float(torch.corrcoef(torch.stack([S.flatten(), whole.flatten()]).double())[0, 1]),
        difference=float((S - whole).abs().mean()),
        insertion=insertion.value,
        deletion=deletion.value,
        reported=reported,
    )


def _row(name: str, effects: list[Effect]) -> list[str]:
    def mean(of: str) -> float:
        return sum(float(getattr(effect, of)) for effect in effects) / len(effects)

    reported = f"{mean('reported'):.3f}" if "`" in name else ""
    figures = [f"{mean(of):.3f}" for of in ("correlation", "difference", "insertion", "deletion")]
    return [name, f"{mean('rows'):.0%}", reported, *figures]
