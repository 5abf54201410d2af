"""`camserve dicom gateway`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from camserve_cli.extras import needs_extra
from camserve_cli.rich_tables import plain_table

__all__ = ["gateway"]


def gateway(
    config: Annotated[Path, typer.Option(metavar="FILE", help="TOML; docs/pacs.md has its keys.")],
    check: Annotated[bool, typer.Option("--check", help="Say what the configuration means, and do nothing.")] = False,
) -> None:
    """Take images from a PACS, explain them, and store the results there, until Ctrl-C.

    What it has taken lies in a spool on disk until the PACS has its results. Exits with 2 for a wrong configuration.
    """
    with needs_extra("gateway", "camserve dicom gateway"):
        from camserve_dicom import gateway as package
    try:
        found = package.read(config)
        found.check_files()
        if check:
            _show(found)
        else:
            package.run(found, lambda where: typer.echo(f"camserve gateway is ready on {where}"))
    except package.ConfigError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(2) from None


def _show(found: object) -> None:
    table = plain_table("key", "value")
    table.columns[0].no_wrap = True
    for key, value in _flat("", json.loads(found.model_dump_json())):  # type: ignore[attr-defined]
        table.add_row(escape(key), escape(value))
    Console().print(table)


def _flat(key: str, value: object) -> list[tuple[str, str]]:
    """Each key that is set, with its value as JSON."""
    if isinstance(value, dict) and value:
        return [row for name, each in value.items() for row in _flat(f"{key}.{name}" if key else name, each)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [row for i, each in enumerate(value) for row in _flat(f"{key}.{i}", each)]
    return [] if value is None else [(key, json.dumps(value, ensure_ascii=False))]
