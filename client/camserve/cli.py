"""The command line. What it computes goes to stdout and to files; progress, warnings and errors go to stderr."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from camserve import files, sheet, tables
from camserve.annotations import read_boxes, read_labels, read_mask
from camserve.answers import Evaluation, Explanation, Level, Progress, Replay, SaliencyMap
from camserve.calls import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from camserve.catalogue import Layer, Method, Metric, Model
from camserve.client import Client
from camserve.errors import CamserveError, InternalError, InvalidArgument, NotFound
from camserve.many import DEFAULT_METRICS, Variant
from camserve.receipt import Receipt
from camserve.runs import Run, Wanted, by_layer
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
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="L,T,R,B", help="Where the target is, in pixels of the image. May be repeated."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Or a picture over the image, not black where it is.")
    ] = None,
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
        boxes = [_box(each) for each in box] if box else None
        truth_mask = None if mask is None else read_mask(mask)
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
                    boxes=boxes,
                    mask=truth_mask,
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
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Files, or folders of them; several only with --csv.")
    ],
    *,
    saliency: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="A map to be scored, [H, W].")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:KEY=VALUE,...]", help="Or the method that makes it. With --csv may be repeated."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"May be repeated. Default: {', '.join(DEFAULT_METRICS)}."),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --csv may be repeated. Default: the server's first."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="INDEX|LABEL", help="What it explains. Default: the predicted class.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Lines of file,target: the target of each image.")
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    seed: Seed = 0,
    budget: Budget = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    boxes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv|DIR",
            help="Lines of file,left,top,right,bottom in pixels, a line for each box; or a folder of Pascal VOC files.",
        ),
    ] = None,
    per_layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="With --csv: a method that is also run on the coarsest layer, on the two coarsest, and so on; "
            "a method of one layer on each. May be repeated.",
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a row for each map into it.")] = None,
    npz: Annotated[Path | None, typer.Option(metavar="FILE", help="With --csv: also write the maps into it.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page with tables, curves and all maps. Where --csv and --npz are left out, these files are "
            "FILE.csv and FILE.npz beside it.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --report: the method to compare the others with. Default: the first."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with FILE, and do what is not done in it.")] = False,
    in_flight: Annotated[int, typer.Option(metavar="N", min=1, help="With --csv: requests at a time.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Score a saliency map of an image: one in a file, or one that a method makes.

    With --csv, score the maps of all images by all methods on all models, and end with their means. A row is in the
    file as soon as it is done, and what fails is a row with its error. The same command with --resume goes on where
    the last one was interrupted, and tries again what failed; the finished file is sorted.

    With --report, also write all that into one page that needs no other file and no network. It is made from the CSV
    and the maps: the same command with --resume makes it anew without asking for what is done.
    """
    csv = csv or (report and report.with_suffix(".csv"))
    npz = npz or (report and report.with_suffix(".npz"))
    parameters = _parameters(param)
    variants = [_variant(each, parameters, layer, seed) for each in dict.fromkeys(method or [])]
    metrics = list(dict.fromkeys(metric or DEFAULT_METRICS))
    given = None if target is None else _target(target)
    if csv is None:
        only_many = {
            "--labels": labels,
            "--npz": npz,
            "--resume": resume,
            "--per-layer": per_layer,
            "--against": against,
        }
        _one_only(images, variants, model, only_many)
        with _errors_as_lines(), Client(address, timeout=timeout) as client:
            _evaluate_one(
                client,
                images[0],
                as_json=as_json,
                saliency=None if saliency is None else files.load_map(saliency),
                method=variants[0].method if variants else None,
                metrics=metrics,
                model=model[0] if model else None,
                target=given,
                layers=layer,
                parameters=variants[0].parameters if variants else parameters,
                seed=seed,
                budget=budget,
                boxes=read_boxes(boxes, images)[0] if boxes else None,
            )
        return
    if saliency or as_json or not variants:
        raise typer.BadParameter("takes --method, and neither --saliency nor --json", param_hint="--csv")
    if labels and given is not None:
        raise typer.BadParameter("give either --target or --labels", param_hint="--labels")
    if against is not None and (report is None or against not in [each.label for each in variants]):
        raise typer.BadParameter("takes --report, and one of the --method", param_hint="--against")
    if report:
        _report_module()
    studied = [_variant(each, parameters, layer, seed) for each in dict.fromkeys(per_layer or [])]
    with _errors_as_lines(), Client(address, timeout=timeout) as client:
        found = sheet.image_files(images)
        models = list(dict.fromkeys(model or [_model(client, None).name]))
        _check(client, models, [*variants, *studied], metrics, truth=boxes is not None)
        wanted = Wanted(
            images=found,
            targets=[_target(each) for each in read_labels(labels, found)] if labels else [given] * len(found),
            variants={name: [*variants, *_layered(client, name, studied)] for name in models},
            metrics=metrics,
            boxes=read_boxes(boxes, found) if boxes else None,
            budget=budget,
        )
        run = Run(client, wanted, csv, npz, resume)
        rows = _evaluate_many(run, in_flight)
        Console().print(tables.means(rows, metrics))
        if report:
            _write_report(client, report, run, order=[each.label for each in variants], against=against)
        if any(row["error"] for row in rows):
            raise typer.Exit(1)


def _one_only(images: list[Path], methods: Sequence[Any], models: list[str] | None, options: dict[str, Any]) -> None:
    """Refuses what only a run over many images can do."""
    for name, given in options.items():
        if given:
            raise typer.BadParameter("goes with --csv", param_hint=name)
    if len(images) > 1 or images[0].is_dir() or len(methods) > 1 or len(models or []) > 1:
        raise typer.BadParameter("several images, methods or models need a file for their scores", param_hint="--csv")


def _evaluate_one(client: Client, image: Path, *, as_json: bool, **options: Any) -> None:
    evaluation: Evaluation = _followed(client.evaluate_stream(image, **options), image.name)
    if as_json:
        _print_json(files.evaluation_record(image, evaluation))
        return
    _warn(image, evaluation)
    table = tables.plain_table("metric", "value", "unit")
    for name, score in evaluation.scores.items():
        table.add_row(name, f"{score:.4g}", "" if score.unit == "1" else score.unit)
    typer.echo(f"{image}: {evaluation.target}, probability {evaluation.target.probability:.3f}")
    Console().print(table)


def _evaluate_many(run: Run, in_flight: int) -> list[sheet.Row]:
    """Does what is not done; the rows of the CSV."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    failed = 0
    try:
        with ProgressBar(
            *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
        ) as bar:
            task = bar.add_task("evaluate", total=run.wanted.count, completed=len(run.done), failed=0)
            for result in run.results(in_flight):
                if result.error is not None:
                    failed += 1
                    name = run.names[result.index]
                    text = f"error: {name}, {result.model}, {result.method}: {_said(result.error)}"
                    console.print(text, markup=False, highlight=False, soft_wrap=True)
                bar.update(task, advance=1, failed=failed)
        return run.finish()
    except KeyboardInterrupt:
        typer.echo(f"{run.csv} keeps what is done: the same command with --resume goes on", err=True)
        raise


def _write_report(client: Client, path: Path, run: Run, **options: Any) -> None:
    console = Console(stderr=True)
    with console.status(f"writing {escape(str(path))}"):
        _report_module().write(
            path,
            csv=run.csv,
            npz=run.npz,
            models=client.models(),
            methods=client.methods(),
            metrics=client.metrics(),
            command=shlex.join(["camserve", *(each for each in sys.argv[1:] if each != "--resume")]),
            **options,
        )


def _report_module() -> Any:
    """What a report needs is not installed by everybody. Exits with 1 where it is missing."""
    try:
        from camserve import report
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("camserve."):
            raise  # a bug of ours, not something to install
        typer.echo(f"error: a report needs {missing.name}: pip install 'camserve[report]'", err=True)
        raise typer.Exit(1) from None
    return report


def _layered(client: Client, model: str, studied: list[Variant]) -> list[Variant]:
    of = _model(client, model)
    methods = {method.name: method for method in client.methods()} if studied else {}
    return [each for variant in studied for each in by_layer(variant, methods[variant.method], of)]


def _check(client: Client, models: list[str], variants: list[Variant], metrics: list[str], *, truth: bool) -> None:
    """What would fail with every image. Raises NotFound for an unknown name, InvalidArgument where truth is needed."""
    known = client.metrics()
    for model in models:
        _named(client.models(), model, "model")
    methods = client.methods()
    for variant in variants:
        _named(methods, variant.method, "method")
    for name in metrics:
        [metric] = _named(known, name, "metric")
        if metric.needs_truth and not truth:
            raise InvalidArgument(f"{name} needs to know where the target is: give --boxes", field="truth")


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


def _variant(text: str, parameters: dict[str, Any], layers: list[str] | None, seed: int) -> Variant:
    """NAME, or NAME:KEY=VALUE,… with parameters of its own beside those of all; the whole text is its label."""
    name, colon, own = text.partition(":")
    merged = {**parameters, **_parameters(own.split(",") if colon else None, "--method")}
    return Variant(text, name, merged, layers or (), seed)


def _parameters(given: list[str] | None, option: str = "--param") -> dict[str, Any]:
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


def _box(text: str) -> list[float]:
    try:
        sides = [float(each) for each in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) != 4:
        raise typer.BadParameter(f"{text!r} is not LEFT,TOP,RIGHT,BOTTOM", param_hint="--box")
    return sides


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
    return str(error).replace("target_top_k", "--top-k")  # the contract's name for it


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
    if shown.left_out:
        channels, rows = (sum(getattr(each, of) for each in shown.left_out) for of in ("channels", "rows"))
        error = max(each.error for each in shown.left_out)
        typer.echo(
            f"note: {image}: {shown.target}: {channels} channels left out, which saved {rows} rows; "
            f"no layer's sum is off by more than {error:.2g} of its maximum",
            err=True,
        )
    for warning in shown.warnings:
        typer.echo(f"warning: {image}: {shown.target}: {warning}", err=True)


def _print_json(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record, ensure_ascii=False))
