"""`camserve admin`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

from camserve.admin import Admin
from camserve.catalogue import Model
from camserve_cli.options import Server, asks
from camserve_cli.output import errors_as_lines

__all__ = ["admin"]

admin = typer.Typer(help="Load and unload models of a running server.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="MODEL", help="Its name in the server's configuration file.")]


@admin.command("load")
@asks
def load(model: Name, *, server: Server) -> None:
    """Load a model, as the configuration file has it by now; --address is the server's admin_listen."""
    with errors_as_lines(), server.connection(Admin) as operator, _waiting(f"loading {model}"):
        _say(operator.load(model))


@admin.command("unload")
@asks
def unload(model: Name, *, server: Server) -> None:
    """Serve a model no more; what runs on it is finished first."""
    with errors_as_lines(), server.connection(Admin) as operator, _waiting(f"unloading {model}"):
        operator.unload(model)
        typer.echo(f"{model} is unloaded")


@admin.command("reload")
@asks
def reload(model: Name, *, server: Server) -> None:
    """Load a model anew, then serve that one; what runs on the old one is finished first."""
    with errors_as_lines(), server.connection(Admin) as operator, _waiting(f"reloading {model}"):
        _say(operator.reload(model))


def _waiting(title: str) -> Status:
    return Console(stderr=True).status(title)


def _say(model: Model) -> None:
    typer.echo(f"{model.name} is {model.state}, {model.digest}")
