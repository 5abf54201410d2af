"""Output that several commands share: progress, warnings and errors on stderr, and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBar

from camserve.answers import Level, Progress, Randomised, SaliencyMap
from camserve.errors import CamserveError, InternalError

__all__ = [
    "Failures",
    "error_text",
    "errors_as_lines",
    "map_bar",
    "print_json",
    "print_table",
    "show_progress",
    "step_bar",
    "warn",
]


_UNLIMITED = 100_000  # characters; wider than any table


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Print an error as one line on stderr instead of a traceback.

    Raises:
        typer.Exit: An operation failed (exit status 1), or Ctrl-C cancelled it (exit status 130).
    """
    try:
        yield
    except (CamserveError, OSError) as error:
        typer.echo(f"error: {error_text(error)}", err=True)
        raise typer.Exit(1) from None
    except UnicodeEncodeError as error:  # of an argument; requests contain UTF-8
        typer.echo(f"error: {error.object!a} contains bytes that are not UTF-8; expected UTF-8", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("cancelled", err=True)
        raise typer.Exit(130) from None


def error_text(error: CamserveError | OSError) -> str:
    """Return the message of an error, in which options have the names that the user typed."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    # The names of fields in the request.
    return str(error).replace("target_top_k", "--top-k").replace("map_format.native", "--native-maps")


class Failures:
    """Failed requests of a run, which end it with one line for each kind of failure."""

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, tuple[str, int]] = {}  # by kind: the text of the first failure, and their number

    def add(self, subject: str, error: CamserveError | OSError) -> None:
        """Add a failure.

        Args:
            subject: The request, such as the name of its image.
            error: Its error.
        """
        kind = error.reason or error.code.name if isinstance(error, CamserveError) else type(error).__name__
        self.add_text(subject, error_text(error), kind)

    def add_text(self, subject: str, text: str, kind: str) -> None:
        """Add a failure whose error is a text.

        Args:
            subject: The request, such as the name of its image.
            text: Its error.
            kind: The kind of error.
        """
        first, number = self._kinds.get(kind, (f"{subject}: {text}", 0))
        self._kinds[kind] = first, number + 1
        self.count += 1

    def print_summary(self) -> None:
        """Print the first failure of each kind on stderr, with the number of further ones."""
        for kind, (first, number) in self._kinds.items():
            more = f" ({number - 1} more: {kind})" if number > 1 else ""
            typer.echo(f"error: {first}{more}", err=True)


def print_table(*parts: RenderableType) -> None:
    """Print tables on stdout. They are as wide as their contents, except on a terminal, where long values are wrapped.

    Args:
        parts: Tables and lines of text.
    """
    console = Console()
    if not console.is_terminal:
        unlimited = console.options.update(width=_UNLIMITED)
        console.width = max(console.width, *(console.measure(part, options=unlimited).maximum for part in parts))
    console.print(*parts)


def show_progress(events: Iterable[Any], title: str) -> Any:
    """Show a progress bar on stderr while a stream runs, and return the last event.

    Args:
        events: Progress and intermediate results, and then the answer.
        title: Text before the bar.

    Returns:
        The answer.

    Raises:
        InternalError: The stream ended without an answer.
    """
    answer = None
    with _bar(
        TextColumn("{task.completed:.0f} of {task.total:.0f} rows"),
        TextColumn("{task.fields[stage]}{task.fields[level]}", markup=False),
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
        raise InternalError("the server ended the stream without an answer; see the log of the server")
    return answer


@contextmanager
def map_bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr for a number of maps.

    Args:
        total: Number of maps.
        done: Number of maps that are finished at the start.

    Yields:
        A function to call after each map. It takes the number of failures so far.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    with ProgressBar(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
    ) as bar:
        task = bar.add_task("evaluate", total=total, completed=done, failed=0)
        yield lambda failed: bar.update(task, advance=1, failed=failed)


@contextmanager
def step_bar(title: str, steps: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar on stderr for a number of steps.

    Args:
        title: Text before the bar.
        steps: Number of steps.

    Yields:
        A function that takes the name of each step when it begins.
    """
    with _bar(TextColumn("{task.fields[step]}", markup=False)) as bar:
        task = bar.add_task(title, total=steps, completed=-1, step="")  # no step has ended when the first one begins
        yield lambda step: bar.update(task, advance=1, step=step)


def _bar(*columns: ProgressColumn) -> ProgressBar:
    """Return a progress bar on stderr, which is not shown without a terminal."""
    console = Console(stderr=True)
    return ProgressBar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,  # rich would write stdout to its own console, which is stderr
    )


def warn(image: Path, result: SaliencyMap) -> None:
    """Print the warnings of a map on stderr."""
    where = f"{image}: {result.target}"
    if result.share < 1:
        typer.echo(
            f"warning: {where}: the method stopped early; the map contains {100 * result.share:.4g} % of the full sum",
            err=True,
        )
    if result.left_out:
        channels, rows = (sum(getattr(each, name) for each in result.left_out) for name in ("channels", "rows"))
        error = max(each.error for each in result.left_out)
        typer.echo(
            f"note: {where}: the tolerance left out {channels} channels, which saved {rows} rows; "
            f"the sum of a layer has an error of at most {error:.2g} of its maximum",
            err=True,
        )
    for warning in result.warnings:
        typer.echo(f"warning: {where}: {warning}", err=True)


def print_json(record: dict[str, Any]) -> None:
    """Print an object as one line of JSON on stdout."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(record)
    typer.echo(text)
