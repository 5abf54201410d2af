"""The images of a run, each with its maps side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from camserve_cli.report import thumbnails
from camserve_cli.report.records import Record, Study
from camserve_cli.study import map_archive

__all__ = ["GalleryItem", "MapImage", "build_items", "layer_strips"]


@dataclass(frozen=True)
class MapImage:
    """A map as a picture, with what is said of it."""

    record: Record
    source: str


@dataclass(frozen=True)
class GalleryItem:
    """An image with its maps; `scores` is JSON, a list for each method of its scores, None where there are none."""

    image: str
    model: str
    target: str
    probability: float
    source: str
    maps: list[MapImage]
    scores: str


def build_items(study: Study, maps: map_archive.MapReader, most: int) -> Iterator[GalleryItem]:
    """The first images, at most so many, on each model by all methods. What failed is left out."""
    for image in study.images[:most]:
        small = thumbnails.small(Path(image))
        for model in study.models:
            records = [study.of(model, method).get(image) for method in study.methods]
            done = [record for record in records if record]
            if not done:
                continue
            yield GalleryItem(
                image=image,
                model=model,
                target=done[0].target,
                probability=done[0].probability,
                source=thumbnails.data_uri(small) if small else "",
                maps=[shown for record in done if (shown := _map_image(record, small, maps))],
                scores=json.dumps(
                    [record and [record.scores[metric.name] for metric in study.metrics] for record in records]
                ),
            )


def layer_strips(
    study: Study, model: str, labels: list[str], maps: map_archive.MapReader, most: int
) -> list[GalleryItem]:
    """The first images, at most so many, of which there is a map for each of the labels."""
    found = []
    of = [study.of(model, label) for label in labels]
    complete = [image for image in study.images if all(image in records for records in of)]
    for image in complete[:most]:
        small = thumbnails.small(Path(image))
        shown = [each for records in of if (each := _map_image(records[image], small, maps))]
        if shown:
            first = shown[0].record
            source = thumbnails.data_uri(small) if small else ""
            found.append(GalleryItem(image, model, first.target, first.probability, source, shown, "[]"))
    return found


def _map_image(record: Record, small: PIL.Image.Image | None, maps: map_archive.MapReader) -> MapImage | None:
    saliency = maps.get(record.key)
    if saliency is None:
        return None
    return MapImage(record, thumbnails.data_uri(thumbnails.overlay(small, saliency)))
