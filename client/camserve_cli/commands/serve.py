"""`camserve serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from camserve.connection import DEFAULT_ADDRESS
from camserve_cli.extras import needs_extra

__all__ = ["serve"]


def serve(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Configuration file (TOML). Default: serve the embedded model."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help=f"Address to listen on. Default: {DEFAULT_ADDRESS}.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Device: auto, cpu, cuda, cuda:N, cuda:N,M or all. Default: auto."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow connections without TLS from other machines.")
    ] = False,
) -> None:
    """Start a server. Ctrl-C stops it after the running requests are finished.

    An option overrides the same key of the configuration file.
    """
    with needs_extra("server", "camserve serve"):
        from camserve_server.__main__ import serve as run
    raise typer.Exit(run(config=config, listen=listen, device=device, insecure=insecure or None))
