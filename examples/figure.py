"""Draws all methods side by side, as in Figure 5 of the Poly-CAM paper: `make figure`.

A photograph a row and a method a column, all from the embedded network through a server of its own. With `--single`
(`make pictures`) each map of the first photograph becomes a file of its own instead, for docs/methods.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import demo
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import rich.progress
from groups import grouped
from rich.console import Console

import camserve
from camserve.heatmaps import ALPHA, overlay

OUT = Path(__file__).parent.parent / "docs" / "pictures"


@dataclass(frozen=True)
class Photograph:
    """A photograph that lies inside scikit-image's wheel, or the `box` (left, top, right, bottom) of it."""

    file: str
    box: tuple[int, int, int, int] | None = None

    def open(self) -> PIL.Image.Image:
        """It, in colour."""
        with PIL.Image.open(demo.FOLDER / self.file) as whole:
            return whole.convert("RGB").crop(self.box)


# The first three are CC0, the rocket is in the public domain. ImageNet has no class for it; a missile is the nearest.
PHOTOGRAPHS = {
    "chelsea": Photograph("chelsea.png"),
    "coffee": Photograph("coffee.png"),
    "cameraman": Photograph("camera.png"),
    "rocket": Photograph("rocket.jpg", (200, 50, 500, 350)),
}

Row = tuple[PIL.Image.Image, Mapping[str, camserve.Explanation]]


def main() -> int:
    """Runs it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw all methods side by side.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the pictures go")
    parser.add_argument("--photographs", nargs="+", choices=PHOTOGRAPHS, default=[*PHOTOGRAPHS], metavar="NAME")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="all that the network can serve, if left out")
    parser.add_argument("--single", action="store_true", help="a file for each method, of the first photograph")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # `kill` ends it as Ctrl-C does: the server is stopped either way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    console = Console()
    try:
        run(options.out, options.photographs, options.methods, options.single, console)
    except KeyboardInterrupt:
        console.print("cancelled")
        return 130
    except camserve.CamserveError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    return 0


def run(out: Path, photographs: Sequence[str], names: Sequence[str] | None, single: bool, console: Console) -> None:
    """Explains, and writes the pictures."""
    # Left in the opposite order: the client first, which cancels what is under way, then the server.
    with (
        tempfile.TemporaryDirectory() as folder,
        demo.serving(Path(folder) / "server.log", console) as address,
        camserve.Client(address, timeout=None) as client,
    ):
        methods = chosen(client, names)
        pictures = [PHOTOGRAPHS[name].open() for name in (photographs[:1] if single else photographs)]
        rows = [*explained(client, pictures, methods, console)]
    if single:
        picture, maps = rows[0]
        for name, explanation in maps.items():
            tile(over(picture, explanation), 300).save(out / f"{name}.jpg", quality=85)
    else:
        drawn(methods, rows).save(out / "figure.jpg", quality=85, optimize=True)
    console.print(f"Pictures: {out}", soft_wrap=True, highlight=False)


def chosen(client: camserve.Client, names: Sequence[str] | None) -> list[camserve.Method]:
    """The methods to be drawn, in their groups' order: those named, or all that the first model serves."""
    model = client.models()[0]
    methods = {method.name: method for method in client.methods(model.name)}
    wanted = names or model.methods
    for name in wanted:
        if name not in methods:
            raise camserve.NotFound(f"there is no method {name!r}; there are: {', '.join(sorted(methods))}")
    ordered = [method for _, group in grouped(methods) for method in group]
    return [method for method in ordered if method.name in wanted]


def explained(
    client: camserve.Client, pictures: Sequence[PIL.Image.Image], methods: Sequence[camserve.Method], console: Console
) -> Iterator[Row]:
    """Every photograph with its maps by method, one after the other: each fills the server's batches alone."""
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}"),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        whole = bars.add_task("maps", total=len(pictures) * len(methods), unit="maps")
        one = bars.add_task("", total=0, unit="rows")
        for picture in pictures:
            maps = {}
            for method in methods:
                bars.reset(one, description=method.title, total=method.rows)
                for event in client.explain_stream(picture, method=method.name):
                    match event:
                        case camserve.Progress():
                            bars.update(one, completed=event.rows_done, total=event.rows_total)
                        case camserve.Explanation():
                            maps[method.name] = event
                bars.advance(whole)
            yield picture, maps


# ---- the figure ------------------------------------------------------------------------------------------------------

TILE_PX, GAP_PX, HEAD_PX, LABEL_PX = 160, 4, 30, 112
COLUMNS = 8  # methods in a block: it is then half as wide again as a page in a browser, where it can still be read

IN_FONT = str.maketrans("−×", "-x")  # what Pillow's own font lacks


def drawn(methods: Sequence[camserve.Method], rows: Sequence[Row]) -> PIL.Image.Image:
    """Blocks below each other; each has the photographs at its left and some of the methods beside them."""
    blocks = [drawn_block(methods[i : i + COLUMNS], rows) for i in range(0, len(methods), COLUMNS)]
    height = blocks[0].height
    whole = PIL.Image.new("RGB", (blocks[0].width, len(blocks) * height), "white")
    for i, block in enumerate(blocks):
        whole.paste(block, (0, i * height))
    return whole


def drawn_block(methods: Sequence[camserve.Method], rows: Sequence[Row]) -> PIL.Image.Image:
    """Titles above, classes at the left."""
    columns = [LABEL_PX + i * (TILE_PX + GAP_PX) for i in range(2 + len(methods))]
    tops = [*accumulate((tile(picture).height + GAP_PX for picture, _ in rows), initial=HEAD_PX)]
    block = PIL.Image.new("RGB", (columns[-1], tops[-1]), "white")
    draw, font = PIL.ImageDraw.Draw(block), PIL.ImageFont.load_default(size=16)
    for left, method in zip(columns[1:], methods, strict=False):
        title = method.title.translate(IN_FONT)
        draw.text((left + TILE_PX / 2, HEAD_PX / 2), title, fill="black", font=font, anchor="mm")
    for top, (picture, maps) in zip(tops, rows, strict=False):
        predicted = next(iter(maps.values())).target
        label = "\n".join([*predicted.label.split(), f"{predicted.probability:.2f}"])
        middle = (LABEL_PX - 10, top + tile(picture).height / 2)
        draw.multiline_text(middle, label, fill="black", font=font, anchor="rm", align="right")
        overlays = [over(picture, maps[method.name]) for method in methods]
        for left, shown in zip(columns, [picture, *overlays], strict=False):
            block.paste(tile(shown), (left, top))
    return block


def over(picture: PIL.Image.Image, explanation: camserve.Explanation) -> PIL.Image.Image:
    """The map over the photograph, up to its 99th percentile: gradients have a few pixels that outshine all others."""
    top = float(np.quantile(explanation.saliency, 0.99)) or 1.0
    return overlay(picture, (explanation.saliency / top).clip(0, 1), ALPHA)


def tile(picture: PIL.Image.Image, width_px: int = TILE_PX) -> PIL.Image.Image:
    """The picture, as wide as that."""
    size = (width_px, round(width_px * picture.height / picture.width))
    return picture.resize(size, PIL.Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
