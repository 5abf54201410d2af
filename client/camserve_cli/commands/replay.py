"""`camserve replay`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from camserve.answers import Replay
from camserve.receipt import Receipt
from camserve_cli import rich_tables, saved_maps
from camserve_cli.options import Server, asks
from camserve_cli.output import errors_as_lines, followed

__all__ = ["replay"]


@asks
def replay(
    receipt: Annotated[
        Path, typer.Argument(metavar="RECEIPT", help="STEM.json, or another file with a receipt in it; - for stdin.")
    ],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The one that was explained.")],
    *,
    saliency: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.npy", help="The map as it was, repeated for several. Default: beside RECEIPT."),
    ] = None,
    server: Server,
) -> None:
    """Make the map of a receipt again, and say whether it is the same.

    RECEIPT is a STEM.json that `camserve explain` wrote, a line that it or `camserve evaluate` printed with --json, or
    a receipt alone. The server is asked for the same map: model, method, parameters, layers, targets, seed, budget and
    batch sizes.

    Exits with 0 if the map is the same, bit for bit. Otherwise with 1, and shows what differs between the receipts
    and, where the map was saved as STEM.npy beside STEM.json, STEM.INDEX.npy for several, or is given by --saliency,
    how far it is from this one.
    """
    with errors_as_lines(), server.client() as client:
        then = Receipt.from_json(sys.stdin.buffer.read() if str(receipt) == "-" else receipt.read_bytes())
        if saliency and len(saliency) != len(then.targets):
            raise typer.BadParameter(f"the receipt is of {len(then.targets)} maps", param_hint="--saliency")
        paths = saliency or saved_maps.saved_maps(receipt, then.targets)
        saved = [None if path is None else saved_maps.load_map(path) for path in paths]
        again: Replay = followed(client.replay_stream(then, image), image.name)
    _report(again)
    if not again.same:
        deviations = rich_tables.deviations(again, saved)
        if deviations.row_count:
            Console().print("", deviations)
        raise typer.Exit(1)


def _report(again: Replay) -> None:
    if {"input_digest", "preprocessing"} <= again.differences.keys():
        typer.echo("another input: the image was preprocessed in another way")
    elif "input_digest" in again.differences:
        typer.echo("another image: the model saw another input than the receipt's")
    map_or_maps = "map" if len(again.explanation.maps) == 1 else "maps"
    typer.echo(f"the same {map_or_maps}, bit for bit" if again.same else f"not the same {map_or_maps}")
    if again.differences:
        Console().print("", rich_tables.differences(again))
