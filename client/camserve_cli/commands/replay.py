"""`camserve replay`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from camserve.answers import Replay
from camserve.receipt import Receipt
from camserve_cli import rich_tables, saved_maps
from camserve_cli.options import Server, with_server_options
from camserve_cli.output import errors_as_lines, print_table, show_progress

__all__ = ["replay"]


@with_server_options
def replay(
    receipt: Annotated[
        Path,
        typer.Argument(metavar="RECEIPT", help="STEM.json or another file that contains a receipt. - reads stdin."),
    ],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image that was explained.")],
    *,
    saliency: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.npy",
            help="Saved map to compare with. Repeat it for each map of the receipt. Default: the files beside RECEIPT.",
        ),
    ] = None,
    server: Server,
) -> None:
    """Make the map of a receipt again, and check that it is the same.

    RECEIPT is a STEM.json file of `camserve explain`, a line that `camserve explain --json` or
    `camserve evaluate --json` printed, or a receipt alone. The request has the model, method, parameters, layers,
    targets, seed, precision, budget and batch sizes of the receipt.

    The exit status is 0 if the map is the same bit for bit. Otherwise it is 1, and the command shows the differences
    between the receipts. If the saved map is available, it also shows how far the two maps differ. A saved map is
    STEM.npy beside STEM.json, STEM.INDEX.npy if there are several maps, or the file of --saliency.
    """
    with errors_as_lines(), server.client() as client:
        original = Receipt.from_json(sys.stdin.buffer.read() if str(receipt) == "-" else receipt.read_bytes())
        if saliency and len(saliency) != len(original.targets):
            raise typer.BadParameter(
                f"{len(saliency)} files are given; expected {len(original.targets)}, one for each map of the receipt",
                param_hint="--saliency",
            )
        paths = saliency or saved_maps.saved_maps(receipt, original.targets)
        saved = [None if path is None else saved_maps.load_map(path) for path in paths]
        result: Replay = show_progress(client.replay_stream(original, image), image.name)
    _print_result(result)
    if not result.same:
        deviations = rich_tables.deviations(result, saved)
        if deviations.row_count:
            print_table("", deviations)
        raise typer.Exit(1)


def _print_result(result: Replay) -> None:
    if {"input_digest", "preprocessing"} <= result.differences.keys():
        typer.echo("different input: the image was preprocessed in another way")
    elif "input_digest" in result.differences:
        typer.echo("different input: this is not the image of the receipt")
    map_or_maps = "map" if len(result.explanation.maps) == 1 else "maps"
    typer.echo(f"the same {map_or_maps}, bit for bit" if result.same else f"not the same {map_or_maps}")
    if result.differences:
        print_table("", rich_tables.differences(result))
    if not result.same and all(name.startswith("map_digests") for name in result.differences):
        typer.echo(
            "The receipts agree in all else. A receipt does not contain the CPU and the number of threads, which can "
            "change the last bits of a map."
        )
