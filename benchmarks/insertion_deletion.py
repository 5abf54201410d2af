"""Insertion and deletion of one map, compared with a simple loop."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import engine_runs, peers, separate_process
from benchmarks.bench_setup import Bench
from benchmarks.channel_masking import explained_by
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject, at_equal_terms
from benchmarks.timing import Timed, clock
from camserve_server.registry import METRICS
from camserve_server.request_plan import MetricCall

STEPS = 224  # as in the Poly-CAM paper
TEXT = (
    "Both curves of one image and map, compared with a simple loop in contiguous batches of {batch}. Fewer than the "
    "{steps} steps of a curve are measured, because all take the same time."
)
LOOP_AIM = 1.0  # The loop runs the same rows, so only memory format and batch size can be better.


def section(bench: Bench) -> Result:
    """Compare insertion and deletion with a simple loop and the plain pass."""
    findings = Findings()
    for subject in bench.subjects():
        _one(bench, findings, subject)
    return Result(
        "Insertion and deletion",
        TEXT.format(batch=peers.LOOP, steps=STEPS),
        claims=findings.claims,
        tables=[
            Table(
                "Rows per second, median of the rounds:",
                ["model", "side", "rows measured", "rows/s", "share of plain pass", "one image (s)"],
                findings.rows,
            )
        ],
        charts=[Chart("Insertion and deletion, one image", "seconds", findings.bars)],
    )


def _one(bench: Bench, findings: Findings, subject: Subject) -> None:
    model = subject.model
    # Measure at least two whole batches of the loop. The padding of an incomplete batch would have too much weight.
    least = min(peers.LOOP, model.preprocessing.size[0])
    steps = max(least, min(STEPS, round(subject.limit.rate * bench.seconds / 2 / peers.LOOP) * peers.LOOP))
    first = engine_runs.run(model, subject.x, subject.call("grad-cam")).result
    S, index = first.maps[0], first.targets.index
    metrics = [MetricCall(METRICS[n], METRICS[n].check({"steps": steps}, "")) for n in ("insertion", "deletion")]
    curves: dict[str, Tensor] = {}

    def camserve_side() -> Timed:
        timed_job = engine_runs.run(model, subject.x, S, metrics, targets=index, after=1)
        curves["camserve"] = torch.tensor([score.curve for score in timed_job.result.scores[0]])
        return timed_job.timed

    def loop() -> Timed:
        x = subject.image.tensor
        start = clock(x.device)
        curves["loop"] = peers.curves(subject.at_precision, x, S.to(x.device), index[0], steps).cpu()
        return Timed(2 * steps, clock(x.device) - start)

    def separate_loop() -> Timed:
        return bench.separate(separate_process.curves, subject.config, S.numpy(), index[0], steps)

    equal = at_equal_terms("simple loop", subject.model.device)
    sides = {
        "plain pass": subject.limit.side(bench.seconds),
        "camserve": camserve_side,
        "simple loop": separate_loop,
        equal: lambda: subject.alike(loop),
    }
    rates = bench.alternate(f"{subject.name}: insertion and deletion", sides)
    differ = float((curves["camserve"] - curves["loop"]).abs().max())
    name = f"Insertion and deletion, {subject.name}"
    claims = [
        Claim(f"{name}, rate", "plain pass", rates["camserve"].over(rates["plain pass"]), 0.95, "share"),
        *(
            Claim(name, loop_, rates["camserve"].over(rates[loop_]), aim, "×", f"curves within {differ:.0e}")
            for loop_, aim in (("simple loop", LOOP_AIM), (equal, None))
        ),
    ]
    findings.claims += explained_by(
        claims, lambda: engine_runs.time_profile(model, subject.x, S, metrics, targets=index, after=1)
    )
    findings.bars[subject.name] = {side: 2 * STEPS / of.rate for side, of in rates.items()}
    for side, of in rates.items():
        seconds = f"{2 * STEPS / of.rate:.1f}"
        share = f"{of.over(rates['plain pass']):.2f}"
        findings.rows.append([subject.name, side, str(2 * steps), f"{of.rate:.1f}", share, seconds])
