"""`camserve list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from camserve.catalogue import Layer, Method, Metric, Model
from camserve_cli import rich_tables
from camserve_cli.options import AsJson, Server, asks, model_of, named
from camserve_cli.output import errors_as_lines, print_json

__all__ = ["list_"]


class What(Enum):
    """What can be listed."""

    models = "models"
    layers = "layers"
    methods = "methods"
    metrics = "metrics"


@asks
def list_(
    what: What,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only this one; a method with all there is to know.")
    ] = None,
    *,
    server: Server,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose layers, or where methods cost what. Default: the server's first."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what the server has: models, the layers of one that can be named, methods or metrics.

    Methods are shown with what they cost on a model, and with their parameters; with NAME also with their equations,
    and when to take them.
    """
    with errors_as_lines(), server.client() as client:
        found: Sequence[Model | Layer | Method | Metric]
        table: RenderableType
        match what:
            case What.models:
                found = models = named(client.models(), name, "model")
                table = rich_tables.model_table(models, client.methods())
            case What.layers:
                of = model_of(client, model)
                found = layers = named(of.named_layers, name, "layer")
                table = rich_tables.layer_table(of, layers)
            case What.methods:
                of = model_of(client, model)
                found = methods = named(client.methods(of.name), name, "method")
                table = (
                    rich_tables.method_page(methods[0], of.name) if name else rich_tables.method_table(methods, of.name)
                )
            case What.metrics:
                found = metrics = named(client.metrics(), name, "metric")
                table = rich_tables.metric_table(metrics)
    if as_json:
        for each in found:
            print_json(asdict(each))
    else:
        Console().print(table)
