"""A report of a run over many images: one HTML file that needs no other and no network.

It looks like the tables and figures of the Poly-CAM paper (arXiv:2204.13359) and the Opti-CAM paper (arXiv:2301.07002).
The same files give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from camserve import heatmaps
from camserve.catalogue import Method, Metric, Model
from camserve_cli.report import gallery, html, provenance, records, score_tables, scores, statistics
from camserve_cli.study import map_archive

__all__ = ["write"]


def write(
    path: str | os.PathLike[str],
    *,
    csv: str | os.PathLike[str],
    npz: str | os.PathLike[str],
    models: Iterable[Model],
    methods: Iterable[Method],
    metrics: Iterable[Metric],
    order: Sequence[str] = (),
    against: str | None = None,
    command: str = "",
    most_images: int = 200,
) -> None:
    """Write the report of a run into `path`, in one step.

    csv, npz: the files that `camserve evaluate --csv --npz` wrote. The images are read from where the CSV says.
    models, methods, metrics: what the server says of them: `client.models()` and so on.
    order: labels of methods that come first, in this order.
    against: the label of the method that the others are compared with; the first if left out.
    command: what the run was started with, to be shown.
    most_images: of how many images maps and receipts are shown at most, so that the page can still be opened.

    Raises OSError, and InvalidArgument for files of another kind.
    """
    run = records.read_study(Path(csv), models=models, methods=methods, metrics=metrics, order=order, against=against)
    pages = html.environment()
    pages.filters["number"] = scores.number
    pages.tests["control"] = run.is_control
    with closing(map_archive.MapReader(Path(npz))) as maps:
        # Maps are read as the page comes to them.
        content = _content(run, maps, command, most_images)
        html.write_page(path, pages, "page.html.j2", content, script="page.js")


def _content(run: records.Study, maps: map_archive.MapReader, command: str, most_images: int) -> dict[str, Any]:
    per_model = [score_tables.model_part(run, model) for model in run.models]
    return {
        "run": run,
        "blocks": score_tables.blocks(run, per_model),
        "parts": per_model,
        "layered": score_tables.layer_parts(run, maps),
        "gallery": gallery.build_items(run, maps, most_images),
        "most_images": most_images,
        "provenance": provenance.collect(run, most_images),
        "command": command,
        "colours": [f"rgb({r} {g} {b})" for r, g, b in heatmaps.COLOURS[::15].tolist()],
        "resamples": statistics.RESAMPLES,
        "alpha": scores.ALPHA,
    }
