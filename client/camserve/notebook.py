"""How an explanation shows itself in a notebook: the image, the heat map and the overlay, with a legend."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

import PIL.Image

from camserve import heatmaps

if TYPE_CHECKING:
    from camserve.answers import SaliencyMap

__all__ = ["html"]

# Three side by side fit the output cell of a usual notebook.
_SIDE_PX = 300

_SCALE = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in heatmaps.COLOURS[::15].tolist())


def html(maps: Iterable[SaliencyMap], model: str, method: str) -> str:
    """One figure for each map. Everything is inside: it needs no other file and no script."""
    return "\n".join(_figure(each, model, method or "given map") for each in maps)


def _figure(shown: SaliencyMap, model: str, method: str) -> str:
    image = shown.image()
    image.thumbnail((_SIDE_PX, _SIDE_PX), PIL.Image.Resampling.LANCZOS)
    pictures = {
        "image": image,
        "saliency": heatmaps.heatmap(shown.saliency, image.size),
        "overlay": heatmaps.overlay(image, shown.saliency, heatmaps.ALPHA),
    }
    cells = "".join(
        f'<div><img alt="{name}" src="{_data_uri(each)}" style="display:block;margin:0"/>{name}</div>'
        for name, each in pictures.items()
    )
    facts = [
        f"<b>{escape(str(shown.target))}</b> {shown.target.probability:.1%}",
        escape(method),
        escape(model),
        *([f"share {shown.share:.4g}"] if shown.share < 1 else []),
        *(f"{escape(metric)} {_number(score, score.unit)}" for metric, score in shown.scores.items()),
    ]
    scale = f'<span style="background:linear-gradient(to right, {_SCALE});display:inline-block;width:8em;height:.8em">'
    warnings = "".join(f"<div>⚠ {escape(each)}</div>" for each in shown.warnings)
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
