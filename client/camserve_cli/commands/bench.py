"""`camserve bench`."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

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
from camserve_cli.load import result as load_result
from camserve_cli.load.knee import Step, best_step
from camserve_cli.load.measure import Load
from camserve_cli.load.mix import Mix, PreparedRequest, photograph
from camserve_cli.load.sender import LoadRun, Sender
from camserve_cli.load.stats import Measurement
from camserve_cli.options import (
    Budget,
    MapDtype,
    ModelName,
    NativeMaps,
    Precision,
    Seed,
    Server,
    read_variant,
    select_model,
    select_named,
    with_server_options,
)
from camserve_cli.output import errors_as_lines, print_json, print_table
from camserve_cli.study import image_files

__all__ = ["bench"]


class Arrivals(Enum):
    """Distributions of the send times in an open loop."""

    poisson = "poisson"
    constant = "constant"


@with_server_options
def bench(
    *,
    server: Server,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT][:KEY=VALUE,...]",
            help="Method to request, with its weight in the mix (default 1) and its parameters. May be repeated. "
            "Default: grad-cam.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Image or folder of images, sent in equal shares. May be repeated. "
            "Default: a synthetic image of 512 × 384 pixels.",
        ),
    ] = None,
    model: ModelName = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Metric that scores each map. May be repeated.")
    ] = None,
    precision: Precision = None,
    budget: Budget = None,
    map_dtype: MapDtype = None,
    native_maps: NativeMaps = False,
    in_flight: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Closed loop: keep N requests pending. Default: 8, without --rate."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(metavar="R", min=1e-3, help="Open loop: send R requests per second. With --knee, the first rate."),
    ] = None,
    arrivals: Annotated[
        Arrivals, typer.Option(help="Send times of an open loop: at random (poisson) or at equal intervals (constant).")
    ] = Arrivals.poisson,
    knee: Annotated[
        bool, typer.Option("--knee", help="Find the highest rate whose 99th percentile of latency is within --p99.")
    ] = False,
    p99: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=1e-6, help="With --knee: bound of the 99th percentile of latency."),
    ] = None,
    duration: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Duration of the measurement. With --knee, of each rate.")
    ] = 10.0,
    warmup: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="Time before the measurement. Its requests are left out."),
    ] = 2.0,
    connections: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=256, help="Number of connections. Requests use them in turn."),
    ] = 4,
    seed: Seed = 0,
    metrics_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Address of the server's Prometheus metrics. If given, the result includes the share of real rows in "
            "the batches.",
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a CSV file with one row for each request.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write an HTML page with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")] = False,
) -> None:
    """Measure how fast a server answers under load.

    In a closed loop (--in-flight), each answer makes room for the next request. In an open loop (--rate), requests are
    sent at times that do not depend on the answers, and a latency begins at the intended send time. If the server
    stalls, the waiting time of later requests is therefore part of the percentiles.

    With --knee, the command finds the highest rate of an open loop at which 99 % of the requests are answered within
    --p99 seconds.

    Ctrl-C ends the measurement and prints the results so far. A second Ctrl-C ends the command.
    """
    _check_options(in_flight, rate, knee, p99, csv, report)
    weighted = [_weighted(each, seed) for each in method or ["grad-cam"]]
    if len({variant.label for variant, _ in weighted}) < len(weighted):
        raise typer.BadParameter("two of the methods are the same; give each method once", param_hint="--method")
    with errors_as_lines():
        for path in filter(None, (csv, report)):
            if path.exists():
                raise InvalidArgument(f"{path} exists; choose another file")
        with server.client() as client:
            served = _check_names(client, model, [variant for variant, _ in weighted], metric or [])
        images = image_files.find_images(image or [])
        fields = {
            "model": model,
            "metrics": metric or [],
            "precision": precision,
            "budget": budget,
            "map_dtype": map_dtype,
            "native_maps": native_maps,
        }
        mix = Mix(
            [_prepare(variant, images or [photograph()], fields) for variant, _ in weighted],
            [weight for _, weight in weighted],
        )
        with _LoadMonitor(warmup + duration) as monitor:
            load = Load(mix, warmup, duration, seed, metrics_url, monitor.should_continue)
            loop = _Loop(in_flight or 8, rate, arrivals is Arrivals.constant, p99)
            measured, steps = asyncio.run(_measure(server, connections, load, loop, monitor))
        if measured is None or not measured.seconds:
            typer.echo("cancelled before the end of the warm-up; there are no results", err=True)
            raise typer.Exit(130)
        result = load_result.LoadResult(
            measured,
            methods=mix.methods,
            steps=steps,
            bound_s=p99,
            facts={
                "load": str(loop),
                "methods": ", ".join(f"{variant.label} ({weight:g})" for variant, weight in weighted),
                "images": f"{len(images)} files" if images else "synthetic, 512 × 384 pixels",
                "metrics": ", ".join(metric or []) or "none",
                "budget": "none" if budget is None else f"{budget} rows",
                "maps": f"{map_dtype or 'float32'}, {'native resolution' if native_maps else 'input size'}",
                "measured": f"{measured.seconds:.0f} s, after {warmup:g} s of warm-up",
                "connections": str(connections),
                "seed": str(seed),
                **_facts(server.address, served, precision),
            },
            interrupted=monitor.interrupted,
        )
        if csv:
            load_result.write_csv(csv, [step.measured for step in steps] or [measured])
        if as_json:
            print_json(load_result.to_json(result))
        else:
            print_table(load_result.render_tables(result))
        for note in load_result.notes(result):
            typer.echo(f"note: {note}", err=True)
        if report:
            load_result.write_report(report, result, shlex.join(["camserve", *sys.argv[1:]]))
        if monitor.interrupted:
            raise typer.Exit(130)


@dataclass(frozen=True)
class _Loop:
    """Kind of the load: an open loop if there is a rate or a bound of the knee, else a closed loop."""

    in_flight: int
    rate: float | None
    even: bool
    bound_s: float | None

    def __str__(self) -> str:
        if self.rate is None and self.bound_s is None:
            return f"closed loop, {self.in_flight} in flight"
        kind = f"{self.rate:g}/s" if self.bound_s is None else f"knee, p99 within {self.bound_s:g} s"
        return f"open loop, {kind}, {'constant' if self.even else 'poisson'} arrivals"


async def _measure(
    server: Server, connections: int, load: Load, loop: _Loop, monitor: _LoadMonitor
) -> tuple[Measurement | None, list[Step]]:
    """Return the measurement and the rates of the search for the knee.

    For a knee, the measurement is the one at the highest rate that met the bound, or else at the last rate.
    """
    load = replace(load, senders=[server.connection(Sender) for _ in range(connections)])
    steps: list[Step] = []
    try:
        if loop.bound_s is None and loop.rate is None:
            return await measure.run_closed_loop(load, loop.in_flight), []
        if loop.bound_s is None:
            return await measure.run_open_loop(load, loop.rate or 1.0, even=loop.even), []
        async for step in measure.search_knee(load, loop.bound_s, loop.rate or 1.0, even=loop.even):
            monitor.print_line(load_result.step_line(step))
            steps.append(step)
    finally:
        for sender in load.senders:
            await sender.close()
    best = best_step(steps) or (steps[-1] if steps else None)
    return best.measured if best else None, steps


def _check_options(
    in_flight: int | None, rate: float | None, knee: bool, p99: float | None, csv: Path | None, report: Path | None
) -> None:
    if knee != (p99 is not None):
        raise typer.BadParameter("--knee and --p99 must be given together", param_hint="--knee" if knee else "--p99")
    if in_flight is not None and (knee or rate is not None):
        raise typer.BadParameter(
            "a closed loop cannot be combined with --rate or --knee, which are open loops", param_hint="--in-flight"
        )
    if csv is not None and csv == report:
        raise typer.BadParameter("must be another file than that of --csv", param_hint="--report")
    if report:
        with needs_extra("report", "camserve bench --report"):
            import camserve_cli.report  # noqa: F401


def _weighted(text: str, seed: int) -> tuple[Variant, float]:
    """Parse a method and its weight. The label of the method is the text without the weight."""
    name, colon, parameters = text.partition(":")
    name, equals, weight_text = name.partition("=")
    try:
        weight = float(weight_text) if equals else 1.0
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise typer.BadParameter(f"the weight is {weight_text!r}; expected a number above 0", param_hint="--method")
    return read_variant(name + colon + parameters, {}, None, seed), weight


def _check_names(client: Client, name: str | None, variants: Sequence[Variant], metrics: Sequence[str]) -> Model:
    """Check the names of methods and metrics, and return the model.

    Raises:
        NotFound: A name is unknown.
        FailedPrecondition: The model cannot serve a method.
    """
    model = select_model(client, name)
    methods = client.methods(model.name)
    for variant in variants:
        [method] = select_named(methods, variant.method, "method")
        if method.unavailable:
            raise FailedPrecondition(
                f"the model {model.name} cannot serve the method {method.name}: {method.unavailable}"
            )
    known_metrics = client.metrics() if metrics else []
    for each in metrics:
        select_named(known_metrics, each, "metric")
    return model


def _prepare(variant: Variant, images: Sequence[ImageLike], fields: Mapping[str, Any]) -> list[PreparedRequest]:
    """Return one request by the method for each image."""
    prepared = []
    for index, image in enumerate(images):
        call = request_messages.explain(
            image,
            method=variant.method,
            parameters=variant.parameters,
            seed=variant.seed,
            predictions=1,
            **fields,
        )
        prepared.append(PreparedRequest(variant.label, index, call.request.SerializeToString()))
    return prepared


def _facts(address: str, model: Model, precision: str | None) -> dict[str, str]:
    sizes = model.batch_sizes if precision in (None, model.precision) else {}  # the catalogue names no others
    return {
        "server": address,
        "model": model.name,
        "weights": model.digest,
        "precision": precision or model.precision,
        "device": model.device,
        "batch sizes": ", ".join(f"{lane} {size}" for lane, size in sizes.items()) or "unknown",
    }


class _LoadMonitor:
    """Progress bar of a load, and handler of Ctrl-C. A second Ctrl-C ends the command."""

    def __init__(self, seconds: float) -> None:
        columns = (
            TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
            BarColumn(),
            TextColumn("{task.fields[answered]} answered, {task.fields[rate]}/s, {task.fields[pending]} pending"),
            TextColumn("{task.fields[failed]} failed"),
        )
        console = Console(stderr=True)
        self.interrupted = False
        self._bar = ProgressBar(
            *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
        )
        self._task = self._bar.add_task("bench", total=seconds, answered=0, rate=0, pending=0, failed=0)
        self._run: LoadRun | None = None
        self._seen = self._failed = 0

    def __enter__(self) -> _LoadMonitor:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def should_continue(self, run: LoadRun) -> bool:
        """Show the progress, and return False if the load must end."""
        if run is not self._run:
            self._run, self._seen, self._failed = run, 0, 0
        records, now_s = run.records, run.now_s
        self._failed += sum(not each.answered for each in records[self._seen :])
        self._seen = len(records)
        recent = 0
        for each in reversed(records):
            if each.done_s < now_s - 1:
                break
            recent += each.answered
        self._bar.update(
            self._task,
            completed=now_s + run.warmup,
            answered=self._seen - self._failed,
            rate=recent,
            pending=len(run.pending),
            failed=self._failed,
        )
        return not self.interrupted

    def print_line(self, line: str) -> None:
        """Print a line on stderr above the bar."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
