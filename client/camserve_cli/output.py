"""What is shown: progress, warnings and errors, on stderr; JSON on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from camserve.answers import Level, Progress, Randomised, SaliencyMap
from camserve.errors import CamserveError, InternalError

__all__ = ["errors_as_lines", "followed", "print_json", "said", "warn"]


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """What fails becomes one line on stderr and exit code 1; Ctrl-C, which cancels the call under way, 130."""
    try:
        yield
    except (CamserveError, OSError) as error:
        typer.echo(f"error: {said(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("cancelled", err=True)
        raise typer.Exit(130) from None


def said(error: CamserveError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return str(error).replace("target_top_k", "--top-k")  # the contract's name for it


def followed(events: Iterable[Any], title: str) -> Any:
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
                case Randomised():
                    bar.update(task, level=f", step {event.index + 1} of {event.count} ({event.layers[-1]})")
                case _:
                    answer = event
    if answer is None:
        raise InternalError("the server ended the stream without an answer")
    return answer


def warn(image: Path, shown: SaliencyMap) -> None:
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


def print_json(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record, ensure_ascii=False))
