"""Draw the maps of all methods side by side, as in Figure 5 of the Poly-CAM paper: `make figure`.

The figure has a row for each photograph and a column for each method. A local server with the embedded network makes
the maps. With `--single` (`make pictures`), each map of the first photograph becomes a file of its own for
docs/methods.md.
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
    """Photograph from the scikit-image package.

    Attributes:
        file: Name of the file.
        box: Part of the photograph to use (left, top, right, bottom), or None for the whole photograph.
    """

    file: str
    box: tuple[int, int, int, int] | None = None

    def open(self) -> PIL.Image.Image:
        """Load the photograph as an RGB image."""
        with PIL.Image.open(demo.FOLDER / self.file) as whole:
            return whole.convert("RGB").crop(self.box)


# The licence of the first three is CC0, and the rocket is in the public domain. ImageNet has no class for a rocket. Its
# nearest class is missile.
PHOTOGRAPHS = {
    "chelsea": Photograph("chelsea.png"),
    "coffee": Photograph("coffee.png"),
    "cameraman": Photograph("camera.png"),
    "rocket": Photograph("rocket.jpg", (200, 50, 500, 350)),
}

Row = tuple[PIL.Image.Image, Mapping[str, camserve.Explanation]]


def main() -> int:
    """Draw the figure and return the exit status."""
    parser = argparse.ArgumentParser(description="Draw all methods side by side.")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder for the images")
    parser.add_argument("--photographs", nargs="+", choices=PHOTOGRAPHS, default=[*PHOTOGRAPHS], metavar="NAME")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all methods that the network can serve")
    parser.add_argument("--single", action="store_true", help="write one file for each method, of the first photograph")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # SIGTERM must also run the `finally` blocks, which stop the server.
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
    """Explain the photographs and write the images."""
    # The contexts are left in reverse order: the client first, which cancels pending requests, then the server.
    with (
        tempfile.TemporaryDirectory() as folder,
        demo.serving(Path(folder) / "server.log", console) as address,
        camserve.Client(address, timeout=None) as client,
    ):
        methods = select_methods(client, names)
        images = [PHOTOGRAPHS[name].open() for name in (photographs[:1] if single else photographs)]
        rows = [*explain_all(client, images, methods, console)]
    if single:
        image, maps = rows[0]
        for name, explanation in maps.items():
            tile(draw_map(image, explanation), 300).save(out / f"{name}.jpg", quality=85)
    else:
        draw_figure(methods, rows).save(out / "figure.jpg", quality=85, optimize=True)
    console.print(f"Images: {out}", soft_wrap=True, highlight=False)


def select_methods(client: camserve.Client, names: Sequence[str] | None) -> list[camserve.Method]:
    """Return the methods to draw in the order of their groups.

    Args:
        client: Connection to the server.
        names: Names of the methods. None selects all methods that the first model can serve.

    Raises:
        camserve.NotFound: A name is unknown.
    """
    model = client.models()[0]
    methods = {method.name: method for method in client.methods(model.name)}
    selected = names or model.methods
    for name in selected:
        if name not in methods:
            raise camserve.NotFound(f"there is no method {name!r}; there are: {', '.join(sorted(methods))}")
    ordered = [method for _, group in grouped(methods) for method in group]
    return [method for method in ordered if method.name in selected]


def explain_all(
    client: camserve.Client, images: Sequence[PIL.Image.Image], methods: Sequence[camserve.Method], console: Console
) -> Iterator[Row]:
    """Yield each photograph with its explanations by method. The requests run one after the other."""
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}"),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        whole = bars.add_task("maps", total=len(images) * len(methods), unit="maps")
        one = bars.add_task("", total=0, unit="rows")
        for image in images:
            maps = {}
            for method in methods:
                bars.reset(one, description=method.title, total=method.rows)
                for event in client.explain_stream(image, method=method.name):
                    match event:
                        case camserve.Progress():
                            bars.update(one, completed=event.rows_done, total=event.rows_total)
                        case camserve.Explanation():
                            maps[method.name] = event
                bars.advance(whole)
            yield image, maps


# ---- the figure ------------------------------------------------------------------------------------------------------

TILE_PX, GAP_PX, HEAD_PX, LABEL_PX = 160, 4, 30, 112
# Methods in a block. A block is then about 1.5 times as wide as a page in a browser and still readable.
COLUMNS = 8

# The default font of Pillow lacks these characters.
IN_FONT = str.maketrans("−×", "-x")


def draw_figure(methods: Sequence[camserve.Method], rows: Sequence[Row]) -> PIL.Image.Image:
    """Draw the figure: blocks below each other, each with all photographs and some of the methods."""
    blocks = [draw_block(methods[i : i + COLUMNS], rows) for i in range(0, len(methods), COLUMNS)]
    height = blocks[0].height
    whole = PIL.Image.new("RGB", (blocks[0].width, len(blocks) * height), "white")
    for i, block in enumerate(blocks):
        whole.paste(block, (0, i * height))
    return whole


def draw_block(methods: Sequence[camserve.Method], rows: Sequence[Row]) -> PIL.Image.Image:
    """Draw one block, with titles above and classes at the left."""
    columns = [LABEL_PX + i * (TILE_PX + GAP_PX) for i in range(2 + len(methods))]
    tops = [*accumulate((tile(image).height + GAP_PX for image, _ in rows), initial=HEAD_PX)]
    block = PIL.Image.new("RGB", (columns[-1], tops[-1]), "white")
    draw, font = PIL.ImageDraw.Draw(block), PIL.ImageFont.load_default(size=16)
    for left, method in zip(columns[1:], methods, strict=False):
        title = method.title.translate(IN_FONT)
        draw.text((left + TILE_PX / 2, HEAD_PX / 2), title, fill="black", font=font, anchor="mm")
    for top, (image, maps) in zip(tops, rows, strict=False):
        predicted = next(iter(maps.values())).target
        label = "\n".join([*predicted.label.split(), f"{predicted.probability:.2f}"])
        middle = (LABEL_PX - 10, top + tile(image).height / 2)
        draw.multiline_text(middle, label, fill="black", font=font, anchor="rm", align="right")
        overlays = [draw_map(image, maps[method.name]) for method in methods]
        for left, cell in zip(columns, [image, *overlays], strict=False):
            block.paste(tile(cell), (left, top))
    return block


def draw_map(image: PIL.Image.Image, explanation: camserve.Explanation) -> PIL.Image.Image:
    """Draw the map over the photograph.

    The colours end at the 99th percentile, because gradient maps have a few pixels with much higher values.
    """
    top = float(np.quantile(explanation.saliency, 0.99)) or 1.0
    return overlay(image, (explanation.saliency / top).clip(0, 1), ALPHA)


def tile(image: PIL.Image.Image, width_px: int = TILE_PX) -> PIL.Image.Image:
    """Resize an image to a width."""
    size = (width_px, round(width_px * image.height / image.width))
    return image.resize(size, PIL.Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
