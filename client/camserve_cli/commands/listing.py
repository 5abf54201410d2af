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
from camserve_cli.options import AsJson, Server, select_model, select_named, with_server_options
from camserve_cli.output import errors_as_lines, print_json, print_table

__all__ = ["list_"]


class Kind(Enum):
    """Kinds of objects that a server lists."""

    models = "models"
    layers = "layers"
    methods = "methods"
    metrics = "metrics"


@with_server_options
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="List only this one. For a method, also show its equations and advice."),
    ] = None,
    *,
    server: Server,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model whose layers are listed, and for which the cost of methods is computed. "
            "Default: the server's first model.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models, the layers of a model, the methods or the metrics of a server.

    Methods are listed with their parameters and with their cost on a model.
    """
    with errors_as_lines(), server.client() as client:
        items: Sequence[Model | Layer | Method | Metric]
        table: RenderableType
        match kind:
            case Kind.models:
                items = models = select_named(client.models(), name, "model")
                table = rich_tables.model_table(models, client.methods())
            case Kind.layers:
                selected = select_model(client, model)
                items = layers = select_named(selected.named_layers, name, "layer")
                table = rich_tables.layer_table(selected, layers)
            case Kind.methods:
                selected = select_model(client, model)
                items = methods = select_named(client.methods(selected.name), name, "method")
                table = (
                    rich_tables.method_page(methods[0], selected.name)
                    if name
                    else rich_tables.method_table(methods, selected.name)
                )
            case Kind.metrics:
                items = metrics = select_named(client.metrics(), name, "metric")
                table = rich_tables.metric_table(metrics)
    if as_json:
        for each in items:
            print_json(asdict(each))
    elif kind is Kind.methods and name:
        Console().print(table)
    else:
        print_table(table)
