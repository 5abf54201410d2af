"""Images of a study with their maps."""

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
    """Map of one method, drawn over the image.

    Attributes:
        record: Scores and settings of the map.
        source: The drawing as a data URI.
    """

    record: Record
    source: str


@dataclass(frozen=True)
class GalleryItem:
    """Image with its maps on one model.

    Attributes:
        image: Name of the image.
        model: Name of the model.
        target: Explained class.
        probability: Probability of this class.
        source: The image as a data URI, or "" if its file cannot be read.
        maps: One map for each method.
        scores: JSON list with the list of scores of each method, or null for a method without scores.
    """

    image: str
    model: str
    target: str
    probability: float
    source: str
    maps: list[MapImage]
    scores: str


def build_items(study: Study, maps: map_archive.MapReader, most: int) -> Iterator[GalleryItem]:
    """Yield the images with the maps of all methods, for each model. Failures are left out.

    Args:
        study: The study.
        maps: The saved maps.
        most: Maximum number of images.
    """
    for image in study.images[:most]:
        small = thumbnails.small(Path(image))
        for model in study.models:
            records = [study.finished(model, method).get(image) for method in study.methods]
            done = [record for record in records if record]
            if not done:
                continue
            yield GalleryItem(
                image=image,
                model=model,
                target=done[0].target,
                probability=done[0].probability,
                source=thumbnails.data_uri(small) if small else "",
                maps=[each for record in done if (each := _map_image(record, small, maps))],
                scores=json.dumps(
                    [record and [record.scores[metric.name] for metric in study.metrics] for record in records]
                ),
            )


def layer_strips(
    study: Study, model: str, labels: list[str], maps: map_archive.MapReader, most: int
) -> list[GalleryItem]:
    """Return images with a map for each label of a study by layer.

    Args:
        study: The study.
        model: Name of the model.
        labels: Labels of the form METHOD@LAYER.
        maps: The saved maps.
        most: Maximum number of images.
    """
    items = []
    by_label = [study.finished(model, label) for label in labels]
    complete = [image for image in study.images if all(image in records for records in by_label)]
    for image in complete[:most]:
        small = thumbnails.small(Path(image))
        images = [each for records in by_label if (each := _map_image(records[image], small, maps))]
        if images:
            first = images[0].record
            source = thumbnails.data_uri(small) if small else ""
            items.append(GalleryItem(image, model, first.target, first.probability, source, images, "[]"))
    return items


def _map_image(record: Record, small: PIL.Image.Image | None, maps: map_archive.MapReader) -> MapImage | None:
    saliency = maps.get(record.key)
    if saliency is None:
        return None
    return MapImage(record, thumbnails.data_uri(thumbnails.overlay(small, saliency)))
