"""Opti-CAM: one image against the official loop, and eight together against one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import apart, ours
from benchmarks.limit import forward_backward, timed
from benchmarks.masked import KEPT, LOOP, explained_by
from benchmarks.peers import OptiCam
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import Timed, alone
from benchmarks.work import Bench

LOOP_AIM, TOGETHER_AIM = 2.5, 1.3
ITERATIONS = 100  # of the paper


def section(bench: Bench) -> Result:
    """Opti-CAM."""
    found = Findings()
    for subject in bench.subjects():
        _one(bench, found, subject)
        _several(bench, found, subject)
    return Result(
        "Opti-CAM",
        "One image through the engine against a transcription of the official loop, in which parameters have "
        "gradients and every step goes back through the graph of the original image, too, once as it is and once with "
        "our allocator's settings; then "
        f"{bench.images} images together against one after another, through the same engine, their maps compared bit "
        "by bit. Few iterations are measured, in turn; all take the same time. In float32 the iterates of any two "
        "implementations diverge, so maps are compared with the loop's in float64. *Limit* is the plain forward and "
        "backward pass, for the input alone, at the batch size and in the format of the fastest forward pass.",
        claims=found.claims,
        tables=[
            Table(
                "Iterations a second, median of the rounds:",
                ["model", "side", "batch", "iterations measured", "iterations/s", "share of limit"],
                found.rows,
            )
        ],
        charts=[Chart(f"Opti-CAM, {ITERATIONS} iterations for one image", "seconds", found.bars)],
    )


def _one(bench: Bench, found: Findings, subject: Subject) -> None:
    model, steps = subject.model, max(2, round(subject.limit.rate * bench.seconds / 8))
    loop = alone(official, subject)
    form, size = subject.limit.best
    X = alone(subject.limit.batch, form, size)
    rates = bench.alternate(
        f"{subject.name}: Opti-CAM, one image",
        {
            "limit": lambda: alone(timed, forward_backward, subject.limit.formats[form], X, 2 * steps),
            "ours": lambda: ours.run(model, subject.x, subject.call("opti-cam", steps=steps)).timed,
            LOOP: lambda: bench.apart(apart.opti_cam, subject.config, loop.name, loop.c, steps),
            KEPT: lambda: alone(loop.timed, steps),
        },
    )
    few = 3
    differ = alone(agreement, subject.in_float64(), few)
    maps = f"in float64, maps after {few} iterations to {differ:.0e}"
    claims = [
        Claim(f"Opti-CAM, {subject.name}, one image", loop_, rates["ours"].over(rates[loop_]), aim, "×", maps)
        for loop_, aim in ((LOOP, LOOP_AIM), (KEPT, None))
    ]
    found.claims += explained_by(claims, lambda: ours.where(model, subject.x, subject.call("opti-cam", steps=steps)))
    found.bars[subject.name] = {name: ITERATIONS / of.rate for name, of in rates.items()}
    batches = {"limit": f"{size}, {form}", "ours": str(model.batch_sizes["ascend"])}
    batches |= dict.fromkeys((LOOP, KEPT), "1, contiguous")
    for name, of in rates.items():
        share = f"{of.over(rates['limit']):.2f}"
        found.rows.append([subject.name, name, batches[name], str(steps), f"{of.rate:.1f}", share])


def official(subject: Subject) -> OptiCam:
    """The official loop for the class that is predicted."""
    image, layer = subject.image, subject.call("opti-cam").layers[0].name
    index = int(subject.made(image.tensor[None]).argmax())
    return OptiCam(subject.made, layer, image.tensor, image.mean, image.std, index)


def agreement(subject: Subject, steps: int) -> float:
    """The largest difference between our map and the official loop's after so many iterations."""
    mine = ours.run(subject.model, subject.x, subject.call("opti-cam", steps=steps)).result.maps[0]
    return float((mine - official(subject)(steps).cpu()).abs().max())


def _several(bench: Bench, found: Findings, subject: Subject) -> None:
    model, steps = subject.model, max(5, round(subject.limit.rate * bench.seconds / 3 / bench.images))
    images = alone(lambda: [subject.x.roll(16 * i, 2) for i in range(bench.images)])
    maps: dict[str, list[Tensor]] = {}

    def together() -> Timed:
        return _timed(maps, "together", subject, images, steps, len(images))

    def in_succession() -> Timed:
        return _timed(maps, "one by one", subject, images, steps, 1)

    rates = bench.alternate(
        f"{subject.name}: Opti-CAM, {bench.images} images", {"together": together, "one by one": in_succession}
    )
    pairs = [*zip(maps["together"], maps["one by one"], strict=True)]
    same = alone(lambda: all(torch.equal(a, b) for a, b in pairs))
    claim = Claim(
        f"Opti-CAM, {subject.name}, {bench.images} images together",
        "one by one, through the engine",
        rates["together"].over(rates["one by one"]),
        TOGETHER_AIM,
        "×",
        "maps bit by bit" if same else "NOT the same bits",
        f"the lane's batch size is {model.batch_sizes['ascend']}, whoever is there, so that bits do not depend on "
        "company; a larger one gains what the first table says, and a lone image pays for its padding",
    )
    found.claims.append(claim)
    for name, of in rates.items():
        cells = [f"{bench.images} {name}", str(model.batch_sizes["ascend"]), str(steps), f"{of.rate:.1f}", "–"]
        found.rows.append([subject.name, *cells])


def _timed(
    maps: dict[str, list[Tensor]], name: str, subject: Subject, images: Sequence[Tensor], steps: int, at_once: int
) -> Timed:
    call = subject.call("opti-cam", steps=steps)
    with ours.engine() as running:
        maps[name], rows, seconds = [], 0, 0.0
        for start in range(0, len(images), at_once):
            # The prediction, the activations and the first iteration are not counted: of a hundred they are little.
            jobs = [ours.submit(running, subject.model, x, call, after=3) for x in images[start : start + at_once]]
            maps[name] += [job.result.maps for job in jobs]
            timed = ours.together(jobs)
            rows, seconds = rows + timed.rows, seconds + timed.seconds
        return Timed(rows, seconds)
