"""`camserve dicom gateway`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from camserve_cli.extras import needs_extra
from camserve_cli.output import print_table
from camserve_cli.rich_tables import plain_table

__all__ = ["gateway"]


def gateway(
    config: Annotated[
        Path, typer.Option(metavar="FILE", help="Configuration file (TOML). docs/pacs.md describes its keys.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Check the configuration, print its values, and exit.")
    ] = False,
) -> None:
    """Receive images from a PACS, explain them, and store the results in the PACS. Ctrl-C stops the gateway.

    A received image stays in a spool on disk until its results are stored. The exit status is 2 if the configuration
    is wrong.
    """
    with needs_extra("gateway", "camserve dicom gateway"):
        from camserve_dicom import gateway as package
    try:
        settings = package.read(config)
        settings.check_files()
        if check:
            _print_settings(settings)
        else:
            package.run(settings, lambda address: typer.echo(f"camserve gateway is ready on {address}"))
    except package.ConfigError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(2) from None


def _print_settings(settings: object) -> None:
    table = plain_table("key", "value")
    table.columns[0].no_wrap = True
    for key, value in _flatten("", json.loads(settings.model_dump_json())):  # type: ignore[attr-defined]
        table.add_row(escape(key), escape(value))
    print_table(table)


def _flatten(key: str, value: object) -> list[tuple[str, str]]:
    """Return each key that has a value, in dotted form, with the value as JSON."""
    if isinstance(value, dict) and value:
        return [row for name, each in value.items() for row in _flatten(f"{key}.{name}" if key else name, each)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [row for i, each in enumerate(value) for row in _flatten(f"{key}.{i}", each)]
    return [] if value is None else [(key, json.dumps(value, ensure_ascii=False))]
