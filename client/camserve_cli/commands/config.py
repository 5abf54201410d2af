"""`camserve config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from camserve_cli.extras import needs_extra
from camserve_cli.rich_tables import plain_table

__all__ = ["config"]

config = typer.Typer(help="Look at a server's configuration.", no_args_is_help=True)


@config.callback()
def _alone() -> None:
    """Keeps `check` a command of its own; a single one would take the group's place."""


@config.command("check")
def check(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML. Default: the embedded model.")] = None,
) -> None:
    """Check a configuration without loading a model: keys, files, certificates, pinned weights."""
    with needs_extra("server", "camserve config check"):
        from camserve_server.config_check import check as run
    understood, wrong = run(config)
    if understood:
        table = plain_table("key", "value")
        table.columns[0].no_wrap = True
        for key, value in understood:
            table.add_row(escape(key), escape(value))
        Console().print(table)
    for error in wrong:
        typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2 if wrong else 0)
