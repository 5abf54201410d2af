"""`camserve token`."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Annotated

import typer

__all__ = ["token"]


def token(
    name: Annotated[str, typer.Argument(help="Of the caller that will have it.")],
    admin: Annotated[bool, typer.Option("--admin", help="Also let it load and unload models.")] = False,
) -> None:
    """Make a bearer token: it is shown once, and the server's configuration has only its hash."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise typer.BadParameter("letters, digits, '.', '_' and '-', 64 of them at most", param_hint="NAME")
    made = f"camserve_{secrets.token_urlsafe(32)}"  # so that scanners of leaked secrets can know it
    typer.echo("The token, for the caller alone. It is not shown again:")
    typer.echo(f"\n{made}\n")
    typer.echo("For the server's configuration:")
    typer.echo(f'\n[[tokens]]\nname = "{name}"\nsha256 = "{hashlib.sha256(made.encode()).hexdigest()}"')
    if admin:
        typer.echo("admin = true")
