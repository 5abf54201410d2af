"""Study of many images: maps by several methods on several models, scored and saved to files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from camserve.batches import Result, Variant
from camserve.catalogue import Method, Model
from camserve.client import Client
from camserve.errors import InvalidArgument
from camserve.request_messages import BoxesLike
from camserve_cli.study import image_files, map_archive, score_csv

__all__ = ["StudyRun", "StudySpec", "by_layer"]


@dataclass(frozen=True)
class StudySpec:
    """Images, methods, models and metrics of a study.

    Attributes:
        images: The images.
        targets: The target of each image. None stands for the predicted class.
        variants: The methods with their parameters, by model.
        metrics: Names of the metrics.
        boxes: The boxes of each image, or None.
        precision: Arithmetic of the models. None stands for the default of each model.
        budget: Maximum number of rows for each map.
        priority: Priority of the requests.
        map_dtype: Type in which the server sends the maps.
        native_maps: Receive the maps at the resolution of the method.
    """

    images: Sequence[Path]
    targets: Sequence[int | str | None]
    variants: Mapping[str, Sequence[Variant]]
    metrics: Sequence[str]
    boxes: Sequence[BoxesLike | None] | None = None
    precision: str | None = None
    budget: int | None = None
    priority: str | None = None
    map_dtype: str | None = None
    native_maps: bool = False

    @property
    def count(self) -> int:
        """Number of maps."""
        return len(self.images) * sum(map(len, self.variants.values()))


def by_layer(variant: Variant, method: Method, model: Model) -> list[Variant]:
    """Return variants of a method that compare layers.

    Args:
        variant: The method and its parameters. Its layers replace the default layers of the model.
        method: The method as the server describes it.
        model: The model as the server describes it.

    Returns:
        For a method of several layers, variants on the coarsest layer, on the two coarsest layers, and so on. For a
        method of one layer, a variant on each layer, the coarsest first. The labels have the form METHOD@LAYER, with
        "+" at the end if the variant also uses coarser layers.

    Raises:
        InvalidArgument: The method uses no layers.
    """
    layers = list(variant.layers) or [layer.name for layer in model.layers]
    if method.layers == "none":
        raise InvalidArgument(
            f"{method.name} uses no layers, so it cannot be studied by layer; choose another method", field="layers"
        )
    if method.layers == "one":
        return [replace(variant, label=f"{variant.label}@{layer}", layers=[layer]) for layer in reversed(layers)]
    return [
        replace(variant, label=f"{variant.label}@{layers[-count]}{'+' * (count > 1)}", layers=layers[-count:])
        for count in range(1, len(layers) + 1)
    ]


@dataclass
class StudyRun:
    """Run of a study that writes a CSV file and, optionally, an npz file.

    Attributes:
        client: Connection to the server.
        spec: Images, methods, models and metrics.
        csv: File of the scores.
        npz: File of the maps, or None.
        resume: Continue with existing files.
        done: Image index, model and method label of each map that an earlier run has finished.

    Raises:
        InvalidArgument: A file exists and `resume` is False, or a file belongs to another study.
    """

    client: Client
    spec: StudySpec
    csv: Path
    npz: Path | None
    resume: bool
    done: set[tuple[int, str, str]] = field(init=False)

    def __post_init__(self) -> None:
        for path in (self.csv, self.npz):
            if path and path.exists() and not self.resume:
                raise InvalidArgument(f"{path} exists; continue it with --resume, or choose another file")
        images = self.spec.images
        self.names = image_files.image_names(images)
        self._names_are_distinct = len({image.name for image in images}) == len(images)
        self._scores = score_csv.ScoreCsv(self.csv, self.spec.metrics)
        rows = self._scores.rows()
        models = {model.name: model for model in self.client.models()} if rows else {}
        self._maps = map_archive.MapWriter(self.npz) if self.npz else None
        self.done = {
            (index, model, variant.label)
            for index, name in enumerate(self.names)
            for model, variants in self.spec.variants.items()
            for variant in variants
            if self._is_done(rows.get((name, model, variant.label)), variant, index, models.get(model))
        }
        self._scores.write(rows.values())

    def _is_done(self, row: score_csv.Row | None, variant: Variant, index: int, model: Model | None) -> bool:
        if row is None or row["error"]:
            return False
        score_csv.check_row_matches(
            row,
            variant,
            self.spec.targets[index],
            self._boxes(index),
            precision=self.spec.precision or (model.precision if model else None),
            digest=model.digest if model else None,  # empty if the model is not loaded
        )
        return self._maps is None or self._maps.has(self._map_name(score_csv.row_key(row)))

    def _boxes(self, index: int) -> BoxesLike | None:
        return self.spec.boxes[index] if self.spec.boxes is not None else None

    def _map_name(self, key: score_csv.Key) -> str:
        """Return the name of a map in the npz file.

        With one model and one method it is the name of the image, else IMAGE/MODEL/METHOD. The image is named by its
        path if two images have the same file name.
        """
        image, model, method = key
        short = Path(image).name if self._names_are_distinct else image
        return short if self.spec.count == len(self.names) else f"{short}/{model}/{method}"

    def results(self, in_flight: int) -> Iterator[Result]:
        """Make and score the maps that are not finished yet.

        Args:
            in_flight: Number of pending requests.

        Yields:
            Each result after it has been written to the files.
        """
        for model, variants in self.spec.variants.items():
            results = self.client.evaluate_many(
                self.spec.images,
                methods=variants,
                metrics=self.spec.metrics,
                models=model,
                labels=self.spec.targets,
                boxes=self.spec.boxes,
                precision=self.spec.precision,
                budget=self.spec.budget,
                priority=self.spec.priority,
                map_dtype=self.spec.map_dtype,
                native_maps=self.spec.native_maps,
                skip=self.done,
                in_flight=in_flight,
            )
            try:
                for result in results:
                    name = self.names[result.index]
                    if result.error is None and self._maps:
                        # The map is written before its row, so that each finished row of the CSV file has a map.
                        self._maps.add(self._map_name((name, result.model, result.method)), result.saliency)
                    self._scores.add(name, result, self._boxes(result.index))
                    yield result
            finally:
                results.close()

    def finish(self) -> list[score_csv.Row]:
        """Sort the CSV file, write the npz file, and return the rows of the CSV file."""
        self._scores.write(self._scores.rows().values())
        rows = self._scores.rows()
        if self._maps:
            names = (self._map_name(key) for key, row in rows.items() if not row["error"])
            self._maps.finish(name for name in names if self._maps.has(name))
        return list(rows.values())
