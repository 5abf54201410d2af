"""`camserve token`."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Annotated

import typer

__all__ = ["token"]


def token(
    name: Annotated[str, typer.Argument(help="Name of the caller that will use the token.")],
    admin: Annotated[bool, typer.Option("--admin", help="Also allow the caller to load and unload models.")] = False,
) -> None:
    """Make a bearer token for a caller.

    The token is printed once. The server's configuration contains only its hash.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise typer.BadParameter(
            f"{name!r} is not a name; expected at most 64 letters, digits, '.', '_' and '-', "
            "of which the first is a letter or digit",
            param_hint="NAME",
        )
    # The prefix lets scanners for leaked secrets recognise the token.
    secret = f"camserve_{secrets.token_urlsafe(32)}"
    typer.echo("The token, for the caller only. It is not shown again:")
    typer.echo(f"\n{secret}\n")
    typer.echo("For the server's configuration:")
    typer.echo(f'\n[[tokens]]\nname = "{name}"\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"')
    if admin:
        typer.echo("admin = true")
