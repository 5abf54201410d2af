"""`camserve admin`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

from camserve.admin import Admin
from camserve.catalogue import Model
from camserve_cli.options import Server, with_server_options
from camserve_cli.output import errors_as_lines

__all__ = ["admin"]

admin = typer.Typer(
    help="Load and unload models of a running server. --address is the admin_listen address of the server.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model in the server's configuration file.")]


@admin.command("load")
@with_server_options
def load(model: Name, *, server: Server) -> None:
    """Load a model.

    The server reads its configuration file again, so a model that was added to the file can be loaded.
    """
    with errors_as_lines(), server.connection(Admin) as operator, _waiting(f"loading {model}"):
        _print_state(operator.load(model))


@admin.command("unload")
@with_server_options
def unload(model: Name, *, server: Server) -> None:
    """Unload a model after its running requests are finished."""
    with errors_as_lines(), server.connection(Admin) as operator, _waiting(f"unloading {model}"):
        operator.unload(model)
        typer.echo(f"{model} is unloaded")


@admin.command("reload")
@with_server_options
def reload(model: Name, *, server: Server) -> None:
    """Load a model again and replace the loaded one. Running requests are finished on the old one."""
    with errors_as_lines(), server.connection(Admin) as operator, _waiting(f"reloading {model}"):
        _print_state(operator.reload(model))


def _waiting(title: str) -> Status:
    return Console(stderr=True).status(title)


def _print_state(model: Model) -> None:
    typer.echo(f"{model.name} is {model.state}, {model.digest}")
