"""Examine published networks and write docs/networks.md.

Each network runs in a process of its own. Results are stored after each network in docs/networks.json, so a run that is
interrupted continues where it ended. Results of another machine or other versions are discarded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.machine import ROOT, facts
from benchmarks.sweep import page
from benchmarks.sweep.examine import FAILED, MEMORY, TIMEOUT, Examined, examine
from benchmarks.sweep.networks import all_networks

_GB = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a default layer is not a cut and no warning says so."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="examine these networks again, such as timm:levit_128"
    )
    parser.add_argument("--seconds", type=float, default=600, help="time limit for a network (default: 600)")
    parser.add_argument("--gigabytes", type=float, default=12, help="memory limit for a network (default: 12)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page and its data")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.in_this_process:
        print(json.dumps(asdict(examine(options.only[0], int(options.gigabytes * _GB)))))
        return 0
    known = all_networks()
    if unknown := [name for name in options.only or [] if ":" not in name]:
        parser.error(f"{unknown[0]!r} is not a network; expected LIBRARY:NAME, such as {known[0]}")
    here = {**facts(torch.device("cpu")), **_versions("torchvision", "timm", "transformers", "monai")}
    data = options.out / "networks.json"
    results = page.read(data, here)
    wanted = options.only or [name for name in known if name not in results]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(wanted))
        for name in wanted:
            progress.update(task, description=name)
            results[name] = _in_a_process(name, options.seconds, options.gigabytes, here["date"])
            in_order = [results[each] for each in dict.fromkeys([*known, *results]) if each in results]
            page.write(data, here, in_order)
            progress.advance(task)
    in_order = [results[each] for each in dict.fromkeys([*known, *results]) if each in results]
    missing = sum(name not in results for name in known)
    (options.out / "networks.md").write_text(page.page(here, in_order, missing), encoding="utf-8")
    broken = [each for each in in_order if each.breaks_promise]
    for each in broken:
        print(f"{each.name}: a default layer has the cut value {each.worst_cut:.2f}, and there is no warning")
    return 1 if broken else 0


def _in_a_process(name: str, seconds: float, gigabytes: float, date: str) -> Examined:
    """Examine a network in a new process with a time and memory limit."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--in-this-process", "--only", name]
    command += ["--gigabytes", str(gigabytes)]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        result = Examined(name, TIMEOUT, f"more than {seconds:g} s")
    else:
        if done.returncode == 0:
            result = Examined(**json.loads(done.stdout.splitlines()[-1]))
        elif done.returncode == -9:  # the kernel ends processes when memory runs out
            result = Examined(name, MEMORY, "the process was killed")
        else:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            result = Examined(name, FAILED, f"the process ended with status {done.returncode}: {last}")
    return replace(result, seconds=round(time.perf_counter() - start, 1), date=date)


def _versions(*packages: str) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    sys.exit(main())
