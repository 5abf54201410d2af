"""`camserve dicom`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from camserve.errors import CamserveError
from camserve_cli import rich_tables
from camserve_cli.commands.gateway import gateway
from camserve_cli.extras import needs_extra
from camserve_cli.options import (
    AsJson,
    Budget,
    Layers,
    ModelName,
    Parameters,
    Seed,
    Server,
    read_parameters,
    read_target,
    with_server_options,
)
from camserve_cli.output import error_text, errors_as_lines, print_json, print_table, warn

if TYPE_CHECKING:
    from camserve_dicom import DicomExplanation

__all__ = ["dicom"]

KINDS = ("sc", "sr", "esr", "pm", "seg", "gsps", "pdf")

dicom = typer.Typer(help="Explain DICOM images and write the results as DICOM objects.", no_args_is_help=True)
dicom.command()(gateway)


class Regions(StrEnum):
    """Treatment of ultrasound images with calibrated regions."""

    REFUSE = "refuse"
    CROP = "crop"
    IGNORE = "ignore"


class BurnedIn(StrEnum):
    """Treatment of images with burned-in text."""

    REFUSE = "refuse"
    IGNORE = "ignore"


class NonImage(StrEnum):
    """Treatment of objects whose values are not an image."""

    REFUSE = "refuse"
    IGNORE = "ignore"


@dicom.command()
@with_server_options
def explain(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="DICOM image files.")],
    *,
    server: Server,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the DICOM objects. It is created if necessary.")],
    outputs: Annotated[
        str,
        typer.Option(
            metavar="KINDS", help="Kinds of objects to write: sc, sr, esr, pm, seg, gsps and pdf, separated by commas."
        ),
    ] = "sc,sr",
    frame: Annotated[int, typer.Option(min=0, help="Frame of a multi-frame image, counted from 0.")] = 0,
    model: ModelName = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Method. `camserve list methods` lists them.")
    ] = "poly-cam",
    target: Annotated[
        str | None, typer.Option(metavar="INDEX|LABEL", help="Class to explain. Default: the predicted class.")
    ] = None,
    layer: Layers = None,
    param: Parameters = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Metric that scores the map. May be repeated. Default: insertion, deletion and average-gain.",
        ),
    ] = None,
    check: Annotated[
        str,
        typer.Option(
            metavar="A>B",
            help="Comparison of metrics or numbers. If it is false, only the report (sr) is written. "
            "`none` disables the check.",
        ),
    ] = "insertion>deletion",
    window: Annotated[
        str | None,
        typer.Option(
            metavar="CENTRE,WIDTH", help="Window with which the model was trained. Default: that of the file."
        ),
    ] = None,
    regions: Annotated[
        Regions, typer.Option(help="Ultrasound images with regions: refuse, crop to the region, or ignore the regions.")
    ] = Regions.REFUSE,
    burned_in: Annotated[
        BurnedIn, typer.Option(help="Images with burned-in text: refuse, or ignore the text.")
    ] = BurnedIn.REFUSE,
    non_image: Annotated[
        NonImage,
        typer.Option(help="Segmentations, doses and other objects that are not images: refuse, or explain anyway."),
    ] = NonImage.REFUSE,
    pdf_font: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Font for characters of the PDF that DejaVu Sans lacks, such as Chinese ones. May be repeated.",
        ),
    ] = None,
    seed: Seed = 0,
    budget: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Explain DICOM images and write DICOM objects that a PACS can store.

    Of the DICOM object, only pixels are sent to the server. The result objects of an image are:

    - DIR/STEM.sc.dcm: the overlay (Secondary Capture)
    - DIR/STEM.sr.dcm: the report with the scores (Structured Report)
    - DIR/STEM.esr.dcm: the same report as Enhanced SR, if requested
    - DIR/STEM.pm.dcm: the map (Parametric Map), if requested
    - DIR/STEM.seg.dcm: the pixels of at least half of the maximum (Segmentation), if requested
    - DIR/STEM.gsps.dcm: the outline of these pixels (Presentation State), if requested
    - DIR/STEM.pdf.dcm: a report with pictures (Encapsulated PDF), if requested

    STEM is the stem of the file name, followed by -2, -3 and so on if another file has the same stem. If the same image
    is explained again in the same way, the objects are the same. If an image fails, the command continues with the
    others and exits with status 1.
    """
    with needs_extra("dicom", "camserve dicom explain"):
        import camserve_dicom as api
        from camserve_dicom.errors import with_options
    api.silence_library_warnings()
    table = rich_tables.plain_table("file", "class", "probability", "objects", "withheld")
    failures = 0
    with errors_as_lines(), server.client() as client:
        settings: dict[str, Any] = {
            "frame": frame,
            "outputs": [each.strip() for each in outputs.split(",")],
            "model": model,
            "method": method,
            "target": None if target is None else read_target(target),
            "layers": layer,
            "parameters": read_parameters(param),
            "check": None if check == "none" else check,
            "window": None if window is None else _window(window),
            "regions": regions.value,
            "burned_in": burned_in.value,
            "non_image": non_image.value,
            "pdf_fonts": pdf_font or (),
            "seed": seed,
            "budget": budget,
        }
        if metric:
            settings["metrics"] = metric
        for file, stem in zip(files, _stems(files, out), strict=True):
            try:
                result = api.explain(client, file, **settings)
                written = result.save(out, stem)
            except (CamserveError, OSError) as error:
                typer.echo(f"error: {file}: {with_options(error_text(error))}", err=True)
                failures += 1
                continue
            if as_json:
                print_json(_record(file, written, result))
            else:
                predicted = result.explanation.target
                names = ", ".join(path.name for path in written)
                withheld = "yes" if result.withheld else ""
                cells = (file.name, str(predicted), f"{predicted.probability:.3f}", names, withheld)
                table.add_row(*map(escape, cells))
                warn(file, result.explanation)
                for warning in result.warnings:
                    if warning not in result.explanation.warnings:
                        typer.echo(f"warning: {file}: {warning}", err=True)
                if result.withheld:
                    typer.echo(f"warning: {file}: {result.withheld}", err=True)
    if table.row_count:
        print_table(table)
    if failures:
        raise typer.Exit(1)


def _window(text: str) -> tuple[float, float]:
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} does not have the form CENTRE,WIDTH", param_hint="--window") from None
    return centre, width


def _stems(files: Sequence[Path], out: Path) -> list[str]:
    """Return a distinct stem for each file, so that no object replaces one of the files."""
    inputs = {file.resolve() for file in files}
    stems: list[str] = []

    def taken(stem: str) -> bool:
        return stem in stems or any((out / f"{stem}.{kind}.dcm").resolve() in inputs for kind in KINDS)

    for file in files:
        numbered = (f"{file.stem}-{number}" for number in itertools.count(2))
        stems.append(next(stem for stem in itertools.chain([file.stem], numbered) if not taken(stem)))
    return stems


def _record(file: Path, written: Sequence[Path], result: DicomExplanation) -> dict[str, Any]:
    explanation = result.explanation
    return {
        "file": str(file),
        "objects": [str(path) for path in written],
        "target": asdict(explanation.target),
        "scores": explanation.scores,
        "warnings": result.warnings,
        "withheld": result.withheld,
        "receipt": asdict(explanation.receipt),
    }
