"""The command line. What it computes goes to stdout and to files; progress, warnings and errors go to stderr."""

from __future__ import annotations

from typing import Annotated

import typer

from camserve.cli.admin import admin
from camserve.cli.bench import bench
from camserve.cli.config import config
from camserve.cli.dicom import dicom
from camserve.cli.evaluate import evaluate
from camserve.cli.explain import explain
from camserve.cli.health import health
from camserve.cli.listing import list_
from camserve.cli.replay import replay
from camserve.cli.sanity import sanity
from camserve.cli.serve import serve
from camserve.cli.token import token
from camserve.version import __version__

__all__ = ["app"]

app = typer.Typer(
    help="Explain image classifiers over gRPC: Poly-CAM, Opti-CAM and the methods they compare with.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"camserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")] = False,
) -> None:
    pass


for command in (serve, explain, evaluate, sanity, replay, bench):
    app.command()(command)
app.command("list")(list_)
app.command()(token)
app.command()(health)
app.add_typer(config, name="config")
app.add_typer(admin, name="admin")
app.add_typer(dicom, name="dicom")
