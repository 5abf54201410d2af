"""A run over many images: what is wanted of it, what is done of that by now, and its files on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from camserve.batches import Result, Variant
from camserve.catalogue import Method, Model
from camserve.client import Client
from camserve.errors import InvalidArgument
from camserve.request_messages import BoxesLike
from camserve_cli.study import score_csv

__all__ = ["Run", "Wanted", "by_layer"]


@dataclass(frozen=True)
class Wanted:
    """What a run is of. For each image a target and boxes, None for the predicted class and no boxes."""

    images: Sequence[Path]
    targets: Sequence[int | str | None]
    variants: Mapping[str, Sequence[Variant]]
    metrics: Sequence[str]
    boxes: Sequence[BoxesLike | None] | None = None
    budget: int | None = None
    priority: str | None = None

    @property
    def count(self) -> int:
        """How many maps."""
        return len(self.images) * sum(map(len, self.variants.values()))


def by_layer(variant: Variant, method: Method, model: Model) -> list[Variant]:
    """The variant on the model's coarsest layer, on the two coarsest, and so on; of methods of one layer, on each.

    Raises InvalidArgument for a method that looks at no layer.
    """
    layers = list(variant.layers) or [layer.name for layer in model.layers]
    if method.layers == "none":
        raise InvalidArgument(f"{method.name} looks at no layers: there is nothing to study by layer", field="layers")
    if method.layers == "one":
        return [replace(variant, label=f"{variant.label}@{layer}", layers=[layer]) for layer in reversed(layers)]
    return [
        replace(variant, label=f"{variant.label}@{layers[-count]}{'+' * (count > 1)}", layers=layers[-count:])
        for count in range(1, len(layers) + 1)
    ]


@dataclass
class Run:
    """What is wanted, into a CSV and maybe an npz. `done` is what was there before.

    Raises InvalidArgument for files that are there where it is not to `resume`, or that are of something else.
    """

    client: Client
    wanted: Wanted
    csv: Path
    npz: Path | None
    resume: bool
    done: set[tuple[int, str, str]] = field(init=False)

    def __post_init__(self) -> None:
        for path in (self.csv, self.npz):
            if path and path.exists() and not self.resume:
                raise InvalidArgument(f"{path} is there: go on with it by --resume, or give another file")
        images = self.wanted.images
        self.names = score_csv.image_names(images)
        self._distinct = len({image.name for image in images}) == len(images)
        self._sheet = score_csv.Sheet(self.csv, self.wanted.metrics)
        rows = self._sheet.rows()
        self._maps = score_csv.Maps(self.npz) if self.npz else None
        self.done = {
            (index, model, variant.label)
            for index, name in enumerate(self.names)
            for model, variants in self.wanted.variants.items()
            for variant in variants
            if self._is_done(rows.get((name, model, variant.label)), variant, index)
        }
        self._sheet.write(rows.values())

    def _is_done(self, row: score_csv.Row | None, variant: Variant, index: int) -> bool:
        if row is None or row["error"]:
            return False
        score_csv.check_same(row, variant, self.wanted.targets[index], self._boxes(index))
        return self._maps is None or self._maps.has(self._name_of(score_csv.key_of(row)))

    def _boxes(self, index: int) -> BoxesLike | None:
        return self.wanted.boxes[index] if self.wanted.boxes is not None else None

    def _name_of(self, key: score_csv.Key) -> str:
        """What a map is called in the npz: as its image, if there is but one model and one method.

        The image by its name alone where no two are alike.
        """
        image, model, method = key
        short = Path(image).name if self._distinct else image
        return short if self.wanted.count == len(self.names) else f"{short}/{model}/{method}"

    def results(self, in_flight: int) -> Iterator[Result]:
        """What is not done yet; each is in the files when it comes."""
        for model, variants in self.wanted.variants.items():
            results = self.client.evaluate_many(
                self.wanted.images,
                methods=variants,
                metrics=self.wanted.metrics,
                models=model,
                labels=self.wanted.targets,
                boxes=self.wanted.boxes,
                budget=self.wanted.budget,
                priority=self.wanted.priority,
                skip=self.done,
                in_flight=in_flight,
            )
            try:
                for result in results:
                    name = self.names[result.index]
                    if result.error is None and self._maps:
                        # Before its row: what the CSV says is done has a map.
                        self._maps.add(self._name_of((name, result.model, result.method)), result.saliency)
                    self._sheet.add(name, result, self._boxes(result.index))
                    yield result
            finally:
                results.close()

    def finish(self) -> list[score_csv.Row]:
        """The finished files; the rows of the CSV, sorted."""
        self._sheet.write(self._sheet.rows().values())
        rows = self._sheet.rows()
        if self._maps:
            names = (self._name_of(key) for key, row in rows.items() if not row["error"])
            self._maps.finish(name for name in names if self._maps.has(name))
        return list(rows.values())
