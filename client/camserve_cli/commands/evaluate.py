"""`camserve evaluate`: one map, or a run over many images."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from camserve.answers import Evaluation
from camserve.batches import Variant
from camserve.client import Client
from camserve.errors import InvalidArgument
from camserve.request_messages import DEFAULT_METRICS
from camserve_cli import rich_tables, saved_maps
from camserve_cli.extras import needs_extra
from camserve_cli.options import (
    AsJson,
    Budget,
    Layers,
    Parameters,
    Priority,
    Seed,
    Server,
    asks,
    model_of,
    named,
    read_parameters,
    read_target,
    read_variant,
)
from camserve_cli.output import errors_as_lines, followed, print_json, said, warn
from camserve_cli.study import score_csv
from camserve_cli.study.annotations import read_boxes, read_labels
from camserve_cli.study.run import Run, Wanted, by_layer

__all__ = ["evaluate"]


@asks
def evaluate(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Files, or folders of them; several only with --csv.")
    ],
    *,
    saliency: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="A map to be scored, [H, W].")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:KEY=VALUE,...]", help="Or the method that makes it. With --csv may be repeated."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"May be repeated. Default: {', '.join(DEFAULT_METRICS)}."),
    ] = None,
    server: Server,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --csv may be repeated. Default: the server's first."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="INDEX|LABEL", help="What it explains. Default: the predicted class.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Lines of file,target: the target of each image.")
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    seed: Seed = 0,
    budget: Budget = None,
    priority: Priority = None,
    boxes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv|DIR",
            help="Lines of file,left,top,right,bottom in pixels, a line for each box; or a folder of Pascal VOC files.",
        ),
    ] = None,
    per_layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="With --csv: a method that is also run on the coarsest layer, on the two coarsest, and so on; "
            "a method of one layer on each. May be repeated.",
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a row for each map into it.")] = None,
    npz: Annotated[Path | None, typer.Option(metavar="FILE", help="With --csv: also write the maps into it.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page with tables, curves and all maps. Where --csv and --npz are left out, these files are "
            "FILE.csv and FILE.npz beside it.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --report: the method to compare the others with. Default: the first."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with FILE, and do what is not done in it.")] = False,
    in_flight: Annotated[int, typer.Option(metavar="N", min=1, help="With --csv: requests at a time.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Score a saliency map of an image: one in a file, or one that a method makes.

    With --csv, score the maps of all images by all methods on all models, and end with their means. A row is in the
    file as soon as it is done, and what fails is a row with its error. The same command with --resume goes on where
    the last one was interrupted, and tries again what failed; the finished file is sorted.

    With --report, also write all that into one page that needs no other file and no network. It is made from the CSV
    and the maps: the same command with --resume makes it anew without asking for what is done.
    """
    csv = csv or (report and report.with_suffix(".csv"))
    npz = npz or (report and report.with_suffix(".npz"))
    parameters = read_parameters(param)
    variants = [read_variant(each, parameters, layer, seed) for each in dict.fromkeys(method or [])]
    metrics = list(dict.fromkeys(metric or DEFAULT_METRICS))
    given = None if target is None else read_target(target)
    if csv is None:
        only_many = {
            "--labels": labels,
            "--npz": npz,
            "--resume": resume,
            "--per-layer": per_layer,
            "--against": against,
        }
        _one_only(images, variants, model, only_many)
        with errors_as_lines(), server.client() as client:
            _evaluate_one(
                client,
                images[0],
                as_json=as_json,
                saliency=None if saliency is None else saved_maps.load_map(saliency),
                method=variants[0].method if variants else None,
                metrics=metrics,
                model=model[0] if model else None,
                target=given,
                layers=layer,
                parameters=variants[0].parameters if variants else parameters,
                seed=seed,
                budget=budget,
                priority=priority,
                boxes=read_boxes(boxes, images)[0] if boxes else None,
            )
        return
    if saliency or as_json or not variants:
        raise typer.BadParameter("takes --method, and neither --saliency nor --json", param_hint="--csv")
    if labels and given is not None:
        raise typer.BadParameter("give either --target or --labels", param_hint="--labels")
    if against is not None and (report is None or against not in [each.label for each in variants]):
        raise typer.BadParameter("takes --report, and one of the --method", param_hint="--against")
    if report:
        if report in (csv, npz):
            raise typer.BadParameter("is to be another file than those of --csv and --npz", param_hint="--report")
        with needs_extra("report", "camserve evaluate --report"):
            import camserve_cli.report  # noqa: F401
    studied = [read_variant(each, parameters, layer, seed) for each in dict.fromkeys(per_layer or [])]
    with errors_as_lines(), server.client() as client:
        if report and report.exists() and not resume:
            raise InvalidArgument(f"{report} is there: make it anew by --resume, or give another file")
        found = score_csv.image_files(images)
        models = list(dict.fromkeys(model or [model_of(client, None).name]))
        _check(client, models, [*variants, *studied], metrics, truth=boxes is not None)
        wanted = Wanted(
            images=found,
            targets=[read_target(each) for each in read_labels(labels, found)] if labels else [given] * len(found),
            variants={name: [*variants, *_layered(client, name, studied)] for name in models},
            metrics=metrics,
            boxes=read_boxes(boxes, found) if boxes else None,
            budget=budget,
            priority=priority,
        )
        run = Run(client, wanted, csv, npz, resume)
        rows = _evaluate_many(run, in_flight)
        Console().print(rich_tables.means(rows, metrics))
        if report:
            _write_report(client, report, run, order=[each.label for each in variants], against=against)
        if any(row["error"] for row in rows):
            raise typer.Exit(1)


def _one_only(images: list[Path], methods: Sequence[Any], models: list[str] | None, options: dict[str, Any]) -> None:
    """Refuses what only a run over many images can do."""
    for name, given in options.items():
        if given:
            raise typer.BadParameter("goes with --csv", param_hint=name)
    if len(images) > 1 or images[0].is_dir() or len(methods) > 1 or len(models or []) > 1:
        raise typer.BadParameter("several images, methods or models need a file for their scores", param_hint="--csv")


def _evaluate_one(client: Client, image: Path, *, as_json: bool, **options: Any) -> None:
    evaluation: Evaluation = followed(client.evaluate_stream(image, **options), image.name)
    if as_json:
        print_json(saved_maps.evaluation_record(image, evaluation))
        return
    warn(image, evaluation)
    table = rich_tables.plain_table("metric", "value", "unit")
    for name, score in evaluation.scores.items():
        table.add_row(name, f"{score:.4g}", "" if score.unit == "1" else score.unit)
    typer.echo(f"{image}: {evaluation.target}, probability {evaluation.target.probability:.3f}")
    Console().print(table)


def _evaluate_many(run: Run, in_flight: int) -> list[score_csv.Row]:
    """Does what is not done; the rows of the CSV."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    failed = 0
    try:
        with ProgressBar(
            *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
        ) as bar:
            task = bar.add_task("evaluate", total=run.wanted.count, completed=len(run.done), failed=0)
            for result in run.results(in_flight):
                if result.error is not None:
                    failed += 1
                    name = run.names[result.index]
                    text = f"error: {name}, {result.model}, {result.method}: {said(result.error)}"
                    console.print(text, markup=False, highlight=False, soft_wrap=True)
                bar.update(task, advance=1, failed=failed)
        return run.finish()
    except KeyboardInterrupt:
        typer.echo(f"{run.csv} keeps what is done: the same command with --resume goes on", err=True)
        raise


def _write_report(client: Client, path: Path, run: Run, **options: Any) -> None:
    from camserve_cli import report

    console = Console(stderr=True)
    with console.status(f"writing {escape(str(path))}"):
        report.write(
            path,
            csv=run.csv,
            npz=run.npz,
            models=client.models(),
            methods=client.methods(),
            metrics=client.metrics(),
            command=shlex.join(["camserve", *(each for each in sys.argv[1:] if each != "--resume")]),
            **options,
        )


def _layered(client: Client, model: str, studied: list[Variant]) -> list[Variant]:
    of = model_of(client, model)
    methods = {method.name: method for method in client.methods()} if studied else {}
    return [each for variant in studied for each in by_layer(variant, methods[variant.method], of)]


def _check(client: Client, models: list[str], variants: list[Variant], metrics: list[str], *, truth: bool) -> None:
    """What would fail with every image. Raises NotFound for an unknown name, InvalidArgument where truth is needed."""
    known = client.metrics()
    for model in models:
        named(client.models(), model, "model")
    methods = client.methods()
    for variant in variants:
        named(methods, variant.method, "method")
    for name in metrics:
        [metric] = named(known, name, "metric")
        if metric.needs_truth and not truth:
            raise InvalidArgument(f"{name} needs to know where the target is: give --boxes", field="truth")
