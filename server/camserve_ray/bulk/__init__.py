"""Bulk evaluation: what `camserve evaluate` computes, on the devices of a Ray cluster and without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from camserve.batches import Variant, to_variants
from camserve.errors import InvalidArgument
from camserve.request_messages import DEFAULT_METRICS, Parameters
from camserve_ray.bulk.engine import BulkSpec
from camserve_ray.bulk.inputs import BulkImage, find_images
from camserve_ray.bulk.rows import Row
from camserve_ray.bulk.run import DEFAULT_IN_FLIGHT, BulkRun
from camserve_server.config import Config, read_config
from camserve_server.errors import ConfigError

__all__ = ["DEFAULT_IN_FLIGHT", "BulkImage", "BulkRun", "BulkSummary", "Row", "evaluate", "find_images", "start"]


@dataclass(frozen=True)
class BulkSummary:
    """Result of a bulk run.

    Attributes:
        maps: Number of rows of the output: one for each image, model and method.
        failed: Number of them with an error.
    """

    maps: int
    failed: int


def evaluate(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    methods: str | Sequence[str | Variant] | Mapping[str, Parameters],
    metrics: str | Sequence[str] = DEFAULT_METRICS,
    models: str | Sequence[str] = (),
    config: str | PathLike[str] | Config | None = None,
    target: int | str | None = None,
    budget: int | None = None,
    maps: bool = True,
    image_column: str = "image",
    name_column: str | None = None,
    target_column: str | None = None,
    address: str = "auto",
    in_flight: int = DEFAULT_IN_FLIGHT,
    cpus_per_engine: int | None = None,
) -> BulkSummary:
    """Evaluate images on the devices of a Ray cluster, and write the scores and maps to a folder.

    Each device has an engine, which reads the images itself. The scores and maps are those of a server with the same
    configuration. If the folder has results of an earlier run, only missing and failed images are evaluated.

    Args:
        paths: Image files, DICOM files, Parquet files, uncompressed WebDataset archives (.tar), and folders of them.
            The paths must be valid on all nodes.
        out: Folder for the output. Only this process writes to it.
        methods: Method names, `Variant`s, or a mapping from method names to parameters.
        metrics: Names of metrics that score each map.
        models: Names of models of the configuration. Empty selects the first one.
        config: Configuration of a server, or its TOML file. None selects the embedded model.
        target: Class index or label that is explained in all images. None selects the predicted class.
        budget: Maximum number of rows (inputs of the model) for each map, metrics included. None means no limit.
        maps: True to save the maps.
        image_column: Column of Parquet files with the encoded images: bytes, or a struct with the field "bytes".
        name_column: Column of Parquet files with the names of the images. None names an image FILE.parquet/ROW.
        target_column: Column of Parquet files, or extension of files in archives, with the class index or label of each
            image. Excludes `target`.
        address: HOST:PORT of the cluster, "auto" for the cluster of this machine, or "local" to start one. It has no
            effect if this process is connected to a cluster.
        in_flight: Number of images that an engine evaluates at the same time, at least 1.
        cpus_per_engine: CPUs of each engine, if the cluster has no GPUs. None selects `threads` of the configuration
            or, without it, four, but at most those of the smallest node.

    Returns:
        The number of rows in the output, and the number of failed ones.

    Raises:
        OSError: A file cannot be read or written.
        CamserveError: A name is unknown, an argument is invalid, the output has other settings, or there is no cluster.
    """
    if target is not None and target_column is not None:
        raise InvalidArgument("both target and target_column are set; expected at most one of them", field="target")
    several = [paths] if isinstance(paths, str | PathLike) else paths
    images = find_images(
        map(Path, several),
        target=target,
        image_column=image_column,
        name_column=name_column,
        target_column=target_column,
        out=Path(out),
    )
    run = start(
        images,
        Path(out),
        methods=to_variants(methods),
        metrics=[metrics] if isinstance(metrics, str) else metrics,
        models=[models] if isinstance(models, str) else models,
        config=config if isinstance(config, Config) or config is None else Path(config),
        budget=budget,
        maps=maps,
        image_column=image_column,
        address=address,
        in_flight=in_flight,
        cpus_per_engine=cpus_per_engine,
    )
    try:
        for _ in run.results():
            pass
        rows = run.rows(["error"])
    finally:
        run.close()
    return BulkSummary(len(rows), sum(row["error"] != "" for row in rows))


def start(
    images: Sequence[BulkImage],
    out: Path,
    *,
    methods: Sequence[Variant],
    metrics: Sequence[str],
    models: Sequence[str],
    config: Path | Config | None,
    budget: int | None,
    maps: bool,
    image_column: str,
    address: str,
    in_flight: int,
    cpus_per_engine: int | None,
) -> BulkRun:
    """Prepare a run of images with targets and boxes of their own.

    Args:
        images: The images.
        out: Folder for the output.
        methods: The methods, with distinct labels.
        metrics: Names of metrics that score each map.
        models: Names of models of the configuration. Empty selects the first one.
        config: Configuration of a server, or its TOML file. None selects the embedded model.
        budget: Maximum number of rows for each map, metrics included. None means no limit.
        maps: True to save the maps.
        image_column: Column of Parquet files with the encoded images.
        address: HOST:PORT of the cluster, "auto" or "local".
        in_flight: Number of images that an engine evaluates at the same time, at least 1.
        cpus_per_engine: CPUs of each engine, if the cluster has no GPUs.

    Returns:
        The run. `results` evaluates the images. The caller closes it.

    Raises:
        OSError: A file cannot be read or written.
        CamserveError: A name is unknown, a setting is invalid, or the output has other settings.
    """
    try:
        settings = config if isinstance(config, Config) else read_config(config)
    except ConfigError as error:
        raise InvalidArgument(str(error), field="config") from error
    spec = BulkSpec(
        methods,
        list(dict.fromkeys(metrics)),
        list(dict.fromkeys(models)) or [settings.models[0].name],
        budget=budget,
        maps=maps,
        image_column=image_column,
    )
    return BulkRun(images, spec, settings, out, address=address, in_flight=in_flight, cpus_per_engine=cpus_per_engine)
