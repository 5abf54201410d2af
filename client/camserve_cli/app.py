"""Typer application with all commands.

Commands write results to stdout and to files, and progress, warnings and errors to stderr.
"""

from __future__ import annotations

from typing import Annotated

import typer

from camserve.version import __version__
from camserve_cli.commands.admin import admin
from camserve_cli.commands.bench import bench
from camserve_cli.commands.config import config
from camserve_cli.commands.dicom import dicom
from camserve_cli.commands.evaluate import evaluate
from camserve_cli.commands.explain import explain
from camserve_cli.commands.health import health
from camserve_cli.commands.kserve import kserve
from camserve_cli.commands.listing import list_
from camserve_cli.commands.models import models
from camserve_cli.commands.ray import ray
from camserve_cli.commands.replay import replay
from camserve_cli.commands.sanity import sanity
from camserve_cli.commands.serve import serve
from camserve_cli.commands.token import token
from camserve_cli.commands.ui import ui

__all__ = ["app"]

app = typer.Typer(
    help="Explain image classifiers over gRPC with Poly-CAM, Opti-CAM and the methods that their papers compare with.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"camserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in (serve, explain, evaluate, sanity, replay, ui, bench):
    app.command()(command)
app.command("list")(list_)
app.command()(token)
app.command()(health)
app.command()(kserve)
app.add_typer(config, name="config")
app.add_typer(models, name="models")
app.add_typer(admin, name="admin")
app.add_typer(dicom, name="dicom")
app.add_typer(ray, name="ray")
