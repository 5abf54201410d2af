"""`camserve config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from camserve_cli.extras import needs_extra
from camserve_cli.output import print_table
from camserve_cli.rich_tables import plain_table

__all__ = ["config"]

config = typer.Typer(help="Check a server's configuration.", no_args_is_help=True)


@config.callback()
def _group() -> None:
    """Keep `check` as a subcommand. Without a callback, typer would replace the group by its only command."""


@config.command("check")
def check(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration file (TOML). Default: the embedded model.")
    ] = None,
) -> None:
    """Check a configuration without loading a model: its keys, files, certificates and pinned weights.

    Prints the values that are in effect, and each error on a line of its own. Exits with status 2 if there are errors.
    """
    with needs_extra("server", "camserve config check"):
        from camserve_server.config_check import check_config as run
    values, errors = run(config)
    if values:
        table = plain_table("key", "value")
        table.columns[0].no_wrap = True
        for key, value in values:
            table.add_row(escape(key), escape(value))
        print_table(table)
    for error in errors:
        typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2 if errors else 0)
