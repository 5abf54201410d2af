"""HTML report of a study: one file that needs no other file and no network.

Its tables and figures follow the Poly-CAM paper (arXiv:2204.13359) and the Opti-CAM paper (arXiv:2301.07002). The same
files give the same bytes.
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
    """Write the report of a study atomically.

    Args:
        path: The file to write.
        csv: CSV file of `camserve evaluate --csv`. The images are read from the paths that it contains.
        npz: Maps of `camserve evaluate --npz`.
        models: Models of the server, from `client.models()`.
        methods: Methods of the server, from `client.methods()`.
        metrics: Metrics of the server, from `client.metrics()`.
        order: Labels of the methods that come first, in this order.
        against: Label of the method with which the others are compared. Default: the first method.
        command: The command line of the study, which the page quotes.
        most_images: Maximum number of images whose maps and receipts are shown, so that browsers can open the page.

    Raises:
        OSError: A file cannot be read or written.
        InvalidArgument: A file has another form, or names an unknown metric or method.
    """
    run = records.read_study(Path(csv), models=models, methods=methods, metrics=metrics, order=order, against=against)
    pages = html.environment()
    pages.filters["number"] = scores.number
    pages.tests["control"] = run.is_control
    with closing(map_archive.MapReader(Path(npz))) as maps:
        # The template reads the maps one after the other.
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
