"""`camserve dicom`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

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
    asks,
    read_parameters,
    read_target,
)
from camserve_cli.output import errors_as_lines, print_json, said, warn

if TYPE_CHECKING:
    from camserve_dicom import DicomExplanation

__all__ = ["dicom"]

KINDS = ("sc", "sr", "pm", "seg", "gsps")

dicom = typer.Typer(help="Explain DICOM images: results are DICOM objects.", no_args_is_help=True)
dicom.command()(gateway)


class Regions(StrEnum):
    """What to do with an ultrasound image that has regions."""

    REFUSE = "refuse"
    CROP = "crop"
    IGNORE = "ignore"


class BurnedIn(StrEnum):
    """What to do with an image that has text burned in."""

    REFUSE = "refuse"
    IGNORE = "ignore"


@dicom.command()
@asks
def explain(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="DICOM images.")],
    *,
    server: Server,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the objects go; made if need be.")],
    outputs: Annotated[
        str, typer.Option(metavar="KINDS", help="Of sc, sr, pm, seg and gsps, with commas between them.")
    ] = "sc,sr",
    frame: Annotated[int, typer.Option(min=0, help="Of an image of several, from 0.")] = 0,
    model: ModelName = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="`camserve list methods` lists them.")] = "poly-cam",
    target: Annotated[str | None, typer.Option(metavar="INDEX|LABEL", help="Default: the predicted class.")] = None,
    layer: Layers = None,
    param: Parameters = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="May be repeated. Default: insertion, deletion and average-gain."),
    ] = None,
    check: Annotated[
        str,
        typer.Option(
            metavar="A>B", help="Of metrics or numbers: where it fails there is only a report; none for none."
        ),
    ] = "insertion>deletion",
    window: Annotated[
        str | None,
        typer.Option(metavar="CENTRE,WIDTH", help="With which the model was trained. Default: the header's."),
    ] = None,
    regions: Annotated[Regions, typer.Option(help="Of ultrasound.")] = Regions.REFUSE,
    burned_in: Annotated[BurnedIn, typer.Option(help="Text in the pixels.")] = BurnedIn.REFUSE,
    seed: Seed = 0,
    budget: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Explain DICOM images: write DICOM objects that a PACS stores.

    Only pixels are sent. DIR/STEM.sc.dcm is the overlay (Secondary Capture), STEM.sr.dcm the report with the scores;
    on request STEM.pm.dcm is the map itself (Parametric Map), STEM.seg.dcm where it is above half of its maximum, and
    STEM.gsps.dcm the outline of that. STEM is the file's own, with -2, -3 … after it where another has the same. The
    same image, explained again in the same way, gives the same objects. An image that fails does not stop the others.
    """
    with needs_extra("dicom", "camserve dicom explain"):
        import camserve_dicom as api
    api.silence_library_warnings()
    table = rich_tables.plain_table("file", "class", "probability", "objects", "withheld")
    failures = 0
    with errors_as_lines(), server.client() as client:
        asked: dict[str, Any] = {
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
            "seed": seed,
            "budget": budget,
        }
        if metric:
            asked["metrics"] = metric
        for file, stem in zip(files, _stems(files, out), strict=True):
            try:
                made = api.explain(client, file, **asked)
                written = made.save(out, stem)
            except (CamserveError, OSError) as error:
                typer.echo(f"error: {file}: {said(error)}", err=True)
                failures += 1
                continue
            if as_json:
                print_json(_record(file, written, made))
            else:
                target_ = made.explanation.target
                names = ", ".join(path.name for path in written)
                table.add_row(file.name, str(target_), f"{target_.probability:.3f}", names, "yes" * bool(made.withheld))
                warn(file, made.explanation)
                if made.withheld:
                    typer.echo(f"warning: {file}: {made.withheld}", err=True)
    if table.row_count:
        Console().print(table)
    if failures:
        raise typer.Exit(1)


def _window(text: str) -> tuple[float, float]:
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not CENTRE,WIDTH", param_hint="--window") from None
    return centre, width


def _stems(files: Sequence[Path], out: Path) -> list[str]:
    """A stem for each file, none twice and none whose objects would replace one of the files."""
    given = {file.resolve() for file in files}
    found: list[str] = []

    def taken(stem: str) -> bool:
        return stem in found or any((out / f"{stem}.{kind}.dcm").resolve() in given for kind in KINDS)

    for file in files:
        numbered = (f"{file.stem}-{number}" for number in itertools.count(2))
        found.append(next(stem for stem in itertools.chain([file.stem], numbered) if not taken(stem)))
    return found


def _record(file: Path, written: Sequence[Path], made: DicomExplanation) -> dict[str, Any]:
    explanation = made.explanation
    return {
        "file": str(file),
        "objects": [str(path) for path in written],
        "target": asdict(explanation.target),
        "scores": explanation.scores,
        "warnings": explanation.warnings,
        "withheld": made.withheld,
        "receipt": asdict(explanation.receipt),
    }
