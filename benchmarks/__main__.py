"""`make bench`: the plain forward pass, all else as a share of it, and peers, measured; writes docs/benchmarks.md.

Sections may be run one at a time; those of the same machine are put together on one page.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import ascent, curves, limit, masked, mixed, page, savings, service, shortcuts
from benchmarks.machine import ROOT, facts
from benchmarks.results import Claim, Result
from benchmarks.subjects import CONFIGS
from benchmarks.work import Bench
from camserve_server.torch_setup.allocator import keep_memory
from camserve_server.torch_setup.device import pick_device

# Each section, and about how many steps of the bar it makes for all three networks at two rounds.
SECTIONS: dict[str, tuple[Callable[[Bench], Result], int]] = {
    "limit": (limit.section, 30),
    "poly": (masked.poly, 150),
    "score": (masked.score, 36),
    "opti": (ascent.section, 30),
    "curves": (curves.section, 18),
    "savings": (savings.section, 24),
    "shortcuts": (shortcuts.section, 42),
    "service": (service.section, 24),
    "mixed": (mixed.section, 20),
}


def measure(bench: Bench, names: Sequence[str], keep: Callable[[str, Result], None]) -> None:
    """Runs the sections and hands on what each has found; a bar says how much time is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(SECTIONS[name][1] for name in names))
        for name in names:
            run, steps = SECTIONS[name]
            until = progress.tasks[0].completed + steps

            def step(text: str, name: str = name, until: float = until) -> None:
                if progress.tasks[0].completed + 1 < until:
                    progress.advance(task)
                progress.update(task, description=f"{name}: {text}")

            bench.step = step
            start = time.perf_counter()
            result = run(bench)
            keep(name, replace(result, seconds=time.perf_counter() - start))
            progress.update(task, completed=until)


def main() -> int:
    """Measures, writes, prints what is reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each measurement, about (default: 1.5)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side has its turn (default: 2)")
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="which networks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page, its data and pictures")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(SECTIONS)}")
    names = [name for name in SECTIONS if name in (arguments.names or SECTIONS)]
    device = pick_device(arguments.device)
    if device.type == "cpu":
        keep_memory()  # as the server does
    bench = Bench(device, arguments.seconds, arguments.rounds, names=arguments.models)
    command = "make bench" if len(sys.argv) == 1 else f"python -m benchmarks {shlex.join(sys.argv[1:])}"

    here, data = facts(device), arguments.out / "benchmarks.json"
    results = page.read(data, here)

    def keep(name: str, result: Result) -> None:
        """At once: whoever interrupts the rest has what was measured."""
        results[name] = replace(result, command=command, made=f"*{here['date']}, commit {here['commit']}.*")
        arguments.out.mkdir(parents=True, exist_ok=True)
        in_order = {name: results[name] for name in SECTIONS if name in results}
        page.write(data, here, in_order)
        text = page.page(here, in_order, [n for n in SECTIONS if n not in results], arguments.out / "pictures")
        (arguments.out / "benchmarks.md").write_text(text, encoding="utf-8")

    try:
        measure(bench, names, keep)
    finally:
        bench.close()
    for claim in (claim for name in names for claim in results[name].claims):
        print(_line(claim))
    return 0


def _line(claim: Claim) -> str:
    verdict = "" if claim.aim is None else "reached" if claim.reached else "MISSED"
    aim = "" if claim.aim is None else f" of {claim.aim:.2f}"
    return f"{verdict:8}{claim.what}: {claim.figure:.2f}{aim}, against {claim.peer}"


if __name__ == "__main__":
    sys.exit(main())
