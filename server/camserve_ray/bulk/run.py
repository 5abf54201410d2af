"""A bulk run: the driver hands the images to the engines of a Ray cluster and writes their results."""

from __future__ import annotations

import itertools
import logging
import pickle
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from camserve.errors import InvalidArgument, NotFound, Unavailable
from camserve_ray.bulk import rows
from camserve_ray.bulk.cluster import Placement, connected, place, reporting_wait
from camserve_ray.bulk.engine import CHUNK, RESULT, BulkEngine, BulkSpec, Chunk, Refused
from camserve_ray.bulk.inputs import BulkImage
from camserve_ray.bulk.output import Output
from camserve_ray.bulk.rows import Key, Row
from camserve_ray.configuration import plain_config
from camserve_server import registry
from camserve_server.config import Config

__all__ = ["DEFAULT_IN_FLIGHT", "BulkRun"]

DEFAULT_IN_FLIGHT = 32  # images on each engine

# Chunks that an engine evaluates at the same time. While the last images of one are finished, the next one has begun.
CHUNKS_AT_A_TIME = 2
REPORT_S = 60.0
# A run ends when engines are lost this often without any result in between.
MAX_LOSSES = 5
# Tables with secrets, and listeners. The engines need neither, and Ray stores their configuration in the cluster.
_ONLY_FOR_SERVERS: dict[str, Any] = {
    "tokens": [],
    "cache": None,
    "tls": None,
    "health_listen": None,
    "metrics_listen": None,
    "admin_listen": None,
}
# Keys of a model that may change between the runs of a folder. Its weights have a digest.
_NOT_OF_VALUES = {
    "name",
    *("source", "weights", "weights_key", "allow_random_weights", "allow_code", "remote_ca"),
    *("compile", "openvino", "batch_size"),
}

log = logging.getLogger(__name__)


class BulkRun:
    """Evaluates images on a Ray cluster.

    Args:
        images: The images.
        spec: What to compute for each image.
        config: The configuration with the models.
        out: The output folder. A run continues the results that it contains.
        address: HOST:PORT of the cluster, "auto" for the cluster of this machine, or "local" to start one.
        in_flight: Number of images that an engine evaluates at the same time.
        cpus_per_engine: CPUs of each engine on CPUs, see `place`.

    Attributes:
        folder: The output folder.
        count: Number of rows of the complete output.
        done: Number of rows of earlier runs.

    Raises:
        OSError: A file cannot be read or written.
        CamserveError: A name is unknown, a setting is invalid, or the folder has results of other settings.
    """

    def __init__(
        self,
        images: Sequence[BulkImage],
        spec: BulkSpec,
        config: Config,
        out: Path,
        *,
        address: str = "auto",
        in_flight: int = DEFAULT_IN_FLIGHT,
        cpus_per_engine: int | None = None,
    ) -> None:
        _check(images, spec, config)
        for name, number in {"in_flight": in_flight, "cpus_per_engine": cpus_per_engine}.items():
            if number is not None and number < 1:
                raise InvalidArgument(f"{name} is {number}; expected at least 1", field=name)
        wanted = set(spec.models)
        self._config = plain_config(config).model_copy(
            update={**_ONLY_FOR_SERVERS, "models": [each for each in config.models if each.name in wanted]}
        )
        self.folder = out
        self._images = images
        self._spec = replace(spec, targets=tuple(dict.fromkeys(image.target for image in images)))
        self._address = address
        self._in_flight = in_flight
        self._cpus = cpus_per_engine
        self._output = Output(out, spec.metrics, _settings(spec, self._config))
        try:
            self._missing = self._find_missing()
        except BaseException:
            self._output.close()
            raise
        self.count = len(images) * len(spec.models) * len(spec.variants)
        self.done = self.count - len(self._missing)
        self._reported, self._failed = time.monotonic(), 0

    def results(self) -> Iterator[Row]:
        """Evaluate the images that are not finished.

        If a node is lost, the run continues on the remaining ones. Closing the iterator ends the run.

        Yields:
            Each row after it has been added to the output.

        Raises:
            OSError: A file cannot be written.
            CamserveError: No image can be evaluated, or there is no cluster.
        """
        if not self._missing:
            return
        with connected(self._address):
            import ray
            from ray.exceptions import RayError, RayTaskError

            losses = 0
            while self._missing:
                left = len(self._missing)
                placement = place(self._config, self._cpus, ray.nodes())  # type: ignore[no-untyped-call]
                # The other nodes continue on the same kind of device, so that the values do not change.
                self._config = self._config.model_copy(update={"device": "cuda" if placement.gpus else "cpu"})
                try:
                    yield from self._pass(placement)
                except RayError as error:
                    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
                        raise  # a bug
                    losses = 1 if len(self._missing) < left else losses + 1
                    log.warning(
                        "engines were lost with %d maps missing; the run continues on the remaining nodes (%s)",
                        len(self._missing),
                        type(error).__name__,
                    )
                    if losses == MAX_LOSSES:
                        raise Unavailable(
                            f"the engines ended {losses} times without a result, and {len(self._missing)} maps are "
                            f"missing; the logs of Ray contain the cause: {error}"
                        ) from error
                else:
                    assert not self._missing, "a pass without an error returns all rows"

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Write the rows that are not on disk yet, and return columns of all rows.

        Args:
            columns: Names of the columns.

        Returns:
            A mapping from names to values for each row.
        """
        self._output.flush()
        return self._output.rows(columns)

    def close(self) -> None:
        """Write the rows that are not on disk yet, and let other processes use the folder."""
        self._output.close()

    def _find_missing(self) -> dict[Key, BulkImage]:
        missing: dict[Key, BulkImage] = {}
        for image in self._images:
            for model, variant in itertools.product(self._spec.models, self._spec.variants):
                key = (image.name, model, variant.label)
                existing = self._output.finished.get(key)
                if existing is None:
                    missing[key] = image
                    continue
                for name, old, new in zip(("target", "boxes"), existing, rows.requested(image), strict=True):
                    if old != new:
                        default = "none" if name == "boxes" else "the predicted class"
                        raise InvalidArgument(
                            f"{image.name} by {variant.label}: its row has {name} {old or default}; this run uses "
                            f"{new or default}; "
                            "use the same settings, or choose another folder"
                        )
        return missing

    def _chunks(self, engines: int) -> list[Chunk]:
        """Divide the missing work into chunks, of which each engine gets at least two if there are enough images."""
        wanted: dict[str, list[tuple[str, str]]] = defaultdict(list)
        images: dict[str, BulkImage] = {}
        for (name, model, method), image in self._missing.items():
            wanted[name].append((model, method))
            images[name] = image
        even = -(-len(images) // (CHUNKS_AT_A_TIME * engines))
        size = max(1, min(even, self._in_flight // CHUNKS_AT_A_TIME))
        names = [*images]
        return [
            Chunk([(images[name], wanted[name]) for name in names[start : start + size]])
            for start in range(0, len(names), size)
        ]

    def _pass(self, placement: Placement) -> Iterator[Row]:
        """Run the missing work on engines that are started now. Raises RayError if an engine is lost."""
        import ray
        import ray.data
        from ray.data import ActorPoolStrategy, DataContext

        context = DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = 1  # the driver receives each result when it is finished
        with (
            DataContext.current(context),
            warnings.catch_warnings(),
            reporting_wait(placement, ray.available_resources) as first_result,
        ):
            chunks = [{CHUNK: pickle.dumps(each)} for each in self._chunks(placement.engines)]
            dataset: ray.data.Dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks))
            # A lost engine is not started again, because Ray would wait for a place even if no node has one: the next
            # pass uses the nodes that are left. Ray Data has no other argument for this yet.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            no_restart: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0}
            dataset = dataset.map_batches(
                BulkEngine,
                fn_constructor_args=(self._engine_config(placement), self._spec),
                batch_size=1,
                compute=ActorPoolStrategy(
                    min_size=1,
                    max_size=placement.engines,
                    initial_size=placement.engines,
                    max_tasks_in_flight_per_actor=2 * CHUNKS_AT_A_TIME,
                    max_concurrent_calls_per_actor=CHUNKS_AT_A_TIME,
                    enable_true_multi_threading=True,
                ),
                num_cpus=placement.cpus or None,
                num_gpus=placement.gpus or None,
                **no_restart,
            )
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                first_result.set()
                for result in itertools.chain.from_iterable(map(pickle.loads, batch[RESULT])):
                    if isinstance(result, Refused):
                        raise InvalidArgument(result.message, field=result.field)
                    if self._missing.pop(rows.key(result.values), None) is not None:
                        self._output.add(result)
                        self._report(result)
                        yield result

    def _report(self, result: Row) -> None:
        """Log every minute how far the run is."""
        self._failed += result.values["error"] != ""
        if time.monotonic() - self._reported >= REPORT_S:
            self._reported = time.monotonic()
            log.info("%d of %d maps, %d failed", self.count - len(self._missing), self.count, self._failed)

    def _engine_config(self, placement: Placement) -> Config:
        """Return the configuration of an engine, which has as many threads as CPUs unless it uses a GPU."""
        threads = self._config.threads or (placement.cpus or None)
        return self._config.model_copy(update={"threads": threads})


def _settings(spec: BulkSpec, config: Config) -> dict[str, Any]:
    """Return what the rows of an output folder have in common, for `run.json`."""
    return {
        "methods": [asdict(each) for each in spec.variants],
        "metrics": spec.metrics,
        "models": spec.models,
        "model_settings": {
            each.name: each.model_dump(mode="json", exclude=_NOT_OF_VALUES, exclude_defaults=True)
            for each in config.models
        },
        "image_column": spec.image_column,
        "budget": spec.budget,
        "maps": spec.maps,
    }


def _check(images: Sequence[BulkImage], spec: BulkSpec, config: Config) -> None:
    """Find mistakes that would make every image fail. Raises CamserveError."""
    registry.discover()
    if not spec.variants:
        raise InvalidArgument("there are no methods; give at least one", field="methods")
    labels = [variant.label for variant in spec.variants]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise InvalidArgument(
            f"several methods have the label {', '.join(repeated)}; give each a label of its own", field="methods"
        )
    for target in {str(image.target) for image in images}:
        if target.encode(errors="ignore").decode() != target:
            raise InvalidArgument(
                f"the target {target!a} contains bytes that are not UTF-8; expected UTF-8", field="target"
            )
    names = [model.name for model in config.models]
    for model in spec.models:
        _select(names, model, "model")
    for variant in spec.variants:
        _select(sorted(registry.METHODS), variant.method, "method")
    for name in spec.metrics:
        _select(sorted(registry.METRICS), name, "metric")
        if registry.METRICS[name].needs_truth and not all(image.boxes for image in images):
            raise InvalidArgument(f"the metric {name} needs the position of the target; give boxes", field="truth")


def _select(names: Sequence[str], name: str, kind: str) -> None:
    if name not in names:
        raise NotFound(f"there is no {kind} {name!r}; there are: {', '.join(names)}")
