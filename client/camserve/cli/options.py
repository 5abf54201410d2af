"""What is asked: the options that several commands have, and how what is typed is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import typer

from camserve.catalogue import Layer, Method, Metric, Model
from camserve.client import Client
from camserve.errors import NotFound
from camserve.many import Variant

__all__ = [
    "Address",
    "AsJson",
    "Budget",
    "Layers",
    "ModelName",
    "Parameters",
    "Seed",
    "Timeout",
    "model_of",
    "named",
    "read_box",
    "read_parameters",
    "read_target",
    "read_variant",
]

Address = Annotated[str, typer.Option(help="The server, HOST:PORT.")]
ModelName = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Default: the server's first.")]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layer", metavar="NAME", help="May be repeated, fine to coarse. Default: the model's own choice."),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--param", metavar="KEY=VALUE", help="A parameter of the method; the value as JSON, or else text."),
]
Seed = Annotated[int, typer.Option(min=0, help="All randomness comes from it.")]
Budget = Annotated[
    int | None, typer.Option(metavar="ROWS", min=1, help="The most rows. A method that can stop early then does.")
]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Of each call to the server.")]
Named = TypeVar("Named", Model, Layer, Method, Metric)
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]


def read_target(text: str) -> int | str:
    """Digits are a class index, anything else is a label."""
    return int(text) if text.isascii() and text.isdigit() else text


def read_variant(text: str, parameters: dict[str, Any], layers: list[str] | None, seed: int) -> Variant:
    """NAME, or NAME:KEY=VALUE,… with parameters of its own beside those of all; the whole text is its label."""
    name, colon, own = text.partition(":")
    merged = {**parameters, **read_parameters(own.split(",") if colon else None, "--method")}
    return Variant(text, name, merged, layers or (), seed)


def read_parameters(given: list[str] | None, option: str = "--param") -> dict[str, Any]:
    parameters = {}
    for each in given or []:
        key, equals, text = each.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{each!r} is not KEY=VALUE", param_hint=option)
        try:
            parameters[key] = json.loads(text)
        except ValueError:
            parameters[key] = text
    return parameters


def read_box(text: str) -> list[float]:
    try:
        sides = [float(each) for each in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) != 4:
        raise typer.BadParameter(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM", param_hint="--box")
    return sides


def model_of(client: Client, name: str | None) -> Model:
    """The model of that name, the server's first one for no name. Raises NotFound, listing the known ones."""
    return named(client.models(), name, "model")[0]


def named(found: Sequence[Named], name: str | None, kind: str) -> Sequence[Named]:
    """The one of that name; all for no name. Raises NotFound, listing the known ones."""
    known = [each.name for each in found]
    if name is None:
        return found
    if name not in known:
        raise NotFound(f"there is no {kind} {name!r}; there are: {', '.join(known)}")
    return [found[known.index(name)]]
