"""Opti-CAM: one image compared with the official loop, and concurrent images compared with sequential ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import engine_runs, separate_process
from benchmarks.bench_setup import Bench
from benchmarks.channel_masking import LOOP, explained_by
from benchmarks.limit import forward_backward
from benchmarks.peers import OptiCam
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject, at_equal_terms
from benchmarks.timing import Timed, run_on_thread

LOOP_AIM, TOGETHER_AIM = 2.5, 1.3
TEXT = (
    "One image compared with a transcription of the official loop, whose parameters require gradients and whose steps "
    "repeat the backward pass of the original image. Then {images} concurrent images compared with sequential ones on "
    "the same engine. Few iterations are measured, because all take the same time. In float32 the iterates of "
    "different implementations diverge, so maps are compared in float64. *Limit*: plain forward and backward pass at "
    "the batch size and format of the fastest forward pass."
)
ITERATIONS = 100  # as in the paper


def section(bench: Bench) -> Result:
    """Compare Opti-CAM with the official loop, and concurrent with sequential images."""
    findings = Findings()
    for subject in bench.subjects():
        _one(bench, findings, subject)
        _several(bench, findings, subject)
    return Result(
        "Opti-CAM",
        TEXT.format(images=bench.images),
        claims=findings.claims,
        tables=[
            Table(
                "Iterations per second, median of the rounds:",
                ["model", "side", "batch", "iterations measured", "iterations/s", "share of limit"],
                findings.rows,
            )
        ],
        charts=[Chart(f"Opti-CAM, {ITERATIONS} iterations for one image", "seconds", findings.bars)],
    )


def _one(bench: Bench, findings: Findings, subject: Subject) -> None:
    model, steps = subject.model, min(ITERATIONS, max(2, round(subject.limit.rate * bench.seconds / 8)))
    loop, equal = subject.alike(official, subject, subject.at_precision), at_equal_terms(LOOP, subject.model.device)
    form, size = subject.limit.with_gradients
    rates = bench.alternate(
        f"{subject.name}: Opti-CAM, one image",
        {
            "limit": lambda: subject.limit.timed(forward_backward, form, size, 2 * steps),
            "camserve": lambda: engine_runs.run(model, subject.x, subject.call("opti-cam", steps=steps)).timed,
            LOOP: lambda: bench.separate(separate_process.opti_cam, subject.config, loop.name, loop.c, steps),
            equal: lambda: subject.alike(loop.timed, steps),
        },
    )
    few = 3
    differ = run_on_thread(agreement, subject.in_float64(), few)
    maps = f"maps within {differ:.0e} (float64, {few} iterations)"
    claims = [
        Claim(f"Opti-CAM, {subject.name}, one image", loop_, rates["camserve"].over(rates[loop_]), aim, "×", maps)
        for loop_, aim in ((LOOP, LOOP_AIM), (equal, None))
    ]
    findings.claims += explained_by(
        claims, lambda: engine_runs.time_profile(model, subject.x, subject.call("opti-cam", steps=steps))
    )
    findings.bars[subject.name] = {name: ITERATIONS / of.rate for name, of in rates.items()}
    batches = {"limit": f"{size}, {form}", "camserve": str(model.batch_sizes["ascend"])}
    batches |= dict.fromkeys((LOOP, equal), "1, contiguous")
    for name, of in rates.items():
        share = f"{of.over(rates['limit']):.2f}"
        findings.rows.append([subject.name, name, batches[name], str(steps), f"{of.rate:.1f}", share])


def official(subject: Subject, net: nn.Module) -> OptiCam:
    """Return the official loop for the class that a network predicts."""
    image, layer = subject.image, subject.call("opti-cam").layers[0].name
    index = int(net(image.tensor[None]).argmax())
    return OptiCam(net, layer, image.tensor, image.mean, image.std, index)


def agreement(subject: Subject, steps: int) -> float:
    """Return the largest difference to the map of the official loop after a number of iterations."""
    mine = engine_runs.run(subject.model, subject.x, subject.call("opti-cam", steps=steps)).result.maps[0]
    return float((mine - official(subject, subject.made)(steps).cpu()).abs().max())


def _several(bench: Bench, findings: Findings, subject: Subject) -> None:
    model = subject.model
    steps = min(ITERATIONS, max(5, round(subject.limit.rate * bench.seconds / 3 / bench.images)))
    images = run_on_thread(lambda: [subject.x.roll(16 * i, 2) for i in range(bench.images)])
    maps: dict[str, list[Tensor]] = {}

    def together() -> Timed:
        return _timed(maps, "concurrent", subject, images, steps, len(images))

    def in_succession() -> Timed:
        return _timed(maps, "sequential", subject, images, steps, 1)

    rates = bench.alternate(
        f"{subject.name}: Opti-CAM, {bench.images} images", {"concurrent": together, "sequential": in_succession}
    )
    pairs = [*zip(maps["concurrent"], maps["sequential"], strict=True)]
    same = run_on_thread(lambda: all(torch.equal(a, b) for a, b in pairs))
    claim = Claim(
        f"Opti-CAM, {subject.name}, {bench.images} concurrent images",
        "one at a time",
        rates["concurrent"].over(rates["sequential"]),
        TOGETHER_AIM,
        "×",
        "bitwise identical maps" if same else "maps DIFFER",
        f"the batch size of the lane is fixed at {model.batch_sizes['ascend']}, so that results do not depend on "
        "concurrent requests; a larger batch size would slow down single images",
    )
    findings.claims.append(claim)
    for name, of in rates.items():
        cells = [f"{bench.images} {name}", str(model.batch_sizes["ascend"]), str(steps), f"{of.rate:.1f}", "–"]
        findings.rows.append([subject.name, *cells])


def _timed(
    maps: dict[str, list[Tensor]], name: str, subject: Subject, images: Sequence[Tensor], steps: int, at_once: int
) -> Timed:
    call = subject.call("opti-cam", steps=steps)
    with engine_runs.engine() as running:
        maps[name], rows, seconds = [], 0, 0.0
        for start in range(0, len(images), at_once):
            # The timing excludes the prediction, the activations and the first iteration.
            jobs = [
                engine_runs.submit(running, subject.model, x, call, after=3) for x in images[start : start + at_once]
            ]
            maps[name] += [job.result.maps for job in jobs]
            timed = engine_runs.concurrent_rows(jobs)
            rows, seconds = rows + timed.rows, seconds + timed.seconds
        return Timed(rows, seconds)
