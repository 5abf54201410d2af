"""`camserve explain`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from camserve.answers import Explanation
from camserve.batches import MAX_ATTEMPTS, retry_wait_s
from camserve.errors import CamserveError
from camserve_cli import rich_tables, saved_maps
from camserve_cli.options import (
    DEFAULT_TIMEOUT_S,
    AsJson,
    Budget,
    Layers,
    MapDtype,
    ModelName,
    NativeMaps,
    Parameters,
    Precision,
    Priority,
    Seed,
    Server,
    read_box,
    read_parameters,
    read_target,
    with_server_options,
)
from camserve_cli.output import Failures, errors_as_lines, print_json, print_table, show_progress, warn
from camserve_cli.study.annotations import read_mask

__all__ = ["explain"]


@with_server_options
def explain(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files: JPEG, PNG, WebP, BMP, GIF or TIFF.")
    ],
    *,
    server: Server,
    model: ModelName = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Method. `camserve list methods` lists them.")
    ] = "poly-cam",
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INDEX|LABEL",
            help="Class to explain. Repeat it for several maps of each image. Default: the predicted class.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Explain the N most probable classes instead, with one map for each."),
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Metric that scores each map. May be repeated.")
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="L,T,R,B",
            help="Box around the target in pixels (left, top, right, bottom), for metrics that need it. "
            "May be repeated.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Mask of the target for such metrics: pixels that are not black."),
    ] = None,
    precision: Precision = None,
    seed: Seed = 0,
    budget: Budget = None,
    priority: Priority = None,
    map_dtype: MapDtype = None,
    native_maps: NativeMaps = False,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for the files. It is created if necessary. Default: this folder."),
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """Explain images: write a map, an overlay and a record of each.

    The files of an image are:

    - DIR/STEM.npy: the map (float32 [H, W], values in [0, 1])
    - DIR/STEM.png: the overlay
    - DIR/STEM.json: the record with the target, predictions, scores, warnings, cost, and the receipt, from which
      `camserve replay` makes the map again

    STEM is the stem of the image's file name. It is followed by -2, -3 and so on if another image has the same stem, or
    if a file would replace one of the images or a JSON file that is not a record. If there are several maps, their
    files are STEM.INDEX.npy and STEM.INDEX.png, with the class index. Files of earlier runs are replaced. If an image
    fails, the command continues with the others and exits with status 1.

    With --json, the command prints one line for each map. Maps of the same image share the cost and the request id.
    """
    if target and top_k is not None:
        raise typer.BadParameter("--target and --top-k exclude each other; give one of them", param_hint="--top-k")
    targets = [read_target(each) for each in target or []]
    metrics = list(dict.fromkeys(metric or []))
    table = rich_tables.plain_table("image", "class", "probability", "rows", "time", *metrics, "overlay")
    failures = Failures()
    many = len(images) > 1
    with errors_as_lines(), server.client(None if many else DEFAULT_TIMEOUT_S) as client:
        parameters = read_parameters(param)
        boxes = [read_box(each) for each in box] if box else None
        truth_mask = None if mask is None else read_mask(mask)
        for image, stem in zip(images, saved_maps.stems(images, out), strict=True):
            try:
                start = partial(
                    client.explain_stream,
                    image,
                    model=model,
                    method=method,
                    target=targets,
                    top_k=top_k,
                    layers=layer,
                    parameters=parameters,
                    metrics=metrics,
                    precision=precision,
                    seed=seed,
                    budget=budget,
                    priority=priority,
                    map_dtype=map_dtype,
                    native_maps=native_maps,
                    boxes=boxes,
                    mask=truth_mask,
                )
                explanation: Explanation = _wait_for(start, image.name, MAX_ATTEMPTS if many else 1)
                written = saved_maps.save(image, explanation, out, stem)
                for paths, result in zip(written, explanation.maps, strict=True):
                    if as_json:
                        print_json(
                            saved_maps.map_record(image, saved_maps.record_path(out, stem), paths, result, explanation)
                        )
                    else:
                        table.add_row(*rich_tables.map_row(image, paths[1], result, explanation, metrics))
                        warn(image, result)
            except (CamserveError, OSError) as error:
                failures.add(str(image), error)
    if table.row_count:
        print_table(table)
    failures.print_summary()
    if failures.count:
        raise typer.Exit(1)


def _wait_for(start: Callable[[], Iterator[Any]], title: str, attempts: int) -> Any:
    """Send a request up to `attempts` times while the server is busy, show its progress, and return its answer."""
    while True:
        attempts -= 1
        try:
            return show_progress(start(), title)
        except CamserveError as error:
            wait_s = retry_wait_s(error)
            if wait_s is None or not attempts:
                raise
        time.sleep(wait_s)
