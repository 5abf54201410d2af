"""`camserve bench`."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar

from camserve import request_messages
from camserve.batches import Variant
from camserve.catalogue import Model
from camserve.client import Client
from camserve.errors import FailedPrecondition, InvalidArgument
from camserve.images import ImageLike
from camserve_cli.extras import needs_extra
from camserve_cli.load import measure
from camserve_cli.load import output as shown
from camserve_cli.load.knee import Step, highest
from camserve_cli.load.measure import Load
from camserve_cli.load.mix import Ask, Mix, photograph
from camserve_cli.load.run import Run, Sender
from camserve_cli.load.stats import Measured
from camserve_cli.options import Budget, ModelName, Seed, Server, asks, model_of, named, read_variant
from camserve_cli.output import errors_as_lines, print_json
from camserve_cli.study import score_csv

__all__ = ["bench"]


class Arrivals(Enum):
    """When requests come in an open loop."""

    poisson = "poisson"
    constant = "constant"


@asks
def bench(
    *,
    server: Server,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT][:KEY=VALUE,...]",
            help="May be repeated, for a mix by weights, each 1 if left out. Default: grad-cam.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|DIR", help="May be repeated, in equal shares. Default: one of 512 × 384 pixels."),
    ] = None,
    model: ModelName = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Scores each map. May be repeated.")] = None,
    budget: Budget = None,
    in_flight: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="A closed loop: so many requests at a time. Default: 8.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(metavar="R", min=1e-3, help="An open loop: R requests a second. With --knee: the first rate."),
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="Of an open loop: at random times, or evenly.")] = Arrivals.poisson,
    knee: Annotated[bool, typer.Option("--knee", help="Find the highest rate whose p99 is within --p99.")] = False,
    p99: Annotated[float | None, typer.Option(metavar="SECONDS", min=1e-6, help="The bound of --knee.")] = None,
    duration: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Measured; of --knee each rate.")] = 10.0,
    warmup: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Before it, and left out.")] = 2.0,
    connections: Annotated[int, typer.Option(metavar="N", min=1, max=256, help="To the server, used in turn.")] = 4,
    seed: Seed = 0,
    metrics_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The server's Prometheus metrics: says how full batches were.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a row for each request into it.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, instead of tables.")] = False,
) -> None:
    """Put a load on a server, and say how fast it answers.

    In a closed loop, --in-flight, each answer makes room for the next request. In an open loop, --rate, requests come
    when they come, and latency is counted from when a request was meant to be sent: if the server stalls, what waits
    meanwhile is in the percentiles.

    With --knee, the highest rate of an open loop is found at which 99 % of requests are answered within the bound.

    Ctrl-C ends it, with what was measured by then.
    """
    _check_options(in_flight, rate, knee, p99, csv, report)
    weighted = [_weighted(each, seed) for each in method or ["grad-cam"]]
    if len({variant.label for variant, _ in weighted}) < len(weighted):
        raise typer.BadParameter("names a method twice", param_hint="--method")
    with errors_as_lines():
        for path in filter(None, (csv, report)):
            if path.exists():
                raise InvalidArgument(f"{path} is there: give another file")
        with server.client() as client:
            served = _checked(client, model, [variant for variant, _ in weighted], metric or [])
        images = score_csv.image_files(image or [])
        mix = Mix(
            [_asks(variant, images or [photograph()], model, metric or [], budget) for variant, _ in weighted],
            [weight for _, weight in weighted],
        )
        with _Watch(warmup + duration) as watch:
            load = Load(mix, warmup, duration, seed, metrics_url, watch.goes_on)
            loop = _Loop(in_flight or 8, rate, arrivals is Arrivals.constant, p99)
            found, steps = asyncio.run(_measured(server, connections, load, loop, watch))
        if found is None or not found.seconds:
            typer.echo("nothing was measured yet", err=True)
            raise typer.Exit(130)
        result = shown.Result(
            found,
            methods=mix.methods,
            steps=steps,
            bound_s=p99,
            facts={
                "load": str(loop),
                "methods": ", ".join(f"{variant.label} ({weight:g})" for variant, weight in weighted),
                "images": f"{len(images)} files" if images else "one that is made, 512 × 384 pixels",
                "metrics": ", ".join(metric or []) or "none",
                "budget": "none" if budget is None else f"{budget} rows",
                "measured": f"{found.seconds:.3g} s, after {warmup:g} s of warm-up",
                "connections": str(connections),
                "seed": str(seed),
                **_facts(server.address, served),
            },
            interrupted=watch.interrupted,
        )
        if csv:
            shown.write_csv(csv, [step.measured for step in steps] or [found])
        if as_json:
            print_json(shown.record(result))
        else:
            Console().print(shown.tables(result))
        for note in shown.notes(result):
            typer.echo(f"note: {note}", err=True)
        if report:
            shown.write_report(report, result, shlex.join(["camserve", *sys.argv[1:]]))
        if watch.interrupted:
            raise typer.Exit(130)


@dataclass(frozen=True)
class _Loop:
    """Closed unless there is a rate or, for the knee, a bound of p99."""

    in_flight: int
    rate: float | None
    even: bool
    bound_s: float | None

    def __str__(self) -> str:
        if self.rate is None and self.bound_s is None:
            return f"closed loop, {self.in_flight} in flight"
        kind = f"{self.rate:g}/s" if self.bound_s is None else f"knee, p99 within {self.bound_s:g} s"
        return f"open loop, {kind}, {'constant' if self.even else 'poisson'} arrivals"


async def _measured(
    server: Server, connections: int, load: Load, loop: _Loop, watch: _Watch
) -> tuple[Measured | None, list[Step]]:
    """What was measured, and for the knee the rates that were tried: then it is the best of them, or else the last."""
    load = replace(load, senders=[server.connection(Sender) for _ in range(connections)])
    steps: list[Step] = []
    try:
        if loop.bound_s is None and loop.rate is None:
            return await measure.in_flight(load, loop.in_flight), []
        if loop.bound_s is None:
            return await measure.at_rate(load, loop.rate or 1.0, even=loop.even), []
        async for step in measure.steps(load, loop.bound_s, loop.rate or 1.0, even=loop.even):
            watch.say(shown.step_line(step))
            steps.append(step)
    finally:
        for sender in load.senders:
            await sender.close()
    best = highest(steps) or (steps[-1] if steps else None)
    return best.measured if best else None, steps


def _check_options(
    in_flight: int | None, rate: float | None, knee: bool, p99: float | None, csv: Path | None, report: Path | None
) -> None:
    if knee != (p99 is not None):
        raise typer.BadParameter("--knee and --p99 go together", param_hint="--knee" if knee else "--p99")
    if in_flight is not None and (knee or rate is not None):
        raise typer.BadParameter("is of a closed loop, and --rate and --knee of an open one", param_hint="--in-flight")
    if csv is not None and csv == report:
        raise typer.BadParameter("is to be another file than that of --csv", param_hint="--report")
    if report:
        with needs_extra("report", "camserve bench --report"):
            import camserve_cli.report  # noqa: F401


def _weighted(text: str, seed: int) -> tuple[Variant, float]:
    """A method and its weight. Its label is what was given but for the weight."""
    name, colon, parameters = text.partition(":")
    name, equals, given = name.partition("=")
    try:
        weight = float(given) if equals else 1.0
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise typer.BadParameter(f"{given!r} is no weight: a number above 0", param_hint="--method")
    return read_variant(name + colon + parameters, {}, None, seed), weight


def _checked(client: Client, name: str | None, variants: Sequence[Variant], metrics: Sequence[str]) -> Model:
    """The model. Raises NotFound for an unknown name, FailedPrecondition for a method that cannot be served."""
    model = model_of(client, name)
    methods = client.methods(model.name)
    for variant in variants:
        [method] = named(methods, variant.method, "method")
        if method.unavailable:
            raise FailedPrecondition(f"{method.name} cannot be served by {model.name}: {method.unavailable}")
    known = client.metrics() if metrics else []
    for each in metrics:
        named(known, each, "metric")
    return model


def _asks(
    variant: Variant, images: Sequence[ImageLike], model: str | None, metrics: Sequence[str], budget: int | None
) -> list[Ask]:
    """Of that method, one for each image."""
    made = []
    for place, image in enumerate(images):
        call = request_messages.explain(
            image,
            model=model,
            method=variant.method,
            parameters=variant.parameters,
            metrics=metrics,
            seed=variant.seed,
            budget=budget,
            predictions=1,
        )
        made.append(Ask(variant.label, place, call.request.SerializeToString()))
    return made


def _facts(address: str, model: Model) -> dict[str, str]:
    return {
        "server": address,
        "model": model.name,
        "weights": model.digest,
        "precision": model.precision,
        "device": model.device,
        "batch sizes": ", ".join(f"{lane} {size}" for lane, size in model.batch_sizes.items()),
    }


class _Watch:
    """Shows how far a load is, and ends it by Ctrl-C; a second one ends the command."""

    def __init__(self, seconds: float) -> None:
        columns = (
            TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
            BarColumn(),
            TextColumn("{task.fields[answered]} answered, {task.fields[rate]}/s, {task.fields[pending]} on their way"),
            TextColumn("{task.fields[failed]} failed"),
        )
        console = Console(stderr=True)
        self.interrupted = False
        self._bar = ProgressBar(
            *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
        )
        self._task = self._bar.add_task("bench", total=seconds, answered=0, rate=0, pending=0, failed=0)
        self._run: Run | None = None
        self._seen = self._failed = 0

    def __enter__(self) -> _Watch:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def goes_on(self, run: Run) -> bool:
        """Show it; False once it is to end."""
        if run is not self._run:
            self._run, self._seen, self._failed = run, 0, 0
        records, now_s = run.records, run.now_s
        self._failed += sum(not each.answered for each in records[self._seen :])
        self._seen = len(records)
        lately = 0
        for each in reversed(records):
            if each.done_s < now_s - 1:
                break
            lately += each.answered
        self._bar.update(
            self._task,
            completed=now_s + run.warmup,
            answered=self._seen - self._failed,
            rate=lately,
            pending=len(run.pending),
            failed=self._failed,
        )
        return not self.interrupted

    def say(self, line: str) -> None:
        """Above the bar, on stderr."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
