"""What is asked: the options that several commands have, and how what is typed is read."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from camserve.batches import Variant
from camserve.catalogue import Layer, Method, Metric, Model
from camserve.client import Client
from camserve.connection import DEFAULT_ADDRESS
from camserve.errors import NotFound

__all__ = [
    "AsJson",
    "Budget",
    "Layers",
    "ModelName",
    "Parameters",
    "Priority",
    "Seed",
    "Server",
    "asks",
    "model_of",
    "named",
    "read_box",
    "read_parameters",
    "read_target",
    "read_variant",
]

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
Priority = Annotated[
    str | None, typer.Option(metavar="low|normal|high", help="When its rows are done; the map is the same.")
]
Named = TypeVar("Named", Model, Layer, Method, Metric)
Connected = TypeVar("Connected")
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]


def _option(*names: str, **given: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Server", **given)


@dataclass(frozen=True)
class Server:
    """Whom a command asks, and how: options of each command that `asks` a server."""

    address: Annotated[str, _option(help="HOST:PORT.", envvar="CAMSERVE_ADDRESS")] = DEFAULT_ADDRESS
    # A person sees how far it is and can press Ctrl-C, so this is longer than the library's.
    timeout: Annotated[float, _option(metavar="SECONDS", min=0, help="Of each call.")] = 300.0
    tls: Annotated[bool, _option("--tls", envvar="CAMSERVE_USE_TLS", help="Use TLS; --ca and --cert do, too.")] = False
    ca: Annotated[Path | None, _option(metavar="FILE", envvar="CAMSERVE_CA", help="PEM: whom to trust.")] = None
    cert: Annotated[
        Path | None, _option(metavar="FILE", envvar="CAMSERVE_CERT", help="PEM: who you are, for mutual TLS.")
    ] = None
    key: Annotated[Path | None, _option(metavar="FILE", envvar="CAMSERVE_KEY", help="PEM: the key of --cert.")] = None
    token_file: Annotated[
        Path | None,
        _option(metavar="FILE", envvar="CAMSERVE_TOKEN_FILE", help="Holds the token; or CAMSERVE_TOKEN is the token."),
    ] = None

    def client(self) -> Client:
        """To be closed. Raises OSError for a file that cannot be read, InvalidArgument for a wrong combination."""
        return self.connection(Client)

    def connection(self, kind: Callable[..., Connected]) -> Connected:
        """As `client`, of that kind."""
        # Not an option of its own, for all users of a machine see each other's command lines.
        token = self.token_file.read_text().strip() if self.token_file else os.environ.get("CAMSERVE_TOKEN")
        return kind(
            self.address,
            timeout=self.timeout,
            tls=self.tls,
            ca=self.ca,
            certificate=self.cert,
            key=self.key,
            token=token or None,
        )


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of a Server in place of its `server`."""
    own, servers = (inspect.signature(each, eval_str=True).parameters for each in (command, Server))
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        *(each for each in own.values() if each.name != "server"),
        *(each.replace(kind=keyword) for each in servers.values()),
    ]

    @functools.wraps(command)
    def asking(**given: Any) -> None:
        server = Server(**{name: given.pop(name) for name in servers})
        command(**given, server=server)

    # What typer makes its options of.
    asking.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    asking.__annotations__ = {each.name: each.annotation for each in parameters}
    return asking


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
