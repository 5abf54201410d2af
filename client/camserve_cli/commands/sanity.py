"""`camserve sanity`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from camserve.answers import Evaluation, Randomised
from camserve_cli import rich_tables, sanity_picture
from camserve_cli.options import Layers, ModelName, Parameters, Seed, Server, asks, read_parameters, read_target
from camserve_cli.output import errors_as_lines, followed, warn

__all__ = ["sanity"]

METRICS = ("randomisation-spearman", "randomisation-ssim", "randomisation-hog")


class Order(Enum):
    """Which layers are random at a step."""

    cascading = "cascading"
    independent = "independent"


@asks
def sanity(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG, WebP, BMP, GIF or TIFF.")],
    *,
    server: Server,
    model: ModelName = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="`camserve list methods` lists them.")] = "grad-cam",
    target: Annotated[
        str | None, typer.Option(metavar="INDEX|LABEL", help="What it explains. Default: the predicted class.")
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    order: Annotated[
        Order,
        typer.Option(help="cascading: all layers from the last one to that of the step; independent: those alone."),
    ] = Order.cascading,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="To which the layers are dealt out evenly.")] = 10,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="The picture. Default: STEM.METHOD.sanity.png.")
    ] = None,
) -> None:
    """Check that a method's map depends on what the network has learnt.

    The weights of a copy of the network become random, layer by layer from the last one to the first, and the map is
    made again at each step. Where it hardly changes it shows the image's edges rather than the network's reasons:
    Sanity Checks for Saliency Maps, Adebayo et al. 2018, arXiv:1810.03292.

    Writes a picture of all maps with their likeness to that of the trained network, 1 for the same map, and prints the
    figures.
    """
    out = out or Path(f"{image.stem}.{method}.sanity.png")
    maps: list[Randomised] = []
    with errors_as_lines(), server.client() as client:
        events = client.evaluate_stream(
            image,
            method=method,
            metrics={name: {"order": order.value, "steps": steps} for name in METRICS},
            model=model,
            target=None if target is None else read_target(target),
            layers=layer,
            parameters=read_parameters(param),
            seed=seed,
        )
        checked: Evaluation = followed(_kept(events, maps), image.name)
        title = f"{method}, {checked.target}, {checked.receipt.model}: {order.value} randomisation, seed {seed}"
        out.parent.mkdir(parents=True, exist_ok=True)
        sanity_picture.draw(checked, maps, title).save(out)
    warn(image, checked)
    table = rich_tables.plain_table("step", "layers", "rank correlation", "SSIM", "HOG")
    for each in maps:
        layers = each.layers[0] if len(each.layers) == 1 else f"{each.layers[0]} … {each.layers[-1]}"
        table.add_row(f"{each.index + 1}", layers, *(f"{v:.3f}" for v in (each.spearman, each.ssim, each.hog)))
    table.add_row("mean", "", *(f"{checked.scores[name]:.3f}" for name in METRICS))
    Console().print(table)
    typer.echo(f"{out}")


def _kept(events: Iterable[Any], maps: list[Randomised]) -> Iterator[Any]:
    """The events, those of maps also put into the list."""
    for event in events:
        if isinstance(event, Randomised):
            maps.append(event)
        yield event
