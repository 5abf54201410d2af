"""`camserve evaluate`, for one map or for many images."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from camserve.answers import Evaluation
from camserve.batches import Variant
from camserve.client import Client
from camserve.errors import InvalidArgument
from camserve.request_messages import DEFAULT_METRICS
from camserve_cli import rich_tables, saved_maps
from camserve_cli.commands import evaluate_on_ray
from camserve_cli.extras import needs_extra
from camserve_cli.options import (
    AsJson,
    Budget,
    Layers,
    MapDtype,
    NativeMaps,
    Parameters,
    Precision,
    Priority,
    RayOptions,
    Seed,
    Server,
    read_parameters,
    read_target,
    read_variant,
    select_model,
    select_named,
    with_ray_options,
    with_server_options,
)
from camserve_cli.output import Failures, errors_as_lines, map_bar, print_json, print_table, show_progress, warn
from camserve_cli.study import image_files, score_csv
from camserve_cli.study.annotations import read_boxes, read_labels
from camserve_cli.study.run import StudyRun, StudySpec, by_layer

__all__ = ["evaluate"]

DEFAULT_IN_FLIGHT = 8


@with_ray_options
@with_server_options
def evaluate(
    context: typer.Context,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE...", help="Image files, or folders of images. Several images need --csv."),
    ],
    *,
    saliency: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="Map to score (array [H, W]) instead of a method.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="Method whose map is scored, with its parameters. May be repeated with --csv.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Metric. May be repeated. Default: {', '.join(DEFAULT_METRICS)}."),
    ] = None,
    server: Server,
    on_ray: RayOptions,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Model to explain. May be repeated with --csv. Default: the server's first model."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="INDEX|LABEL", help="Class to explain. Default: the predicted class.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="CSV file with the columns file,target: the class of each image."),
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    precision: Precision = None,
    seed: Seed = 0,
    budget: Budget = None,
    priority: Priority = None,
    map_dtype: MapDtype = None,
    native_maps: NativeMaps = False,
    boxes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv|DIR",
            help="Boxes around the targets, for metrics that need them: a CSV file with the columns "
            "file,left,top,right,bottom in pixels and one line for each box, or a folder of Pascal VOC files.",
        ),
    ] = None,
    per_layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="With --csv: study a method by layer. It also runs on the coarsest layer, on the two coarsest layers, "
            "and so on; a method of one layer runs on each layer. May be repeated.",
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a CSV file with one line for each map.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --csv: also write the maps to an npz file.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write an HTML page with tables, curves and the maps of up to 200 images. Without --csv "
            "and --npz, their files are FILE.csv and FILE.npz beside it.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --report: label of the method with which the others are compared. Default: the first method.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue with existing files, and compute only missing maps.")
    ] = False,
    in_flight: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --csv: number of pending requests, by default 8. With --ray: number of images in progress on "
            "each engine, by default 32.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a map from a file, or the maps of one or more methods.

    With --csv, the command scores the maps of all images by all methods on all models, and ends with the mean scores.
    Each line is written as soon as it is finished, and a failure becomes a line with its error. The same command with
    --resume continues an interrupted run and tries failures again. The finished file is sorted.

    With --report, the command also writes one HTML page that needs no other file and no network. The page is made from
    the CSV file and the maps, so the same command with --resume can write it again without repeating finished requests.

    With --ray, the devices of a Ray cluster evaluate the images, without a server. The scores are in Parquet files and
    the maps in npz files in the folder of --out. The same command continues an interrupted run and tries failures
    again.
    """
    if evaluate_on_ray.is_wanted(context, on_ray):
        evaluate_on_ray.run(
            images,
            on_ray,
            methods=method or [],
            metrics=metric,
            models=model,
            target=target,
            labels=labels,
            boxes=boxes,
            layers=layer,
            parameters=param,
            seed=seed,
            budget=budget,
            in_flight=in_flight,
        )
        return
    csv = csv or (report and report.with_suffix(".csv"))
    npz = npz or (report and report.with_suffix(".npz"))
    parameters = read_parameters(param)
    variants = [read_variant(each, parameters, layer, seed) for each in dict.fromkeys(method or [])]
    metrics = list(dict.fromkeys(metric or DEFAULT_METRICS))
    chosen = None if target is None else read_target(target)
    if csv is None:
        study_options = {
            "--labels": labels,
            "--npz": npz,
            "--resume": resume,
            "--per-layer": per_layer,
            "--against": against,
        }
        _require_single(images, variants, model, study_options)
        with errors_as_lines(), server.client() as client:
            _evaluate_one(
                client,
                images[0],
                as_json=as_json,
                saliency=None if saliency is None else saved_maps.load_map(saliency),
                method=variants[0].method if variants else None,
                metrics=metrics,
                model=model[0] if model else None,
                target=chosen,
                layers=layer,
                parameters=variants[0].parameters if variants else parameters,
                seed=seed,
                precision=precision,
                budget=budget,
                priority=priority,
                map_dtype=map_dtype,
                native_maps=native_maps,
                boxes=read_boxes(boxes, images)[0] if boxes else None,
            )
        return
    if saliency or as_json or not variants:
        raise typer.BadParameter("--csv and --report need --method and cannot be used with --saliency or --json")
    if labels and chosen is not None:
        raise typer.BadParameter("--target and --labels cannot be used together; give one of them")
    if against is not None and (report is None or against not in [each.label for each in variants]):
        raise typer.BadParameter("--against needs --report and one of the values of --method")
    if report:
        if report in (csv, npz):
            raise typer.BadParameter("--report names the same file as --csv or --npz; choose another file")
        with needs_extra("report", "camserve evaluate --report"):
            import camserve_cli.report  # noqa: F401
    by_layer_variants = [read_variant(each, parameters, layer, seed) for each in dict.fromkeys(per_layer or [])]
    with errors_as_lines(), server.client() as client:
        if report and report.exists() and not resume:
            raise InvalidArgument(f"{report} exists; write it again with --resume, or choose another file")
        files = image_files.find_images(images)
        models = list(dict.fromkeys(model or [select_model(client, None).name]))
        _check_names(client, models, [*variants, *by_layer_variants], metrics, has_boxes=boxes is not None)
        spec = StudySpec(
            images=files,
            targets=[read_target(each) for each in read_labels(labels, files)] if labels else [chosen] * len(files),
            variants={name: [*variants, *_by_layer(client, name, by_layer_variants)] for name in models},
            metrics=metrics,
            boxes=read_boxes(boxes, files) if boxes else None,
            precision=precision,
            budget=budget,
            priority=priority,
            map_dtype=map_dtype,
            native_maps=native_maps,
        )
        run = StudyRun(client, spec, csv, npz, resume)
        rows = _evaluate_many(run, in_flight or DEFAULT_IN_FLIGHT)
        print_table(rich_tables.means(rows, metrics))
        if report:
            _write_report(client, report, run, order=[each.label for each in variants], against=against)
        if any(row["error"] for row in rows):
            raise typer.Exit(1)


def _require_single(
    images: list[Path], methods: Sequence[Any], models: list[str] | None, options: dict[str, Any]
) -> None:
    """Raise typer.BadParameter for options and arguments that need --csv."""
    for name, value in options.items():
        if value:
            needed = "--report" if name == "--against" else "--csv or --report"
            raise typer.BadParameter(f"{name} needs {needed}")
    if len(images) > 1 or images[0].is_dir() or len(methods) > 1 or len(models or []) > 1:
        raise typer.BadParameter("several images, methods or models need --csv or --report, a file for their scores")


def _evaluate_one(client: Client, image: Path, *, as_json: bool, **options: Any) -> None:
    evaluation: Evaluation = show_progress(client.evaluate_stream(image, **options), image.name)
    if as_json:
        print_json(saved_maps.evaluation_record(image, evaluation))
        return
    warn(image, evaluation)
    table = rich_tables.plain_table("metric", "value", "unit")
    for name, score in evaluation.scores.items():
        table.add_row(name, f"{score:.4g}", "" if score.unit == "1" else score.unit)
    typer.echo(f"{image}: {evaluation.target}, probability {evaluation.target.probability:.3f}")
    print_table(table)


def _evaluate_many(run: StudyRun, in_flight: int) -> list[score_csv.Row]:
    """Compute the missing maps, and return the lines of the CSV file."""
    failures = Failures()
    try:
        with map_bar(run.spec.count, len(run.done)) as advance:
            for result in run.results(in_flight):
                if result.error is not None:
                    failures.add(f"{run.names[result.index]}, {result.model}, {result.method}", result.error)
                advance(failures.count)
        return run.finish()
    except KeyboardInterrupt:
        typer.echo(f"{run.csv} contains the finished lines; continue with the same command and --resume", err=True)
        raise
    finally:
        failures.print_summary()


def _write_report(client: Client, path: Path, run: StudyRun, **options: Any) -> None:
    from camserve_cli import report

    assert run.npz is not None, "--report implies --npz"
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


def _by_layer(client: Client, model: str, variants: list[Variant]) -> list[Variant]:
    described = select_model(client, model)
    methods = {method.name: method for method in client.methods()} if variants else {}
    return [each for variant in variants for each in by_layer(variant, methods[variant.method], described)]


def _check_names(
    client: Client, models: list[str], variants: list[Variant], metrics: list[str], *, has_boxes: bool
) -> None:
    """Find mistakes that would make every image fail.

    Raises:
        NotFound: The name of a model, method or metric is unknown.
        InvalidArgument: A metric needs boxes, and there are none.
    """
    known_metrics = client.metrics()
    for model in models:
        select_named(client.models(), model, "model")
    methods = client.methods()
    for variant in variants:
        select_named(methods, variant.method, "method")
    for name in metrics:
        [metric] = select_named(known_metrics, name, "metric")
        if metric.needs_truth and not has_boxes:
            raise InvalidArgument(f"the metric {name} needs the position of the target; give --boxes", field="truth")
