"""Simulate many replicas and write docs/simulation.md.

The simulation runs the server's scheduler and admission control in simulated time. Sections can run one at a time; the
others keep their results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.machine import ROOT, facts
from benchmarks.results import Table
from benchmarks.simulation import page, profile
from benchmarks.simulation.measure import measure, validation
from benchmarks.simulation.profile import Profile
from benchmarks.simulation.run import Ended, Scenario, capacity, simulate
from benchmarks.simulation.settings import MIX, TITLES, Answer, Settings, Study
from benchmarks.simulation.studies import STUDIES
from benchmarks.subjects import CONFIGS, Subject, from_config
from camserve_server.config import ModelConfig
from camserve_server.torch_setup.allocator import keep_memory

MODEL, VALIDATION = "model", "validation"
SECTIONS = (MODEL, *STUDIES, VALIDATION)
CALLERS = 32
# The small network runs so many requests per second that chance matters little.
TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32))
NETWORKS = {TINY.name: TINY, **CONFIGS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]}; expected one of {', '.join(SECTIONS)}")
    if options.measure:
        if not options.measure.parent.is_dir():
            parser.error(f"--measure: there is no folder {options.measure.parent}; create it")
        _measure(options.network, options.measure)
        return 0
    data, here = options.out / "simulation.json", facts(torch.device("cpu"))
    try:
        stored, sections = page.read(data)
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--out: {data} cannot be read or written ({error!r}); expected a folder, with results or without")
    if options.render:
        if not sections:
            parser.error(f"--render: there are no results in {data}; simulate a section first")
        _write_page(options.out, stored, sections)
        return 0
    try:
        times = profile.load(options.profile)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--profile: {options.profile} is no profile ({error!r}); expected a file of --measure")
    settings = Settings(times, capacity(times, MIX, CALLERS), MIX, requests=options.requests, seed=options.seed)
    if options.replicas:
        settings = _with_replicas(settings, options.replicas)

    def keep(name: str, title: str, answer: Answer, seconds: float) -> None:
        """Write the page after each section, so that an interrupted run keeps its results."""
        made = f"*{here['date']}, commit {here['commit']}, {seconds:.0f} s.*"
        sections[name] = page.Section(title, answer.text, answer.tables, answer.lines, made, round(seconds, 1))
        in_order = {each: sections[each] for each in SECTIONS if each in sections}
        page.write(data, here, in_order)
        _write_page(options.out, here, in_order)

    names = [name for name in SECTIONS if name in (options.names or SECTIONS)]
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        plans = {name: STUDIES[name].scenarios(settings) for name in names if name in STUDIES}
        task = progress.add_task("", total=sum(each.requests for plan in plans.values() for each in plan))
        for name in names:
            start = time.perf_counter()
            progress.update(task, description=name)
            if name == MODEL:
                title, answer = "The simulated server", _model(times, settings)
            elif name == VALIDATION:
                title, answer = (
                    "Comparison with a real engine",
                    _validation(options, lambda text: progress.update(task, description=text)),
                )
            else:
                title, answer = (
                    STUDIES[name].title,
                    _answer(STUDIES[name], settings, plans[name], lambda requests: progress.advance(task, requests)),
                )
            keep(name, title, answer, time.perf_counter() - start)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"sections: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument(
        "--profile",
        type=Path,
        default=profile.FOLDER / "h200.json",
        help="JSON file with the batch times of a replica (default: those of an H200)",
    )
    parser.add_argument(
        "--measure",
        type=Path,
        metavar="FILE",
        help="only measure the batch times of a network on this CPU, and write them to a file for --profile",
    )
    parser.add_argument("--replicas", type=_count, nargs="+", help="numbers of replicas (default: 1 to 1,000)")
    parser.add_argument(
        "--requests", type=_count, default=10_000, help="fewest requests of a simulation (default: 10,000)"
    )
    parser.add_argument("--network", choices=NETWORKS, default=TINY.name, help="network to measure (default: tiny)")
    parser.add_argument("--seconds", type=_seconds, default=60, help="duration of the validation (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page, its data and its charts")
    parser.add_argument("--render", action="store_true", help="only write the page from the stored results")
    return parser


def _count(text: str) -> int:
    """Return a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    """Return a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected seconds, above 0")
    return value


def _with_replicas(settings: Settings, replicas: Sequence[int]) -> Settings:
    return Settings(
        settings.profile,
        settings.capacity,
        settings.mix,
        replicas=replicas,
        requests=settings.requests,
        seed=settings.seed,
    )


def _answer(study: Study, settings: Settings, plan: Sequence[Scenario], tick: Callable[[int], None]) -> Answer:
    def results() -> Iterator[tuple[Scenario, Ended]]:
        for scenario in plan:
            yield scenario, simulate(scenario, tick)

    return study.answer(settings, results())


def _measure(network: str, path: Path) -> None:
    with Console(stderr=True).status("") as status:
        times = measure(_subject(network), status.update, rounds=1, methods={name: {} for name in MIX})
    path.write_text(json.dumps(times.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _subject(network: str) -> Subject:
    keep_memory()  # the server does the same
    return from_config(NETWORKS[network], torch.device("cpu"), 1.0)


def _validation(options: argparse.Namespace, step: Callable[[str], None]) -> Answer:
    step(f"loading {options.network}")
    return validation(_subject(options.network), step, options.seconds)


def _model(times: Profile, settings: Settings) -> Answer:
    """Describe the simulated server, and compare single requests with the measured ones."""
    rows = []
    for name, cost in times.methods.items():
        alone_s = 1 / capacity(times, {name: 1.0}, callers=1, requests=10)
        measured_s = times.measured_s.get(name)
        compared = ["–", "–"] if measured_s is None else [f"{1e3 * measured_s:.0f}", f"{alone_s / measured_s:.2f}"]
        share = f"{settings.mix[name]:.0%}" if name in settings.mix else "–"
        rows.append([TITLES.get(name, name), share, f"{cost.most:,}", f"{1e3 * alone_s:.0f}", *compared])
    text = (
        f"Each replica serves {times.name}. {times.source}\n\n"
        f"With {CALLERS} callers that always wait for one request each, a replica completes "
        f"{settings.capacity:.1f} requests of this mix per second. This is its **capacity**; a load is a rate of "
        "requests divided by the capacity of all replicas. Requests arrive at random (a Poisson process), have a "
        "timeout of 30 s, and are sent again after UNAVAILABLE and RESOURCE_EXHAUSTED as the Python client does: up to "
        "four attempts, after the delay that the server names or after 0.1, 0.4 and 1.6 s. 100 clients choose the "
        "replica of each call by the load reports of the replicas. The network takes no time, and all replicas are "
        "equally fast. One request at a time uses the host of a replica (decoding and encoding). The simulation "
        "leaves out that a GPU receives the next batch while it runs one. Under a constant load, the first "
        f"{settings.warm_up_s:.0f} s do not count unless a section says otherwise; near the capacity, the slowest "
        "methods need longer to become steady, so their latencies are lower limits there."
    )
    columns = ["method", "share", "rows", "alone, simulated, ms", "measured, ms", "ratio"]
    return Answer(text, [Table("The mix of requests, and the time of a request on an idle server:", columns, rows)], [])


def _write_page(folder: Path, run: dict[str, str], sections: dict[str, page.Section]) -> None:
    missing = [name for name in SECTIONS if name not in sections]
    text = page.page(run, sections, missing, folder / "pictures")
    (folder / "simulation.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
