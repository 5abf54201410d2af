"""Picture of a model's layers: the map of each on an example image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps

from camserve import heatmaps
from camserve_cli.sanity_image import GAP, INK, PAPER, SOFT, TEXT, write_text

if TYPE_CHECKING:
    from camserve_server.model_probe import ModelReport

__all__ = ["draw"]

TILE, COLUMNS = 160, 6


def draw(report: ModelReport) -> PIL.Image.Image:
    """Draw the image and the maps of the default layers and of all other cuts, in the order of the forward pass.

    Args:
        report: Report of the model.

    Returns:
        An RGB image. Each map has the name of its layer, its size, its cut value, and "default" if it is one.
    """
    pixels = report.image[..., 0] if report.image.shape[-1] == 1 else report.image
    image = PIL.ImageOps.contain(PIL.Image.fromarray(pixels).convert("RGB"), (TILE, TILE))
    tiles = [(image, "image", "")]
    for each in report.layers:
        if each.map is not None:
            layer = each.layer
            cut = "" if layer.cut is None else f", cut {round(layer.cut, 2):g}"  # short, so that "default" fits
            default = ", default" if each.default_of else ""
            # The font of Pillow has no multiplication sign.
            overlay = heatmaps.overlay(image, each.map, heatmaps.ALPHA)
            tiles.append((overlay, layer.name, f"{layer.height} x {layer.width}{cut}{default}"))
    columns = min(COLUMNS, len(tiles))
    across, down = TILE + GAP, image.height + 2 * (TEXT + 4) + GAP
    page = PIL.Image.new("RGB", (GAP + columns * across, GAP + -(-len(tiles) // columns) * down), PAPER)
    pen = PIL.ImageDraw.Draw(page)
    for i, (tile, name, description) in enumerate(tiles):
        left, top = GAP + i % columns * across, GAP + i // columns * down
        page.paste(tile, (left, top))
        write_text(pen, (left, top + image.height + 2), name, INK, most=TILE)
        write_text(pen, (left, top + image.height + TEXT + 5), description, SOFT, most=TILE)
    return page
