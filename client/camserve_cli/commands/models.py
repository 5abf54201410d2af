"""`camserve models`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from camserve_cli import probe_image
from camserve_cli.extras import needs_extra
from camserve_cli.options import read_parameters
from camserve_cli.output import errors_as_lines, print_table, step_bar
from camserve_cli.rich_tables import plain_table

if TYPE_CHECKING:
    from camserve_server.model_probe import ModelReport

__all__ = ["models"]

models = typer.Typer(help="Examine models without a server.", no_args_is_help=True)


@models.callback()
def _group() -> None:
    """Keep `probe` as a subcommand. Without a callback, typer would replace the group by its only command."""


@models.command("probe")
def probe(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Model source, such as torchvision:resnet50.")],
    key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Further key of the model in the configuration, such as weights=FILE or allow_random_weights=true. "
            "Values are JSON or text. Can be repeated.",
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Image for the maps of the layers. Default: a generated image.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Picture to write.")] = Path("probe.png"),
) -> None:
    """Load the model of a source as a server does, and show what would be served.

    Prints the layers with their cut values, the methods, warnings, and how much the outputs differ from those of the
    original network. Writes a picture with the maps of the default layers and of all other cuts, one for each distinct
    output: the mean absolute activation over the channels. Exits with status 2 if a server would refuse the model or
    its code fails.
    """
    keys = read_parameters(key, "--key")
    with needs_extra("server", "camserve models probe"):
        from camserve_server.model_probe import STEPS
        from camserve_server.model_probe import probe_source as run
    try:
        with step_bar(source, STEPS) as on_step:
            report = run(source, keys, image, on_step)
    except ValueError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(2) from None
    with errors_as_lines():
        out.parent.mkdir(parents=True, exist_ok=True)
        probe_image.draw(report).save(out)
    print_table(_facts(report), "", _layers(report))
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{out}")


def _facts(report: ModelReport) -> Table:
    lacking = {name: reason for name, reason in report.methods.items() if reason}
    table = plain_table("property", "value")
    table.columns[0].no_wrap = True
    for name, value in report.facts.items():
        table.add_row(escape(name), escape(value))
    table.add_row("methods", ", ".join(name for name in report.methods if name not in lacking) or "none")
    for reason in dict.fromkeys(lacking.values()):
        names = ", ".join(name for name in lacking if lacking[name] == reason)
        table.add_row("not available", escape(f"{names}: {reason}"))
    return table


def _layers(report: ModelReport) -> Table:
    table = plain_table("layer", "channels", "size", "signed", "default of", "cut value")
    for each in report.layers:
        layer = each.layer
        table.add_row(
            escape(layer.name),
            f"{layer.channels:,}",
            f"{layer.height} × {layer.width}",
            "yes" if layer.signed else "",
            ", ".join(each.default_of),
            "" if layer.cut is None else f"{layer.cut:.2f}",
        )
    return table
