"""Insertion and deletion of one map, against a straight loop."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import apart, ours, peers
from benchmarks.masked import explained_by
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import Timed, alone, clock
from benchmarks.work import Bench
from camserve_server.registry import METRICS
from camserve_server.request_plan import MetricCall

STEPS = 224  # of the Poly-CAM paper
LOOP_AIM = 1.0  # it has no needless rows, so all there is to gain is the memory format and the batch size


def section(bench: Bench) -> Result:
    """Insertion and deletion."""
    found = Findings()
    for subject in bench.subjects():
        _one(bench, found, subject)
    return Result(
        "Insertion and deletion",
        f"One image and map, both curves: ours through the engine against a straight loop in batches of {peers.LOOP}, "
        "contiguous, once as it is and once with our allocator's settings, and the plain forward pass, in turn. Fewer "
        f"than the {STEPS} steps a curve are measured, each of more pixels; a step takes the same time.",
        claims=found.claims,
        tables=[
            Table(
                "Rows a second, median of the rounds:",
                ["model", "side", "rows measured", "rows/s", "share of plain", "one image (s)"],
                found.rows,
            )
        ],
        charts=[Chart("Insertion and deletion, one image", "seconds", found.bars)],
    )


def _one(bench: Bench, found: Findings, subject: Subject) -> None:
    model = subject.model
    # Two whole batches of the loop at least: padding of a small rest would count for more than it does in 224 steps.
    least = min(peers.LOOP, model.preprocessing.size[0])
    steps = max(least, min(STEPS, round(subject.limit.rate * bench.seconds / 2 / peers.LOOP) * peers.LOOP))
    first = ours.run(model, subject.x, subject.call("grad-cam")).result
    S, index = first.maps[0], first.targets.index
    metrics = [MetricCall(METRICS[n], METRICS[n].check({"steps": steps}, "")) for n in ("insertion", "deletion")]
    curves: dict[str, Tensor] = {}

    def ours_side() -> Timed:
        watched = ours.run(model, subject.x, S, metrics, targets=index, after=1)
        curves["ours"] = torch.tensor([score.curve for score in watched.result.scores[0]])
        return watched.timed

    def loop() -> Timed:
        x = subject.image.tensor
        start = clock(x.device)
        curves["loop"] = peers.curves(subject.made, x, S.to(x.device), index[0], steps).cpu()
        return Timed(2 * steps, clock(x.device) - start)

    def loop_apart() -> Timed:
        return bench.apart(apart.curves, subject.config, S.numpy(), index[0], steps)

    sides = {
        "plain": subject.limit.side(bench.seconds),
        "ours": ours_side,
        "straight loop": loop_apart,
        "straight loop, our allocator": lambda: alone(loop),
    }
    rates = bench.alternate(f"{subject.name}: insertion and deletion", sides)
    differ = float((curves["ours"] - curves["loop"]).abs().max())
    name = f"Insertion and deletion, {subject.name}"
    claims = [
        Claim(f"{name}, rows a second", "plain forward pass", rates["ours"].over(rates["plain"]), 0.95, "share"),
        *(
            Claim(name, loop_, rates["ours"].over(rates[loop_]), aim, "×", f"curves to {differ:.0e}")
            for loop_, aim in (("straight loop", LOOP_AIM), ("straight loop, our allocator", None))
        ),
    ]
    found.claims += explained_by(claims, lambda: ours.where(model, subject.x, S, metrics, targets=index, after=1))
    found.bars[subject.name] = {side: 2 * STEPS / of.rate for side, of in rates.items()}
    for side, of in rates.items():
        seconds = f"{2 * STEPS / of.rate:.1f}"
        share = f"{of.over(rates['plain']):.2f}"
        found.rows.append([subject.name, side, str(2 * steps), f"{of.rate:.1f}", share, seconds])
