"""Explain three photographs by three methods on a local server, and write a page about them: `make demo`.

The example starts a server, sends requests from several threads, shows their progress, and reads the maps and their
scores. `demo_page.py` makes the page.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import demo_page
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import rich.box
import rich.progress
import skimage
from rich.console import Console
from rich.table import Table

import camserve

CHELSEA = (
    "Grad-CAM covers most of the face. PCAM± outlines the eyes, the bridge of the nose and the stripes above it. "
    "The deletion curve hardly falls until most of the face is removed: the network recognises even a blurred cat."
)
COFFEE = (
    "All three methods find the coffee in its cup. PCAM± marks the surface of the espresso and the inside of the cup, "
    "but not the saucer, the spoon and the table."
)
CAMERAMAN = (
    "ImageNet has no class for the man, and the network predicts the tripod. PCAM± marks the legs of the tripod, which "
    "are a few pixels wide, while Grad-CAM marks a part of the lawn. The curves show that the legs decide the class."
)

# The photographs are part of the scikit-image package. Their licence is CC0.
FOLDER = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = [
    demo_page.Photograph(FOLDER / "chelsea.png", "Chelsea", "by Stéfan van der Walt, CC0", CHELSEA),
    demo_page.Photograph(FOLDER / "coffee.png", "Coffee", "by Rachel Michetti, CC0", COFFEE),
    demo_page.Photograph(FOLDER / "camera.png", "Cameraman", "by Lav Varshney, CC0", CAMERAMAN),
]
METHODS = ["grad-cam", "opti-cam", "poly-cam"]
METRICS = ["insertion", "deletion"]


@dataclass(frozen=True)
class Effort:
    """Photographs, metrics and settings of one run of the demo.

    Attributes:
        photographs: The photographs to explain.
        metrics: Parameters of each metric.
        options: Further arguments of `Client.explain_stream`, for each method.
        note: A note for the page, or "".
    """

    photographs: Sequence[demo_page.Photograph]
    metrics: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Mapping[str, Any]]
    note: str = ""


def full() -> Effort:
    """Return the settings of the papers for every method and metric."""
    return Effort(PHOTOGRAPHS, {name: {} for name in METRICS}, {name: {} for name in METHODS})


def quick(model: camserve.Model) -> Effort:
    """Return settings with far fewer rows, which take about half a minute."""
    return Effort(
        [replace(photograph, comment="") for photograph in PHOTOGRAPHS[:1]],
        {name: {"steps": 14} for name in METRICS},
        {
            "grad-cam": {},
            "opti-cam": {"parameters": {"steps": 10}},
            # The coarsest layers are those with the most channels.
            "poly-cam": {"layers": [layer.name for layer in model.layers[1:3]]},
        },
        note="This was a quick run with fewer rows than in the papers, so the maps differ from those of the methods.",
    )


def main() -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(description="Explain three photographs by three methods.")
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for the images and the page"
    )
    parser.add_argument("--quick", action="store_true", help="one photograph and far fewer rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # SIGTERM must also run the `finally` blocks, which stop the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    console = Console()
    try:
        run(options.out, options.quick, console)
    except KeyboardInterrupt:
        console.print("cancelled")
        return 130
    except camserve.CamserveError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    console.print(f"\nThe page:  {(options.out / 'index.html').resolve().as_uri()}", soft_wrap=True)
    console.print(f"Images:    {options.out}", soft_wrap=True, highlight=False)
    return 0


def run(out: Path, is_quick: bool, console: Console) -> None:
    """Explain the photographs, print the table, and write the images and the page."""
    started = time.monotonic()
    # The contexts are left in reverse order: the client first, which cancels pending requests, then its threads, then
    # the server.
    with (
        serving(out / "server.log", console) as address,
        ThreadPoolExecutor(len(METHODS)) as pool,
        camserve.Client(address, timeout=None) as client,
    ):
        model = client.models()[0]
        methods = {method.name: method for method in client.methods()}
        effort = quick(model) if is_quick else full()
        rows = []
        for photograph in effort.photographs:
            results = explain_photograph(client, pool, photograph, effort, methods, console)
            rows.append((photograph, results))
    for photograph, results in rows:
        for result in results:
            result.explanation.overlay().save(out / f"{photograph.path.stem}.{result.method.name}.png")
        strip(results).save(out / f"{photograph.path.stem}.strip.jpg", quality=90)
    page = demo_page.html(model, rows, note=effort.note, seconds=time.monotonic() - started)
    (out / "index.html").write_text(page, encoding="utf-8")
    console.print(table(rows))
    score_rows = rows[0][1][0].score_rows
    console.print(f"Rows and time are those of the maps. The scores of each map took {score_rows} more rows.")


@contextmanager
def serving(log: Path, console: Console) -> Iterator[str]:
    """Run a server with the embedded model in a process of its own.

    Args:
        log: File for the log of the server.
        console: Console for the status line.

    Yields:
        The address of the server. The process is stopped at the end of the block.
    """
    command = [sys.executable, "-m", "camserve_cli", "serve", "--listen", "127.0.0.1:0"]
    # The server runs in its own session, so that Ctrl-C does not reach it. The demo stops it.
    with (
        log.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True) as server,
    ):
        try:
            with console.status("Starting a server and loading the network …"):
                address = ready(server, log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()


def ready(server: subprocess.Popen[str], log: Path) -> str:
    """Wait until the server is ready, and return its address."""
    assert server.stdout is not None, "stdout is a pipe"
    for line in server.stdout:
        if line.startswith("camserve is ready on "):
            return line.removeprefix("camserve is ready on ").partition(",")[0]
    tail = log.read_text(encoding="utf-8")[-2000:]
    raise camserve.Unavailable(f"the server did not start; the end of its log: {tail}")


def explain_photograph(
    client: camserve.Client,
    pool: ThreadPoolExecutor,
    photograph: demo_page.Photograph,
    effort: Effort,
    methods: Mapping[str, camserve.Method],
    console: Console,
) -> list[demo_page.Result]:
    """Request all methods at the same time, so that the server fills its batches with rows of all of them."""
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
        rich.progress.TextColumn("{task.fields[stage]}", style="dim"),
        rich.progress.TimeElapsedColumn(),
    )
    width = max(len(methods[name].title) for name in METHODS)
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        pending = []
        for name in METHODS:
            title = f"{photograph.title}: {methods[name].title:{width}}"
            bar = bars.add_task(title, total=0, stage="")
            pending.append(pool.submit(follow, client, photograph, methods[name], effort, bars, bar))
        results = [each.result() for each in pending]
    first = results[0].explanation
    rows = sum(result.explanation.cost.rows for result in results)
    console.print(
        f"{photograph.title}: {first.target}, probability {first.target.probability:.3f}, {rows:,} rows",
        markup=False,
        highlight=False,
    )
    return results


def follow(
    client: camserve.Client,
    photograph: demo_page.Photograph,
    method: camserve.Method,
    effort: Effort,
    bars: rich.progress.Progress,
    bar: rich.progress.TaskID,
) -> demo_page.Result:
    """Request one explanation with its scores, and show its progress."""
    levels = []
    started, map_seconds = time.monotonic(), 0.0
    for event in client.explain_stream(
        photograph.path, method=method.name, metrics=effort.metrics, **effort.options[method.name]
    ):
        match event:
            case camserve.Progress():
                bars.update(bar, completed=event.rows_done, total=event.rows_total, stage=event.stage)
                if event.stage in effort.metrics:  # The map is finished, and its scoring has begun.
                    map_seconds = map_seconds or time.monotonic() - started
            case camserve.Level():
                levels.append(event)
            case camserve.Explanation():
                explanation = event
    return demo_page.Result(method, explanation, tuple(levels), map_seconds)


def table(rows: Sequence[tuple[demo_page.Photograph, Sequence[demo_page.Result]]]) -> Table:
    """Return the table of the results, which fits a terminal with 80 columns."""
    columns = ("photo", "method", "predicted\nclass", "probability", "rows", "time", "insertion\n− deletion")
    result_table = Table(box=rich.box.SIMPLE_HEAD, padding=0)
    for i, title in enumerate(columns):
        result_table.add_column(title, justify="right" if i >= 3 else "left", no_wrap=True, header_style="bold")
    for photograph, results in rows:
        for result in results:
            e = result.explanation
            result_table.add_row(
                photograph.title if result is results[0] else "",
                result.method.title,
                e.target.label,
                f"{e.target.probability:.3f}",
                f"{result.map_rows:,}",
                f"{result.map_seconds:.1f} s",
                f"{result.difference:+.3f}".replace("-", "−"),
                end_section=result is results[-1],
            )
    return result_table


def strip(results: Sequence[demo_page.Result], side_px: int = 360) -> PIL.Image.Image:
    """Return an image with the photograph and the overlays side by side, with their names below."""
    image = results[0].explanation.image()
    tiles = {"photograph": image} | {r.method.title: r.explanation.overlay() for r in results}
    height, gap, foot = round(side_px * image.height / image.width), 8, 36
    whole = PIL.Image.new("RGB", ((side_px + gap) * len(tiles) - gap, height + foot), "white")
    draw, font = PIL.ImageDraw.Draw(whole), PIL.ImageFont.load_default(size=20)
    for i, (title, tile) in enumerate(tiles.items()):
        left = i * (side_px + gap)
        whole.paste(tile.resize((side_px, height), PIL.Image.Resampling.LANCZOS), (left, 0))
        draw.text((left + side_px / 2, height + foot / 2), title, fill="black", font=font, anchor="mm")
    return whole


if __name__ == "__main__":
    sys.exit(main())
