"""The images of a run, each with its maps side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from camserve_cli.report import pictures
from camserve_cli.report.records import Record, Study
from camserve_cli.study import score_csv

__all__ = ["Item", "Shown", "items", "strip"]


@dataclass(frozen=True)
class Shown:
    """A map as a picture, with what is said of it."""

    record: Record
    source: str


@dataclass(frozen=True)
class Item:
    """An image with its maps; `scores` is JSON, a list for each method of its scores, None where there are none."""

    image: str
    model: str
    target: str
    probability: float
    source: str
    maps: list[Shown]
    scores: str


def items(study: Study, maps: score_csv.SavedMaps, most: int) -> Iterator[Item]:
    """The first images, at most so many, on each model by all methods. What failed is left out."""
    for image in study.images[:most]:
        small = pictures.small(Path(image))
        for model in study.models:
            records = [study.of(model, method).get(image) for method in study.methods]
            done = [record for record in records if record]
            if not done:
                continue
            yield Item(
                image=image,
                model=model,
                target=done[0].target,
                probability=done[0].probability,
                source=pictures.data_uri(small) if small else "",
                maps=[shown for record in done if (shown := _shown(record, small, maps))],
                scores=json.dumps(
                    [record and [record.scores[metric.name] for metric in study.metrics] for record in records]
                ),
            )


def strip(study: Study, model: str, labels: list[str], maps: score_csv.SavedMaps, most: int) -> list[Item]:
    """The first images, at most so many, of which there is a map for each of the labels."""
    found = []
    of = [study.of(model, label) for label in labels]
    complete = [image for image in study.images if all(image in records for records in of)]
    for image in complete[:most]:
        small = pictures.small(Path(image))
        shown = [each for records in of if (each := _shown(records[image], small, maps))]
        if shown:
            first = shown[0].record
            source = pictures.data_uri(small) if small else ""
            found.append(Item(image, model, first.target, first.probability, source, shown, "[]"))
    return found


def _shown(record: Record, small: PIL.Image.Image | None, maps: score_csv.SavedMaps) -> Shown | None:
    saliency = maps.get(record.key)
    if saliency is None:
        return None
    return Shown(record, pictures.data_uri(pictures.overlay(small, saliency)))
