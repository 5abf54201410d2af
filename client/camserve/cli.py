"""The command line. What it computes goes to stdout and to files; progress, warnings and errors go to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from camserve import files, tables
from camserve.answers import Evaluation, Explanation, Level, Progress, Replay, SaliencyMap
from camserve.calls import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from camserve.catalogue import Layer, Method, Metric, Model
from camserve.client import Client
from camserve.errors import CamserveError, InternalError, NotFound
from camserve.receipt import Receipt
from camserve.version import __version__

__all__ = ["app"]

app = typer.Typer(
    help="Explain image classifiers over gRPC: Poly-CAM, Opti-CAM and the methods they compare with.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

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


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"camserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")] = False,
) -> None:
    pass


# ---- the commands ---------------------------------------------------------------------------------------------------


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML. Default: the embedded model.")] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help=f"Default: {DEFAULT_ADDRESS}.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. Default: auto.")] = None,
) -> None:
    """Start a server, and stop it with Ctrl-C."""
    try:
        from camserve_server.__main__ import serve as run
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith(("camserve.", "camserve_server.")):
            raise  # a bug of ours, not something to install
        typer.echo(f"error: the server needs {missing.name}: pip install 'camserve[server]'", err=True)
        raise typer.Exit(1) from None
    raise typer.Exit(run(config=config, listen=listen, device=device))


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="JPEG, PNG, WebP, BMP, GIF or TIFF.")],
    *,
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="`camserve list methods` lists them.")] = "poly-cam",
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="INDEX|LABEL", help="May be repeated, for a map each. Default: the predicted class."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Instead: the N likeliest classes, a map each.")
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Scores each map. May be repeated.")] = None,
    seed: Seed = 0,
    budget: Budget = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go; made if need be.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Explain images: write a map, an overlay and a record of each.

    DIR/STEM.npy is the map (float32 [H, W] in [0, 1]), DIR/STEM.png the overlay, and DIR/STEM.json the record: target,
    predictions, scores, warnings, cost, and the receipt, with which `camserve replay` makes the map again.

    STEM is the image's own, with -2, -3 … after it where another image of this run has the same, or where a file
    written would replace one of the images or a JSON file that is no record. With several maps these are STEM.INDEX.npy
    and STEM.INDEX.png, INDEX being the class index. Files of earlier runs are replaced. An image that fails does not
    stop the others.

    With --json there is a line for each map; maps of one image share the cost and the request id.
    """
    if target and top_k is not None:
        raise typer.BadParameter("give either --target or --top-k", param_hint="--top-k")
    targets = [_target(each) for each in target or []]
    metrics = list(dict.fromkeys(metric or []))
    table = tables.plain_table("image", "class", "probability", "rows", "time", *metrics, "overlay")
    failures = 0
    with _errors_as_lines(), Client(address, timeout=timeout) as client:
        parameters = _parameters(param)
        for image, stem in zip(images, files.stems(images, out), strict=True):
            try:
                events = client.explain_stream(
                    image,
                    model=model,
                    method=method,
                    target=targets,
                    top_k=top_k,
                    layers=layer,
                    parameters=parameters,
                    metrics=metrics,
                    seed=seed,
                    budget=budget,
                )
                explanation: Explanation = _followed(events, image.name)
                written = files.save(image, explanation, out, stem)
                for each, shown in zip(written, explanation.maps, strict=True):
                    if as_json:
                        _print_json(files.map_record(image, files.record_of(out, stem), each, shown, explanation))
                    else:
                        table.add_row(*tables.map_row(image, each[1], shown, explanation, metrics))
                        _warn(image, shown)
            except (CamserveError, OSError) as error:
                typer.echo(f"error: {image}: {_said(error)}", err=True)
                failures += 1
    if table.row_count:
        Console().print(table)
    if failures:
        raise typer.Exit(1)


@app.command()
def evaluate(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG, WebP, BMP, GIF or TIFF.")],
    *,
    saliency: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="A map to be scored, [H, W].")] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="Or the method that makes it.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="May be repeated. Default: insertion, deletion and average-gain."),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = None,
    target: Annotated[
        str | None, typer.Option(metavar="INDEX|LABEL", help="What it explains. Default: the predicted class.")
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    seed: Seed = 0,
    budget: Budget = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Score a saliency map of an image: one in a file, or one that a method makes."""
    options: dict[str, Any] = {"metrics": metric} if metric else {}
    with _errors_as_lines(), Client(address, timeout=timeout) as client:
        events = client.evaluate_stream(
            image,
            saliency=None if saliency is None else files.load_map(saliency),
            method=method,
            model=model,
            target=None if target is None else _target(target),
            layers=layer,
            parameters=_parameters(param),
            seed=seed,
            budget=budget,
            **options,
        )
        evaluation: Evaluation = _followed(events, image.name)
    if as_json:
        _print_json(files.evaluation_record(image, evaluation))
        return
    _warn(image, evaluation)
    table = tables.plain_table("metric", "value", "unit")
    for name, score in evaluation.scores.items():
        table.add_row(name, f"{score:.4g}", "" if score.unit == "1" else score.unit)
    typer.echo(f"{image}: {evaluation.target}, probability {evaluation.target.probability:.3f}")
    Console().print(table)


@app.command()
def replay(
    receipt: Annotated[
        Path, typer.Argument(metavar="RECEIPT", help="STEM.json, or another file with a receipt in it; - for stdin.")
    ],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The one that was explained.")],
    *,
    saliency: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.npy", help="The map as it was, repeated for several. Default: beside RECEIPT."),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Make the map of a receipt again, and say whether it is the same.

    RECEIPT is a STEM.json that `camserve explain` wrote, a line that it or `camserve evaluate` printed with --json, or
    a receipt alone. The server is asked for the same map: model, method, parameters, layers, targets, seed, budget and
    batch sizes.

    Exits with 0 if the map is the same, bit for bit. Otherwise with 1, and shows what differs between the receipts
    and, where the map was saved as STEM.npy beside STEM.json, STEM.INDEX.npy for several, or is given by --saliency,
    how far it is from this one.
    """
    with _errors_as_lines(), Client(address, timeout=timeout) as client:
        then = Receipt.from_json(sys.stdin.buffer.read() if str(receipt) == "-" else receipt.read_bytes())
        if saliency and len(saliency) != len(then.targets):
            raise typer.BadParameter(f"the receipt is of {len(then.targets)} maps", param_hint="--saliency")
        paths = saliency or files.saved_maps(receipt, then.targets)
        saved = [None if path is None else files.load_map(path) for path in paths]
        again: Replay = _followed(client.replay_stream(then, image), image.name)
    _report(again)
    if not again.same:
        deviations = tables.deviations(again, saved)
        if deviations.row_count:
            Console().print("", deviations)
        raise typer.Exit(1)


def _report(again: Replay) -> None:
    if {"input_digest", "preprocessing"} <= again.differences.keys():
        typer.echo("another input: the image was preprocessed in another way")
    elif "input_digest" in again.differences:
        typer.echo("another image: the model saw another input than the receipt's")
    map_or_maps = "map" if len(again.explanation.maps) == 1 else "maps"
    typer.echo(f"the same {map_or_maps}, bit for bit" if again.same else f"not the same {map_or_maps}")
    if again.differences:
        Console().print("", tables.differences(again))


class What(Enum):
    """What can be listed."""

    models = "models"
    layers = "layers"
    methods = "methods"
    metrics = "metrics"


@app.command("list")
def list_(
    what: What,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only this one; a method with all there is to know.")
    ] = None,
    *,
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose layers, or where methods cost what. Default: the server's first."),
    ] = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """List what the server has: models, the layers of one that can be named, methods or metrics.

    Methods are shown with what they cost on a model, and with their parameters; with NAME also with their equations,
    and when to take them.
    """
    with _errors_as_lines(), Client(address, timeout=timeout) as client:
        found: Sequence[Model | Layer | Method | Metric]
        table: RenderableType
        match what:
            case What.models:
                found = models = _named(client.models(), name, "model")
                table = tables.model_table(models, client.methods())
            case What.layers:
                of = _model(client, model)
                found = layers = _named(of.named_layers, name, "layer")
                table = tables.layer_table(of, layers)
            case What.methods:
                of = _model(client, model)
                found = methods = _named(client.methods(of.name), name, "method")
                table = tables.method_page(methods[0], of.name) if name else tables.method_table(methods, of.name)
            case What.metrics:
                found = metrics = _named(client.metrics(), name, "metric")
                table = tables.metric_table(metrics)
    if as_json:
        for each in found:
            _print_json(asdict(each))
    else:
        Console().print(table)


# ---- what is asked --------------------------------------------------------------------------------------------------


def _target(text: str) -> int | str:
    """Digits are a class index, anything else is a label."""
    return int(text) if text.isascii() and text.isdigit() else text


def _parameters(given: list[str] | None) -> dict[str, Any]:
    parameters = {}
    for each in given or []:
        key, equals, text = each.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{each!r} is not KEY=VALUE", param_hint="--param")
        try:
            parameters[key] = json.loads(text)
        except ValueError:
            parameters[key] = text
    return parameters


def _model(client: Client, name: str | None) -> Model:
    """The model of that name, the server's first one for no name. Raises NotFound, listing the known ones."""
    return _named(client.models(), name, "model")[0]


def _named(found: Sequence[Named], name: str | None, kind: str) -> Sequence[Named]:
    """The one of that name; all for no name. Raises NotFound, listing the known ones."""
    known = [each.name for each in found]
    if name is None:
        return found
    if name not in known:
        raise NotFound(f"there is no {kind} {name!r}; there are: {', '.join(known)}")
    return [found[known.index(name)]]


# ---- what is shown --------------------------------------------------------------------------------------------------


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """What fails becomes one line on stderr and exit code 1; Ctrl-C, which cancels the call under way, 130."""
    try:
        yield
    except (CamserveError, OSError) as error:
        typer.echo(f"error: {_said(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("cancelled", err=True)
        raise typer.Exit(130) from None


def _said(error: CamserveError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _followed(events: Iterable[Any], title: str) -> Any:
    """The last event, its forerunners shown as a progress bar. Raises InternalError where there is no answer."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} rows"),
        TextColumn("{task.fields[stage]}{task.fields[level]}", markup=False),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    answer = None
    # rich would send what is printed to stdout to its own console, stderr.
    with ProgressBar(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
    ) as bar:
        task = bar.add_task(title, total=0, stage="", level="")
        for event in events:
            match event:
                case Progress():
                    bar.update(task, completed=event.rows_done, total=event.rows_total, stage=event.stage)
                case Level():
                    bar.update(task, level=f", level {event.index + 1} of {event.count} ({event.layer})")
                case _:
                    answer = event
    if answer is None:
        raise InternalError("the server ended the stream without an answer")
    return answer


def _warn(image: Path, shown: SaliencyMap) -> None:
    if shown.share < 1:
        typer.echo(f"warning: {image}: {shown.target}: cut short, {shown.share:.4g} of the whole is done", err=True)
    for warning in shown.warnings:
        typer.echo(f"warning: {image}: {shown.target}: {warning}", err=True)


def _print_json(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record, ensure_ascii=False))
