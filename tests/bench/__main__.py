"""PCAM± through the engine against the plain forward pass of the same model, at its best batch size.

Same machine, threads, precision, memory format and weights, in one run: before and after each level of Poly-CAM the
plain forward pass is measured again, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import skimage.data
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from camserve_server import registry
from camserve_server.allocator import keep_memory
from camserve_server.config import ModelConfig, embedded
from camserve_server.engine import Engine
from camserve_server.explain import MethodCall, explain, rows_needed
from camserve_server.job import Event
from camserve_server.job import Progress as Done
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.models.pixels import from_pixels
from camserve_server.plan import Plan, Score, Scores, Targets
from camserve_server.rows import Repeated
from camserve_server.service.server import pick_device
from camserve_server.warmup import SIZES, warm_up

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
AIM, LEAST = 0.95, 0.85

T = TypeVar("T")


@dataclass(frozen=True)
class Level:
    """One layer of Poly-CAM: what it owes, and the rates in rows a second."""

    layer: str
    rows_owed: int
    rows_done: int
    pcam: float
    plain: float


@dataclass(frozen=True)
class Result:
    """One model. `share` is the time that the plain forward pass would take for all rows, over the time PCAM± takes."""

    model: Model
    plain: dict[int, float]
    levels: list[Level]
    difference: float

    @property
    def share(self) -> float:
        plain_s = sum(level.rows_owed / level.plain for level in self.levels)
        return plain_s / sum(level.rows_owed / level.pcam for level in self.levels)


def configs() -> list[ModelConfig]:
    """The models measured; the rate of a network does not depend on its training."""
    random = [
        ModelConfig(name=name, source=f"torchvision:{name}", allow_random_weights=True)
        for name in ("resnet50", "vgg16")
    ]
    return [embedded(), *random]


@torch.no_grad()
def plain_rate(model: Model, x: Tensor, size: int, seconds: float) -> float:
    """Rows a second of the plain forward pass at batch `size`."""
    X = x.expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    model.module(X)
    rows, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        model.module(X)
        rows += size
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    return rows / (time.perf_counter() - start)


def pcam_rate(model: Model, x: Tensor, layer: str, seconds: float) -> tuple[int, float]:
    """Rows done and rows a second of PCAM± on one layer, from its first masked row on, for at most `seconds`."""
    method = registry.METHODS["poly-cam"]
    call = MethodCall(method, method.check({}, ""), model.find_layers([layer], ""))
    plan = explain(model, model.image(x), [], call, [])
    batches: list[tuple[float, int]] = []  # when each was done, and the rows done by then

    def note(event: Event) -> None:
        if isinstance(event, Done):
            batches.append((time.perf_counter(), event.rows_done))

    engine = Engine({model.name: model})
    engine.start()
    job = engine.submit(plan, model, rows=rows_needed(model, call, [], 1), tell=note)
    wait([job.future], timeout=seconds)
    (start, before), (stop, done) = batches[1], batches[-1]  # the first two are the prediction and the activations
    rate = (done - before) / (stop - start)
    engine.close()
    return done, rate


def alone(work: Callable[..., T], *arguments: Any) -> T:
    """Runs it in a thread that ends with it: two threads with an OpenMP team each would slow each other down."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments).result()


def measure(model: Model, seconds: float, progress: Progress) -> Result:
    """All levels of one model, each between two measurements of the plain forward pass."""
    x = model.preprocessing(from_pixels(skimage.data.chelsea()))  # type: ignore[no-untyped-call]
    on_device = model.image(x).tensor
    sizes = SIZES[model.device.type]
    task = progress.add_task(model.name, total=len(sizes) + 2 * len(model.layers) + 1)

    def plain(size: int, for_seconds: float) -> float:
        rate = alone(plain_rate, model, on_device, size, for_seconds)
        progress.advance(task)
        return rate

    rates = {size: plain(size, seconds / 4) for size in sizes}
    best = max(rates, key=lambda size: rates[size])
    difference = agreement(model, x)
    levels = []
    before = plain(best, seconds / 2)
    for layer in reversed(model.layers):
        done, rate = pcam_rate(model, x, layer.name, seconds)
        progress.advance(task)
        after = plain(best, seconds / 2)
        levels.append(Level(layer.name, 2 * layer.channels, done, rate, (before + after) / 2))
        before = after
    return Result(model, rates, levels, difference)


def agreement(model: Model, x: Tensor) -> float:
    """The largest difference in logits between the engine and the plain forward pass of the same rows."""
    index = tuple(range(model.classes))
    c = Targets(index, torch.zeros(model.classes), torch.zeros(model.classes))

    def plan() -> Plan[Scores]:
        return (yield from Score(Repeated(model.image(x), 3), c))

    def difference(scores: Scores) -> float:
        with torch.no_grad():
            logits = model.module(model.image(x).tensor[None].contiguous(memory_format=torch.channels_last))
        return float((scores.logits - logits.double()).abs().max())

    engine = Engine({model.name: model})
    engine.start()
    scores = engine.submit(plan(), model, rows=3).future.result()
    engine.close()
    return alone(difference, scores)


def page(results: list[Result], command: str) -> str:
    """`docs/benchmarks.md`."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = results[0].model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    lines = [
        "# Benchmarks",
        "",
        f"{date.today().isoformat()}, commit {commit.stdout.strip() or 'unknown'}, {name}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}, fp32, "
        "channels-last. Made by",
        "",
        "```console",
        f"$ {command}",
        "```",
        "",
        "## PCAM± against the plain forward pass",
        "",
        "Rows a second that Poly-CAM's masked images get through the engine (masks made, multiplied, run, weighed),",
        "over rows a second of the plain forward pass of the same network on a ready-made batch of the size that suits",
        "it best. The share counts all the rows that a full PCAM± owes, level by level. Each level is measured between",
        "two measurements of the plain forward pass, each alone in the process. 1.00 would be a method that costs",
        "nothing. Shares move by some hundredths from run to run, more on a machine that does other things.",
        "",
        "| model | plain forward, best batch (rows/s) | lane's batch | PCAM± (share) | aim | logits differ by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        best = max(r.plain, key=lambda size: r.plain[size])
        lane = r.model.batch_sizes["forward"]
        lines.append(
            f"| {r.model.name} | {r.plain[best]:.1f} at {best} | {lane} | **{r.share:.2f}** | {AIM} "
            f"| {r.difference:.0e} |"
        )
    lines += [
        "",
        "Level by level:",
        "",
        "| model | layer | rows owed | measured | PCAM± (rows/s) | plain (rows/s) | share |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for r in results:
        lines += [
            f"| {r.model.name} | {v.layer} | {v.rows_owed} | {v.rows_done} | {v.pcam:.1f} | {v.plain:.1f} "
            f"| {v.pcam / v.plain:.2f} |"
            for v in r.levels
        ]
    lines += ["", "The plain forward pass by batch size (rows a second):", ""]
    sizes = list(results[0].plain)
    lines += [f"| model | {' | '.join(map(str, sizes))} |", "| --- |" + " --- |" * len(sizes)]
    lines += [f"| {r.model.name} | {' | '.join(f'{rate:.1f}' for rate in r.plain.values())} |" for r in results]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """As the kernel calls it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measures, prints, writes the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page that is written")
    arguments = parser.parse_args()
    registry.discover()
    device = pick_device(arguments.device)
    if device.type == "cpu":
        keep_memory()  # as the server does; the plain forward pass has it too
    results = []
    with Progress(console=Console(stderr=True)) as progress:
        for config in configs():
            model = alone(load, config, device)
            alone(warm_up, model)
            results.append(measure(model, arguments.seconds, progress))
    text = page(results, "make bench")
    arguments.out.write_text(text, encoding="utf-8")
    print(text)
    for r in results:
        print(
            f"{r.model.name}: {r.share:.2f} of the plain forward pass ({'reached' if r.share >= LEAST else 'MISSED'})"
        )


if __name__ == "__main__":
    main()
