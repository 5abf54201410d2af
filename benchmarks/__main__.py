"""Run the benchmarks and write docs/benchmarks.md.

Sections can run one at a time. Results of the same machine are combined on one page.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import (
    approximations,
    busy_machine,
    channel_masking,
    host,
    insertion_deletion,
    limit,
    load_time,
    mixed_load,
    openvino_pass,
    opti_cam,
    page,
    ray_serve,
    savings,
    service,
    start_time,
)
from benchmarks.bench_setup import Bench
from benchmarks.machine import ROOT, facts
from benchmarks.results import Claim, Result
from benchmarks.subjects import CONFIGS, PRECISION, TINY
from camserve_server.torch_setup.allocator import keep_memory
from camserve_server.torch_setup.device import pick_device

# Each section, and its approximate number of progress steps for three networks and two rounds.
SECTIONS: dict[str, tuple[Callable[[Bench], Result], int]] = {
    "limit": (limit.section, 30),
    "poly": (channel_masking.poly, 150),
    "score": (channel_masking.score, 36),
    "opti": (opti_cam.section, 30),
    "curves": (insertion_deletion.section, 18),
    "savings": (savings.section, 24),
    "shortcuts": (approximations.section, 45),
    "openvino": (openvino_pass.section, 30),
    "service": (service.section, 24),
    "mixed": (mixed_load.section, 20),
    "ray": (ray_serve.section, 12),
    "busy": (busy_machine.section, 30),
    "host": (host.section, 8),
    "load": (load_time.section, 20),
    "start": (start_time.section, 6),
}


def measure(bench: Bench, names: Sequence[str], keep: Callable[[str, Result], None]) -> None:
    """Run sections, show a progress bar, and pass each result to `keep`. Without a terminal, print the steps."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=sum(SECTIONS[name][1] for name in names))
        for name in names:
            run, steps = SECTIONS[name]
            until = progress.tasks[0].completed + steps

            def step(text: str, name: str = name, until: float = until) -> None:
                if progress.tasks[0].completed + 1 < until:
                    progress.advance(task)
                progress.update(task, description=f"{name}: {text}")
                if not console.is_terminal:
                    print(f"{progress.tasks[0].elapsed or 0:.0f} s, {name}: {text}", file=sys.stderr, flush=True)

            bench.step = step
            start = time.perf_counter()
            result = run(bench)
            keep(name, replace(result, seconds=time.perf_counter() - start))
            progress.update(task, completed=until)


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"sections to measure: {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="approximate duration of a measurement in seconds (default: 1.5)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each side (default: 2)")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: a GPU if available)")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=[*CONFIGS, TINY.name],
        default=list(CONFIGS),
        help=f"networks to measure, or {TINY.name} to try the command (default: all networks)",
    )
    parser.add_argument(
        "--precision",
        choices=[*PRECISION, "tf32"],
        help="precision of camserve and of the passes and loops that have its precision (default: tf32 on a GPU, "
        "otherwise fp32)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the forward passes with torch.compile")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="CHECKOUT",
        help="checkout of another commit, for the sections host and load",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page, its data and its charts")
    parser.add_argument("--render", action="store_true", help="only write the page from the stored results")
    arguments = parser.parse_args()
    if arguments.render:
        run, results = page.load(arguments.out / "benchmarks.json")
        _write_page(arguments.out, run, results)
        return 0
    unknown = [name for name in arguments.names if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]}; expected one of {', '.join(SECTIONS)}")
    names = [name for name in SECTIONS if name in (arguments.names or SECTIONS)]
    device = pick_device(arguments.device)
    if device.type == "cpu":
        keep_memory()  # The server does the same.
    precision = arguments.precision or ("tf32" if device.type == "cuda" else "fp32")
    bench = Bench(
        device,
        arguments.seconds,
        arguments.rounds,
        names=arguments.models,
        precision=precision,
        compiled=arguments.compile,
        baseline=arguments.baseline,
    )
    command = "make bench" if len(sys.argv) == 1 else f"python -m benchmarks {shlex.join(sys.argv[1:])}"

    here, data = facts(device, precision), arguments.out / "benchmarks.json"
    results = page.read(data, here)

    def keep(name: str, result: Result) -> None:
        """Write the page after each section, so that an interrupted run keeps its results."""
        results[name] = replace(result, command=command, made=f"*{here['date']}, commit {here['commit']}.*")
        arguments.out.mkdir(parents=True, exist_ok=True)
        in_order = {name: results[name] for name in SECTIONS if name in results}
        page.write(data, here, in_order)
        _write_page(arguments.out, here, in_order)

    try:
        measure(bench, names, keep)
    finally:
        bench.close()
    for claim in (claim for name in names for claim in results[name].claims):
        print(_line(claim))
    return 0


def _write_page(folder: Path, run: Mapping[str, str], results: Mapping[str, Result]) -> None:
    missing = [name for name in SECTIONS if name not in results]
    text = page.page(run, results, missing, folder / "pictures")
    (folder / "benchmarks.md").write_text(text, encoding="utf-8")


def _line(claim: Claim) -> str:
    verdict = "" if claim.aim is None else "met" if claim.reached else "missed"
    aim = "" if claim.aim is None else f" (target {claim.aim:.2f})"
    return f"{verdict:8}{claim.what}: {claim.figure:.2f}{aim}, compared with {claim.peer}"


if __name__ == "__main__":
    sys.exit(main())
