"""`camserve serve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from camserve.connection import DEFAULT_ADDRESS

__all__ = ["needs_server", "serve"]


def serve(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML. Default: the embedded model.")] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help=f"Default: {DEFAULT_ADDRESS}.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. Default: auto.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen without TLS where other machines can reach it.")
    ] = False,
) -> None:
    """Start a server, and stop it with Ctrl-C."""
    with needs_server():
        from camserve_server.__main__ import serve as run
    raise typer.Exit(run(config=config, listen=listen, device=device, insecure=insecure or None))


@contextmanager
def needs_server() -> Iterator[None]:
    """Says what to install where the server's packages are not."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith(("camserve.", "camserve_server.")):
            raise  # a bug of ours, not something to install
        typer.echo(f"error: the server needs {missing.name}: pip install 'camserve[server]'", err=True)
        raise typer.Exit(1) from None
