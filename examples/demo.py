"""Explains three photographs by three methods, on a server of its own, and makes a page of it: `make demo`.

Everything that a caller needs is here: start a server, ask it from several threads, follow the progress, take the maps
and their scores. The page itself is made in `demo_page.py`.
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
    "Grad-CAM covers most of the face; PCAM± draws the eyes, the bridge of the nose and the stripes above it. "
    "Deletion hardly falls until most of the face is gone: even blurred, this is a cat to the network."
)
COFFEE = (
    "All three find the coffee in its cup. PCAM± keeps to the surface of the espresso and the inside of the cup, "
    "and leaves out saucer, spoon and table."
)
CAMERAMAN = (
    "ImageNet has no class for the man; the network says tripod. PCAM± traces its legs, a few pixels wide, "
    "where Grad-CAM lights up a patch of lawn. They are enough to have the class, or to lose it: see the curves."
)

# They lie inside scikit-image's wheel, and all three are CC0.
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
    """How much is asked for: which photographs, and the options of `explain_stream` for each method."""

    photographs: Sequence[demo_page.Photograph]
    metrics: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Mapping[str, Any]]
    note: str = ""


def full() -> Effort:
    """Every method and metric as its paper has it."""
    return Effort(PHOTOGRAPHS, {name: {} for name in METRICS}, {name: {} for name in METHODS})


def quick(model: camserve.Model) -> Effort:
    """Half a minute's work: the same steps, but far fewer rows."""
    return Effort(
        [replace(photograph, look="") for photograph in PHOTOGRAPHS[:1]],
        {name: {"steps": 14} for name in METRICS},
        {
            "grad-cam": {},
            "opti-cam": {"parameters": {"steps": 10}},
            # The coarsest layers are those with the most channels.
            "poly-cam": {"layers": [layer.name for layer in model.layers[1:3]]},
        },
        note="A quick run, with fewer rows than the papers ask for: these are not the methods' real maps.",
    )


def main() -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Explain three photographs by three methods.")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where the pictures go")
    parser.add_argument("--quick", action="store_true", help="one photograph and far fewer rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # `kill` ends the demo as Ctrl-C does: the server is stopped either way.
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
    console.print(f"Pictures:  {options.out}", soft_wrap=True, highlight=False)
    return 0


def run(out: Path, is_quick: bool, console: Console) -> None:
    """Explains, prints the table, writes the pictures and the page."""
    started = time.monotonic()
    # Left in the opposite order: the client first, which cancels what is under way, then its threads, then the server.
    with (
        serving(out / "server.log", console) as address,
        ThreadPoolExecutor(len(METHODS)) as pool,
        camserve.Client(address, timeout=None) as client,
    ):
        model = client.models()[0]
        methods = {method.name: method for method in client.methods()}
        effort = quick(model) if is_quick else full()
        shown = []
        for photograph in effort.photographs:
            results = explained(client, pool, photograph, effort, methods, console)
            shown.append((photograph, results))
    for photograph, results in shown:
        for result in results:
            result.explanation.overlay().save(out / f"{photograph.path.stem}.{result.method.name}.png")
        strip(results).save(out / f"{photograph.path.stem}.strip.jpg", quality=90)
    page = demo_page.html(model, shown, note=effort.note, seconds=time.monotonic() - started)
    (out / "index.html").write_text(page, encoding="utf-8")
    console.print(table(shown))
    console.print(f"Rows and time are those of the maps; scoring took {shown[0][1][0].score_rows} more rows for each.")


@contextmanager
def serving(log: Path, console: Console) -> Iterator[str]:
    """The address of a server with the embedded model, in a process of its own that ends when the block is left."""
    command = [sys.executable, "-m", "camserve_cli", "serve", "--listen", "127.0.0.1:0"]
    # A session of its own, so that Ctrl-C reaches us alone, and we stop it.
    with (
        log.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True) as server,
    ):
        try:
            with console.status("Starting a server, loading and warming the network …"):
                address = ready(server, log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()


def ready(server: subprocess.Popen[str], log: Path) -> str:
    """Waits until the server says that it is ready. Returns its address."""
    assert server.stdout is not None, "stdout is a pipe"
    for line in server.stdout:
        if line.startswith("camserve is ready on "):
            return line.removeprefix("camserve is ready on ").partition(",")[0]
    raise camserve.Unavailable(f"the server did not start; it says: {log.read_text(encoding='utf-8')[-2000:]}")


def explained(
    client: camserve.Client,
    pool: ThreadPoolExecutor,
    photograph: demo_page.Photograph,
    effort: Effort,
    methods: Mapping[str, camserve.Method],
    console: Console,
) -> list[demo_page.Result]:
    """Asks for all methods at once: the server fills its batches with rows of any of them."""
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
        rich.progress.TextColumn("{task.fields[stage]}", style="dim"),
        rich.progress.TimeElapsedColumn(),
    )
    width = max(len(methods[name].title) for name in METHODS)
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        asked = []
        for name in METHODS:
            title = f"{photograph.title}: {methods[name].title:{width}}"
            bar = bars.add_task(title, total=0, stage="")
            asked.append(pool.submit(follow, client, photograph, methods[name], effort, bars, bar))
        results = [each.result() for each in asked]
    answer = results[0].explanation
    rows = sum(result.explanation.cost.rows for result in results)
    console.print(
        f"{photograph.title}: {answer.target}, probability {answer.target.probability:.3f}, {rows:,} rows",
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
    """One explanation with its scores, its progress shown on the way."""
    levels = []
    started, map_seconds = time.monotonic(), 0.0
    for event in client.explain_stream(
        photograph.path, method=method.name, metrics=effort.metrics, **effort.options[method.name]
    ):
        match event:
            case camserve.Progress():
                bars.update(bar, completed=event.rows_done, total=event.rows_total, stage=event.stage)
                if event.stage in effort.metrics:  # the map is done, and is being scored
                    map_seconds = map_seconds or time.monotonic() - started
            case camserve.Level():
                levels.append(event)
            case camserve.Explanation():
                explanation = event
    return demo_page.Result(method, explanation, tuple(levels), map_seconds)


def table(shown: Sequence[tuple[demo_page.Photograph, Sequence[demo_page.Result]]]) -> Table:
    """What the terminal shows at the end."""
    # Narrow enough for a terminal of 80 columns.
    columns = ("photo", "method", "predicted\nclass", "probability", "rows", "time", "insertion\n− deletion")
    shown_table = Table(box=rich.box.SIMPLE_HEAD, padding=0)
    for i, title in enumerate(columns):
        shown_table.add_column(title, justify="right" if i >= 3 else "left", no_wrap=True, header_style="bold")
    for photograph, results in shown:
        for result in results:
            e = result.explanation
            shown_table.add_row(
                photograph.title if result is results[0] else "",
                result.method.title,
                e.target.label,
                f"{e.target.probability:.3f}",
                f"{result.map_rows:,}",
                f"{result.map_seconds:.1f} s",
                f"{result.difference:+.3f}".replace("-", "−"),
                end_section=result is results[-1],
            )
    return shown_table


def strip(results: Sequence[demo_page.Result], side_px: int = 360) -> PIL.Image.Image:
    """The photograph and the maps over it, side by side, with their names below."""
    image = results[0].explanation.image()
    pictures = {"photograph": image} | {r.method.title: r.explanation.overlay() for r in results}
    height, gap, foot = round(side_px * image.height / image.width), 8, 36
    whole = PIL.Image.new("RGB", ((side_px + gap) * len(pictures) - gap, height + foot), "white")
    draw, font = PIL.ImageDraw.Draw(whole), PIL.ImageFont.load_default(size=20)
    for i, (title, picture) in enumerate(pictures.items()):
        left = i * (side_px + gap)
        whole.paste(picture.resize((side_px, height), PIL.Image.Resampling.LANCZOS), (left, 0))
        draw.text((left + side_px / 2, height + foot / 2), title, fill="black", font=font, anchor="mm")
    return whole


if __name__ == "__main__":
    sys.exit(main())
