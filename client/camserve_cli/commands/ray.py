"""`camserve ray`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from camserve_cli.extras import needs_extra

__all__ = ["ray"]

ray = typer.Typer(help="Run camserve on a Ray cluster.", no_args_is_help=True, rich_markup_mode="markdown")


@ray.callback()
def _ray() -> None:
    pass


def _autoscaling(value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", value)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise typer.BadParameter(
            f"{value!r}; expected MIN:MAX, such as 1:8, with MIN of at least 1 and not above MAX",
            param_hint="--autoscale",
        )
    return int(found[1]), int(found[2])


@ray.command()
def serve(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Configuration file (TOML). Default: serve the embedded model."),
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Number of replicas. Default: 1.")] = None,
    autoscale: Annotated[
        str | None,
        typer.Option(metavar="MIN:MAX", help="Change the number of replicas with the rows that they owe."),
    ] = None,
    rows_per_replica: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --autoscale: rows that a replica may owe. Default: 5,000, or 25,000 with a GPU."
        ),
    ] = None,
    gpus_per_replica: Annotated[float, typer.Option(min=0, help="GPUs that each replica takes from the cluster.")] = 0,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto", help="Ray cluster. Default: start one on this machine, which ends with Ctrl-C."
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Port of all proxies, and whether other machines may call."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Accept calls without TLS from other machines.")] = False,
) -> None:
    """Serve through Ray Serve. Ctrl-C stops it after the running requests are finished.

    docs/ray.md describes the differences from `camserve serve`.
    """
    if replicas is not None and autoscale is not None:
        raise typer.BadParameter("give either --replicas or --autoscale", param_hint="--autoscale")
    if rows_per_replica is not None and autoscale is None:
        raise typer.BadParameter("give it together with --autoscale", param_hint="--rows-per-replica")
    count = _autoscaling(autoscale) if autoscale else replicas or 1
    with needs_extra("ray", "camserve ray serve"):
        from camserve_ray.connection import prepare

        prepare(address)
        from camserve_ray.serving.application import Scale
        from camserve_ray.serving.command import serve as run
    scale = Scale(count, gpus_per_replica, rows_per_replica)
    raise typer.Exit(run(scale, config=config, listen=listen, insecure=insecure or None, address=address))
