"""HTML representation of explanations in notebooks: image, heat map and overlay with a legend."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

import PIL.Image

from camserve import heatmaps

if TYPE_CHECKING:  # at run time camserve.answers imports this module; the cycle exists for the type checker only
    from camserve.answers import SaliencyMap

__all__ = ["html"]

# Three images of this width fit side by side into the output cell of a typical notebook.
_SIDE_PX = 300

_COLOUR_SCALE = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in heatmaps.COLOURS[::15].tolist())


def html(maps: Iterable[SaliencyMap], model: str, method: str) -> str:
    """Return saliency maps as HTML.

    Args:
        maps: The maps.
        model: Name of the model.
        method: Name of the method. Empty if the caller supplied the map.

    Returns:
        One figure for each map. The images are embedded, and the HTML contains no script.
    """
    return "\n".join(_figure(each, model, method or "given map") for each in maps)


def _figure(saliency_map: SaliencyMap, model: str, method: str) -> str:
    image = saliency_map.image()
    image.thumbnail((_SIDE_PX, _SIDE_PX), PIL.Image.Resampling.LANCZOS)
    images = {
        "image": image,
        "saliency": heatmaps.heatmap(saliency_map.saliency, image.size),
        "overlay": heatmaps.overlay(image, saliency_map.saliency, heatmaps.ALPHA),
    }
    cells = "".join(
        f'<div><img alt="{name}" src="{_data_uri(each)}" style="display:block;margin:0"/>{name}</div>'
        for name, each in images.items()
    )
    facts = [
        f"<b>{escape(str(saliency_map.target))}</b> {saliency_map.target.probability:.1%}",
        escape(method),
        escape(model),
        *([f"share {saliency_map.share:.4g}"] if saliency_map.share < 1 else []),
        *(f"{escape(metric)} {_number(score, score.unit)}" for metric, score in saliency_map.scores.items()),
    ]
    scale = (
        f'<span style="background:linear-gradient(to right, {_COLOUR_SCALE});display:inline-block;'
        'width:8em;height:.8em">'
    )
    warnings = "".join(f"<div>⚠ {escape(each)}</div>" for each in saliency_map.warnings)
    return (
        '<figure style="margin:.5em 0;font:13px/1.5 sans-serif">'
        f'<div style="display:flex;flex-wrap:wrap;gap:8px">{cells}</div>'
        f"<figcaption>{' · '.join(facts)} · 0 {scale}</span> 1{warnings}</figcaption></figure>"
    )


def _number(value: float, unit: str) -> str:
    return f"{value:.3g}" + (f" {escape(unit)}" if unit != "1" else "")


def _data_uri(image: PIL.Image.Image) -> str:
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
