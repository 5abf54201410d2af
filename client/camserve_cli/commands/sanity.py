"""`camserve sanity`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from camserve.answers import Evaluation, Randomised
from camserve_cli import rich_tables, sanity_image
from camserve_cli.options import (
    Layers,
    ModelName,
    Parameters,
    Precision,
    Seed,
    Server,
    read_parameters,
    read_target,
    with_server_options,
)
from camserve_cli.output import errors_as_lines, print_table, show_progress, warn

__all__ = ["sanity"]

METRICS = ("randomisation-spearman", "randomisation-ssim", "randomisation-hog")


class Order(Enum):
    """Orders in which the layers become random."""

    cascading = "cascading"
    independent = "independent"


@with_server_options
def sanity(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file: JPEG, PNG, WebP, BMP, GIF or TIFF.")],
    *,
    server: Server,
    model: ModelName = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Method. `camserve list methods` lists them.")
    ] = "grad-cam",
    target: Annotated[
        str | None, typer.Option(metavar="INDEX|LABEL", help="Class to explain. Default: the predicted class.")
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    order: Annotated[
        Order,
        typer.Option(
            help="cascading: a step also keeps the random layers of the steps before. independent: it has only its own."
        ),
    ] = Order.cascading,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of steps. The layers are divided evenly among them.")
    ] = 10,
    precision: Precision = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Image file to write. Default: STEM.METHOD.sanity.png.")
    ] = None,
) -> None:
    """Check that the map of a method depends on the weights of the network.

    In a copy of the network, the weights become random step by step, from the last layer to the first. The map is made
    again at each step. A map that hardly changes shows edges of the image instead of reasons of the network. See
    Sanity Checks for Saliency Maps, Adebayo et al. 2018, arXiv:1810.03292.

    The command writes an image with all maps and prints their similarity to the map of the trained network. A
    similarity of 1 means the same map.
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
            precision=precision,
            seed=seed,
        )
        checked: Evaluation = show_progress(_collect(events, maps), image.name)
        title = f"{method}, {checked.target}, {checked.receipt.model}: {order.value} randomisation, seed {seed}"
        out.parent.mkdir(parents=True, exist_ok=True)
        sanity_image.draw(checked, maps, title).save(out)
    warn(image, checked)
    table = rich_tables.plain_table("step", "layers", "rank correlation", "SSIM", "HOG")
    for each in maps:
        layers = each.layers[0] if len(each.layers) == 1 else f"{each.layers[0]} … {each.layers[-1]}"
        table.add_row(f"{each.index + 1}", layers, *(f"{v:.3f}" for v in (each.spearman, each.ssim, each.hog)))
    table.add_row("mean", "", *(f"{checked.scores[name]:.3f}" for name in METRICS))
    print_table(table)
    typer.echo(f"{out}")


def _collect(events: Iterable[Any], maps: list[Randomised]) -> Iterator[Any]:
    """Yield the events, and append those with maps to the list."""
    for event in events:
        if isinstance(event, Randomised):
            maps.append(event)
        yield event
