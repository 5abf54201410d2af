"""`camserve evaluate --ray`."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from camserve.errors import InvalidArgument
from camserve.request_messages import DEFAULT_METRICS
from camserve_cli import rich_tables
from camserve_cli.extras import needs_extra
from camserve_cli.options import RayOptions, read_parameters, read_target, read_variant
from camserve_cli.output import Failures, errors_as_lines, map_bar, print_table
from camserve_cli.study.annotations import read_boxes, read_labels

if TYPE_CHECKING:
    from camserve_ray.bulk import BulkImage, BulkRun

__all__ = ["is_wanted", "run"]

_RAY = tuple(field.name for field in fields(RayOptions))
# Options that have the same meaning with and without a server.
_SHARED = (
    *("images", "method", "metric", "model", "target", "labels", "layer", "param", "seed", "budget", "boxes"),
    *("resume", "in_flight"),
)


def is_wanted(context: typer.Context, options: RayOptions) -> bool:
    """Return True if the command shall run on Ray.

    Raises:
        typer.BadParameter: An option is given that needs --ray, or that cannot be used with it.
    """
    given = [
        parameter
        for parameter in context.command.params
        if parameter.name and getattr(context.get_parameter_source(parameter.name), "name", "") == "COMMANDLINE"
    ]
    for parameter in given:
        option = parameter.opts[0]
        if options.ray is None and parameter.name in _RAY:
            raise typer.BadParameter(f"{option} needs --ray")
        if options.ray is not None and parameter.name not in (*_RAY, *_SHARED):
            raise typer.BadParameter(
                f"{option} cannot be used with --ray, which uses no server and writes to the folder of --out"
            )
    if options.ray is not None and options.out is None:
        raise typer.BadParameter("--ray needs --out, a folder for the scores and maps")
    return options.ray is not None


def run(
    paths: Sequence[Path],
    options: RayOptions,
    *,
    methods: Sequence[str],
    metrics: Sequence[str] | None,
    models: Sequence[str] | None,
    target: str | None,
    labels: Path | None,
    boxes: Path | None,
    layers: list[str] | None,
    parameters: list[str] | None,
    seed: int,
    budget: int | None,
    in_flight: int | None,
) -> None:
    """Evaluate images on a Ray cluster, and print the mean scores. The arguments are options of `camserve evaluate`.

    Raises:
        typer.BadParameter: Options contradict each other.
        typer.Exit: An image failed, or the run failed.
    """
    if not methods:
        raise typer.BadParameter("--ray needs --method")
    if target is not None and (labels or options.target_column):
        raise typer.BadParameter("--target cannot be used together with --labels or --target-column; give one of them")
    read = read_parameters(parameters)
    variants = [read_variant(each, read, layers, seed) for each in dict.fromkeys(methods)]
    names = list(dict.fromkeys(metrics or DEFAULT_METRICS))
    with needs_extra("ray", "camserve evaluate --ray"):
        from camserve_ray import bulk

        if find_spec("ray") is None:  # `bulk` imports it later
            raise ModuleNotFoundError(name="ray")
    assert options.ray is not None and options.out is not None, "is_wanted has checked the options"
    with errors_as_lines():
        with needs_extra("dicom", "camserve evaluate --ray with DICOM files"):
            images = bulk.find_images(
                paths,
                target=None if target is None else read_target(target),
                image_column=options.image_column,
                name_column=options.name_column,
                target_column=options.target_column,
                out=options.out,
            )
        started = bulk.start(
            _annotated(images, labels, boxes),
            options.out,
            methods=variants,
            metrics=names,
            models=list(dict.fromkeys(models or [])),
            config=options.config,
            budget=budget,
            maps=not options.no_maps,
            image_column=options.image_column,
            address=options.ray,
            in_flight=in_flight or bulk.DEFAULT_IN_FLIGHT,
            cpus_per_engine=options.cpus_per_engine,
        )
        rows = _evaluate(started, names)
    print_table(rich_tables.means(rows, names))
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def _annotated(images: Sequence[BulkImage], labels: Path | None, boxes: Path | None) -> list[BulkImage]:
    """Return the images with the targets and the boxes of annotation files."""
    if (labels or boxes) and any(each.kind in ("parquet", "tar") for each in images):
        raise InvalidArgument(
            "--labels and --boxes name files, which images in Parquet files and archives are not; give --target-column "
            "for their targets"
        )
    paths = [Path(each.path) for each in images]
    annotated = [*images]
    if labels:
        annotated = [
            replace(each, target=read_target(text))
            for each, text in zip(annotated, read_labels(labels, paths), strict=True)
        ]
    if boxes:
        annotated = [
            replace(each, boxes=found) for each, found in zip(annotated, read_boxes(boxes, paths), strict=True)
        ]
    return annotated


def _evaluate(run: BulkRun, metrics: Sequence[str]) -> list[dict[str, object]]:
    """Evaluate the missing images, and return the columns of all rows that the summary needs."""
    failures = Failures()
    _log_progress()
    try:
        with _ended_by_sigterm(), map_bar(run.count, run.done) as advance:
            for row in run.results():
                if row.values["error"]:
                    subject = ", ".join(row.values[name] for name in ("image", "model", "method"))
                    failures.add_text(subject, row.values["error"], row.reason)
                advance(failures.count)
        return run.rows(["model", "method", "error", *metrics])
    except (KeyboardInterrupt, SystemExit):
        typer.echo(f"{run.folder} contains the finished images; continue with the same command", err=True)
        raise
    finally:
        run.close()
        failures.print_summary()


def _log_progress() -> None:
    """Print the messages of the run about its progress on stderr, unless a terminal shows the progress bar there."""
    logger = logging.getLogger("camserve_ray.bulk.run")
    if not Console(stderr=True).is_terminal and not logger.handlers:
        logger.setLevel(logging.INFO)
        logger.addHandler(logging.StreamHandler())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command like Ctrl-C, so that it writes the finished images.

    A second signal ends it at once.
    """

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
