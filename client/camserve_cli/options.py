"""Options that several commands share, and parsers of their values."""

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
from camserve.connection import DEFAULT_ADDRESS, DefaultTimeout
from camserve.errors import NotFound

__all__ = [
    "AsJson",
    "Budget",
    "Layers",
    "MapDtype",
    "ModelName",
    "NativeMaps",
    "Parameters",
    "Precision",
    "Priority",
    "RayOptions",
    "Seed",
    "Server",
    "read_box",
    "read_parameters",
    "read_target",
    "read_variant",
    "select_model",
    "select_named",
    "with_ray_options",
    "with_server_options",
]

ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Model to explain. Default: the server's first model.")
]
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Arithmetic of the model, such as bf16. `camserve list models` shows the choices. Default: the first one.",
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="NAME",
        help="Layer to use. Repeat it for several layers, from fine to coarse. Default: the layers of the model.",
    ),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="KEY=VALUE",
        help="Parameter of the method. The value is JSON, or text if it is not valid JSON. May be repeated.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers. The same seed gives the same result.")]
Budget = Annotated[
    int | None,
    typer.Option(
        metavar="ROWS",
        min=1,
        help="Maximum number of rows (inputs of the network) for each request, metrics included. Methods that can "
        "stop early return a partial map, and others are refused if they need more.",
    ),
]
Priority = Annotated[
    str | None,
    typer.Option(metavar="low|normal|high", help="Order among waiting requests. It does not change the map."),
]
MapDtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|float16|uint8",
        help="Type in which the server sends maps. The smaller types save network traffic and round the values. "
        "Default: float32.",
    ),
]
NativeMaps = Annotated[
    bool,
    typer.Option(
        "--native-maps",
        help="Receive maps at the resolution of the method, for example 7 × 7. The client resizes them to the same "
        "values within 1e-6.",
    ),
]
# Longer than the default of the client library: a user sees the progress and can press Ctrl-C.
DEFAULT_TIMEOUT_S = DefaultTimeout(300)
_MAX_DIGITS = 20  # of a class index; Python refuses to convert some thousands of them
Named = TypeVar("Named", Model, Layer, Method, Metric)
Connected = TypeVar("Connected")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line on stdout instead of a table.")]


def _option(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Server", **settings)


def _ray_option(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Ray", **settings)


@dataclass(frozen=True)
class Server:
    """Options for the connection to a server. `with_server_options` adds them to a command."""

    address: Annotated[str, _option(metavar="HOST:PORT", help="Address of the server.", envvar="CAMSERVE_ADDRESS")] = (
        DEFAULT_ADDRESS
    )
    timeout: Annotated[
        float | None,
        _option(metavar="SECONDS", min=0, help="Time limit of each call. Default: 300; none if there are many images."),
    ] = None
    tls: Annotated[
        bool, _option("--tls", envvar="CAMSERVE_USE_TLS", help="Use TLS. --ca and --cert imply this option.")
    ] = False
    ca: Annotated[
        Path | None,
        _option(
            metavar="FILE",
            envvar="CAMSERVE_CA",
            help="PEM file of the certificate authorities to trust. Default: those of gRPC.",
        ),
    ] = None
    cert: Annotated[
        Path | None,
        _option(metavar="FILE", envvar="CAMSERVE_CERT", help="PEM file of the client certificate, for mutual TLS."),
    ] = None
    key: Annotated[
        Path | None, _option(metavar="FILE", envvar="CAMSERVE_KEY", help="PEM file of the private key of --cert.")
    ] = None
    token_file: Annotated[
        Path | None,
        _option(
            metavar="FILE",
            envvar="CAMSERVE_TOKEN_FILE",
            help="File that contains the bearer token. Alternatively, set CAMSERVE_TOKEN to the token.",
        ),
    ] = None

    def client(self, default_timeout: float | None = DEFAULT_TIMEOUT_S) -> Client:
        """Return a client for the server. The caller closes it.

        Args:
            default_timeout: Timeout in seconds if the user sets none; None means no timeout.

        Raises:
            OSError: A file cannot be read.
            InvalidArgument: The options contradict each other.
        """
        return self.connection(Client, default_timeout)

    def connection(
        self, kind: Callable[..., Connected], default_timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> Connected:
        """Return a connection of the class `kind`. It takes the arguments of `Client`, which `client` describes."""
        # There is no option for the token itself, because all users of a machine can read each other's command lines.
        token = self.token_file.read_text().strip() if self.token_file else os.environ.get("CAMSERVE_TOKEN")
        return kind(
            self.address,
            timeout=default_timeout if self.timeout is None else self.timeout,
            tls=self.tls,
            ca=self.ca,
            certificate=self.cert,
            key=self.key,
            token=token or None,
        )


@dataclass(frozen=True)
class RayOptions:
    """Options for a run on a Ray cluster. `with_ray_options` adds them to a command."""

    ray: Annotated[
        str | None,
        _ray_option(
            metavar="HOST:PORT|auto|local",
            help="Evaluate on the devices of this Ray cluster, without a server: its address, `auto` for the cluster "
            "of this machine, or `local` to start one. Images may also be Parquet files, WebDataset archives "
            "(.tar) and DICOM files.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        _ray_option(metavar="DIR", help="Folder for the scores and maps. A second run computes only what is missing."),
    ] = None
    config: Annotated[
        Path | None,
        _ray_option(
            metavar="FILE", help="Configuration file (TOML) of a server, with the models. Default: the embedded model."
        ),
    ] = None
    no_maps: Annotated[bool, _ray_option("--no-maps", help="Save the scores only.")] = False
    cpus_per_engine: Annotated[
        int | None,
        _ray_option(
            metavar="N",
            min=1,
            help="CPUs of each engine in a cluster without GPUs. Default: `threads` of the configuration, or 4.",
        ),
    ] = None
    image_column: Annotated[str, _ray_option(metavar="NAME", help="Column of Parquet files with the image files.")] = (
        "image"
    )
    name_column: Annotated[
        str | None,
        _ray_option(metavar="NAME", help="Column of Parquet files with the names of the images. Default: FILE/ROW."),
    ] = None
    target_column: Annotated[
        str | None,
        _ray_option(
            metavar="NAME",
            help="Column of Parquet files, or extension of the files in archives (such as cls), with the class to "
            "explain. Default: the predicted class.",
        ),
    ] = None


def with_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `server` of a command by the options of `Server`."""
    return _with_options(command, "server", Server)


def with_ray_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `on_ray` of a command by the options of `RayOptions`."""
    return _with_options(command, "on_ray", RayOptions)


def _with_options(command: Callable[..., None], name: str, group: type[Any]) -> Callable[..., None]:
    """Replace a parameter of a command by the options that a data class has as its fields."""
    own, options = (inspect.signature(each, eval_str=True).parameters for each in (command, group))
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        *(each for each in own.values() if each.name != name),
        *(each.replace(kind=keyword) for each in options.values()),
    ]

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        values = group(**{option: arguments.pop(option) for option in options})
        command(**arguments, **{name: values})

    # typer derives the options of a command from its signature.
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapper


def read_target(text: str) -> int | str:
    """Parse a target. Digits are a class index, and any other text is a label."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else text


def read_variant(text: str, parameters: dict[str, Any], layers: list[str] | None, seed: int) -> Variant:
    """Parse a method with parameters of its own.

    Args:
        text: NAME or NAME:KEY=VALUE,... The whole text becomes the label.
        parameters: Parameters of all methods. The method's own parameters override them.
        layers: Layers of all methods.
        seed: Seed of all methods.

    Raises:
        typer.BadParameter: A parameter does not have the form KEY=VALUE.
    """
    name, colon, own = text.partition(":")
    merged = {**parameters, **read_parameters(own.split(",") if colon else None, "--method")}
    return Variant(text, name, merged, layers or (), seed)


def read_parameters(texts: list[str] | None, option: str = "--param") -> dict[str, Any]:
    """Parse parameters of a method.

    Args:
        texts: Texts of the form KEY=VALUE. A value is JSON, or text if it is not valid JSON.
        option: Name of the option, for the error message.

    Raises:
        typer.BadParameter: A text has another form.
    """
    parameters = {}
    for each in texts or []:
        key, equals, text = each.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{each!r} does not have the form KEY=VALUE", param_hint=option)
        try:
            parameters[key] = json.loads(text)
        except (ValueError, RecursionError):
            parameters[key] = text
    return parameters


def read_box(text: str) -> list[float]:
    """Parse a box LEFT,TOP,RIGHT,BOTTOM in pixels.

    Raises:
        typer.BadParameter: The text has another form.
    """
    try:
        sides = [float(each) for each in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) != 4:
        raise typer.BadParameter(f"{text!r} does not have the form LEFT,TOP,RIGHT,BOTTOM", param_hint="--box")
    return sides


def select_model(client: Client, name: str | None) -> Model:
    """Return the model of that name, or the server's first model if the name is None.

    Raises:
        NotFound: The server has no model of that name. The message lists its models.
    """
    return select_named(client.models(), name, "model")[0]


def select_named(items: Sequence[Named], name: str | None, kind: str) -> Sequence[Named]:
    """Return the item of that name in a list, or all items if the name is None.

    Args:
        items: The items to select from.
        name: The name to look for.
        kind: What the items are, for the error message, for example "model".

    Raises:
        NotFound: There is no item of that name. The message lists the names.
    """
    names = [each.name for each in items]
    if name is None:
        return items
    if name not in names:
        raise NotFound(f"there is no {kind} {name!r}; there are: {', '.join(names)}")
    return [items[names.index(name)]]
