"""`camserve explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from camserve.answers import Explanation
from camserve.errors import CamserveError
from camserve_cli import rich_tables, saved_maps
from camserve_cli.options import (
    AsJson,
    Budget,
    Layers,
    ModelName,
    Parameters,
    Priority,
    Seed,
    Server,
    asks,
    read_box,
    read_parameters,
    read_target,
)
from camserve_cli.output import errors_as_lines, followed, print_json, said, warn
from camserve_cli.study.annotations import read_mask

__all__ = ["explain"]


@asks
def explain(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="JPEG, PNG, WebP, BMP, GIF or TIFF.")],
    *,
    server: Server,
    model: ModelName = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="`camserve list methods` lists them.")] = "poly-cam",
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="INDEX|LABEL", help="May be repeated, for a map each. Default: the predicted class."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Instead: the N likeliest classes, a map each.")
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Scores each map. May be repeated.")] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="L,T,R,B", help="Where the target is, in pixels of the image. May be repeated."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Or a picture over the image, not black where it is.")
    ] = None,
    seed: Seed = 0,
    budget: Budget = None,
    priority: Priority = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go; made if need be.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Explain images: write a map, an overlay and a record of each.

    DIR/STEM.npy is the map (float32 [H, W] in [0, 1]), DIR/STEM.png the overlay, and DIR/STEM.json the record: target,
    predictions, scores, warnings, cost, and the receipt, with which `camserve replay` makes the map again.

    STEM is the image's own, with -2, -3 … after it where another image of this run has the same, or where a file
    written would replace one of the images or a JSON file that is no record. With several maps these are STEM.INDEX.npy
    and STEM.INDEX.png, INDEX being the class index. Files of earlier runs are replaced. An image that fails does not
    stop the others.

    With --json there is a line for each map; maps of one image share the cost and the request id.
    """
    if target and top_k is not None:
        raise typer.BadParameter("give either --target or --top-k", param_hint="--top-k")
    targets = [read_target(each) for each in target or []]
    metrics = list(dict.fromkeys(metric or []))
    table = rich_tables.plain_table("image", "class", "probability", "rows", "time", *metrics, "overlay")
    failures = 0
    with errors_as_lines(), server.client() as client:
        parameters = read_parameters(param)
        boxes = [read_box(each) for each in box] if box else None
        truth_mask = None if mask is None else read_mask(mask)
        for image, stem in zip(images, saved_maps.stems(images, out), strict=True):
            try:
                events = client.explain_stream(
                    image,
                    model=model,
                    method=method,
                    target=targets,
                    top_k=top_k,
                    layers=layer,
                    parameters=parameters,
                    metrics=metrics,
                    seed=seed,
                    budget=budget,
                    priority=priority,
                    boxes=boxes,
                    mask=truth_mask,
                )
                explanation: Explanation = followed(events, image.name)
                written = saved_maps.save(image, explanation, out, stem)
                for each, shown in zip(written, explanation.maps, strict=True):
                    if as_json:
                        print_json(
                            saved_maps.map_record(image, saved_maps.record_of(out, stem), each, shown, explanation)
                        )
                    else:
                        table.add_row(*rich_tables.map_row(image, each[1], shown, explanation, metrics))
                        warn(image, shown)
            except (CamserveError, OSError) as error:
                typer.echo(f"error: {image}: {said(error)}", err=True)
                failures += 1
    if table.row_count:
        Console().print(table)
    if failures:
        raise typer.Exit(1)
