"""The command line. What it computes goes to stdout and to files; progress, warnings and errors go to stderr."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from camserve.answers import Evaluation, Explanation, Level, Method, Metric, Model, Progress, SaliencyMap
from camserve.calls import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from camserve.client import Client
from camserve.errors import CamserveError, InternalError, InvalidArgument
from camserve.tables import evaluation_record, listing, map_record, map_row, plain_table
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
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Of each call to the server.")]
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
    layer: Layers = None,
    param: Parameters = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Scores each map. May be repeated.")] = None,
    seed: Seed = 0,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files go; made if need be.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Explain images: write DIR/STEM.npy, the map (float32 [H, W] in [0, 1]), and DIR/STEM.png, the overlay.

    STEM is the image's own, with -2, -3 … after it where another image of this run has the same or a file written
    would replace one of the images. With several targets the files are STEM.INDEX.npy and STEM.INDEX.png, INDEX being
    the class index. Files of earlier runs are replaced. An image that fails does not stop the others.

    With --json there is a line for each map; maps of one image share the cost and the request id.
    """
    targets = [_target(each) for each in target or []]
    metrics = list(dict.fromkeys(metric or []))
    table = plain_table("image", "class", "probability", "rows", "time", *metrics, "overlay")
    failures = 0
    with _errors_as_lines(), Client(address, timeout=timeout) as client:
        parameters = _parameters(param)
        for image, stem in zip(images, _stems(images, out), strict=True):
            try:
                events = client.explain_stream(
                    image,
                    model=model,
                    method=method,
                    target=targets,
                    layers=layer,
                    parameters=parameters,
                    metrics=metrics,
                    seed=seed,
                )
                explanation: Explanation = _followed(events, image.name)
                for shown in explanation.maps:
                    name = f"{stem}.{shown.target.index}" if len(explanation.maps) > 1 else stem
                    files = shown.save(out, name)
                    if as_json:
                        _print_json(map_record(image, files, shown, explanation))
                    else:
                        table.add_row(*map_row(image, files, shown, explanation, metrics))
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
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Score a saliency map of an image: one in a file, or one that a method makes."""
    options: dict[str, Any] = {"metrics": metric} if metric else {}
    with _errors_as_lines(), Client(address, timeout=timeout) as client:
        events = client.evaluate_stream(
            image,
            saliency=None if saliency is None else _loaded(saliency),
            method=method,
            model=model,
            target=None if target is None else _target(target),
            layers=layer,
            parameters=_parameters(param),
            seed=seed,
            **options,
        )
        evaluation: Evaluation = _followed(events, image.name)
    if as_json:
        _print_json(evaluation_record(image, evaluation))
        return
    _warn(image, evaluation)
    table = plain_table("metric", "value", "unit")
    for name, score in evaluation.scores.items():
        table.add_row(name, f"{score:.4g}", "" if score.unit == "1" else score.unit)
    typer.echo(f"{image}: {evaluation.target}, probability {evaluation.target.probability:.3f}")
    Console().print(table)


class What(Enum):
    """What can be listed."""

    models = "models"
    methods = "methods"
    metrics = "metrics"


@app.command("list")
def list_(
    what: What,
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With methods: what each costs on this model, or why it cannot.")
    ] = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """List what the server has: models, methods or metrics, with their parameters."""
    with _errors_as_lines(), Client(address, timeout=timeout) as client:
        found: Sequence[Model | Method | Metric]
        match what:
            case What.models:
                found = client.models()
            case What.methods:
                found = client.methods(model)
            case What.metrics:
                found = client.metrics()
    if as_json:
        for each in found:
            _print_json(asdict(each))
    else:
        Console().print(listing(found))


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


def _loaded(saliency: Path) -> np.ndarray[Any, Any]:
    try:
        loaded = np.load(saliency, allow_pickle=False)
    except ValueError as error:
        raise InvalidArgument(f"{saliency} is not a NumPy array file: {error}", field="saliency") from error
    if not isinstance(loaded, np.ndarray):
        raise InvalidArgument(f"{saliency} holds several arrays; one is needed", field="saliency")
    return loaded


def _stems(images: Sequence[Path], out: Path) -> list[str]:
    """A file stem for each image, none twice and none whose files would replace one of the images."""
    here = [image.name for image in images if image.resolve().parent == out.resolve()]

    def taken(stem: str) -> bool:
        written = re.compile(rf"{re.escape(stem)}(\.\d+)?\.(png|npy)", re.IGNORECASE)
        return stem.casefold() in map(str.casefold, stems) or any(map(written.fullmatch, here))

    stems: list[str] = []
    for image in images:
        numbered = (f"{image.stem}-{number}" for number in itertools.count(2))
        stems.append(next(stem for stem in itertools.chain([image.stem], numbered) if not taken(stem)))
    return stems


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
    for warning in shown.warnings:
        typer.echo(f"warning: {image}: {shown.target}: {warning}", err=True)


def _print_json(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record, ensure_ascii=False))
