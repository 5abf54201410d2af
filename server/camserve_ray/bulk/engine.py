"""The engine of a bulk run: a Ray actor that loads the models on its device and evaluates images."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import structlog
from numpy.typing import NDArray
from pyarrow import ArrowException

from camserve import errors, request_messages
from camserve.batches import Variant
from camserve.images import ImageLike
from camserve.v1 import explain_pb2 as pb
from camserve_ray.bulk.inputs import BulkImage
from camserve_ray.bulk.reading import ImageReader
from camserve_ray.bulk.rows import Key, Row, failed_row, row
from camserve_server import registry
from camserve_server.config import Config
from camserve_server.errors import CamserveError, ConfigError, InternalError, InvalidArgument, describe
from camserve_server.service.in_process import InProcessService
from camserve_server.service.logs import log_to_stderr
from camserve_server.torch_setup.allocator import keep_memory

__all__ = ["CHUNK", "RESULT", "BulkEngine", "BulkSpec", "Chunk", "ImageEvaluator", "Refused"]

# Columns of the data sets that Ray passes to the engines and back. Their values are pickled.
CHUNK, RESULT = "chunk", "result"
# Not each result alone, because the driver receives only some tens of batches a second from Ray Data.
RESULTS_EVERY_S = 1.0
ENGINE_FAILURE_S = 1.0

log = structlog.get_logger()


@dataclass(frozen=True)
class BulkSpec:
    """Methods, metrics and models that a bulk run applies to each image.

    Attributes:
        variants: The methods with their parameters.
        metrics: Names of the metrics.
        models: Names of the models.
        budget: Maximum number of rows for each map.
        maps: Save the maps.
        image_column: The column of Parquet files with the encoded images.
        targets: The distinct targets of the images.
    """

    variants: Sequence[Variant]
    metrics: Sequence[str]
    models: Sequence[str]
    budget: int | None = None
    maps: bool = True
    image_column: str = "image"
    targets: Sequence[int | str | None] = (None,)


@dataclass(frozen=True)
class Chunk:
    """Images that an engine evaluates at the same time.

    Attributes:
        images: The images, each with the models and labels of the methods whose maps are missing.
    """

    images: Sequence[tuple[BulkImage, Sequence[tuple[str, str]]]]


@dataclass(frozen=True)
class Refused:
    """Answer of an engine in place of rows if no image can be evaluated.

    Attributes:
        message: The reason, for people.
        field: The wrong field of the requests; empty if the models cannot be loaded.
    """

    message: str
    field: str = ""


class ImageEvaluator:
    """Evaluates images with the models and the engines of this process.

    Args:
        config: The configuration, with the models of the run only.
        spec: What to compute.

    Attributes:
        refused: Why no image can be evaluated. None if images can be evaluated.
        service: Answers the requests.
    """

    def __init__(self, config: Config, spec: BulkSpec) -> None:
        self._spec = spec
        self._variants = {each.label: each for each in spec.variants}
        self._reader = ImageReader(spec.image_column)
        self.refused: Refused | None = None
        self.service: InProcessService
        try:
            self.service = InProcessService(config)
            self.service.start()
            self._check()
        except ConfigError as error:
            self.refused = Refused(str(error))
        except (CamserveError, errors.CamserveError) as error:
            self.refused = Refused(error.message, error.field)
        except Exception as error:  # Ray would start the engine again and again
            log.exception("the engine cannot start")
            self.refused = Refused(f"the engines cannot start: {describe(error)}; correct the cause")

    def results(self, chunk: Chunk) -> Iterator[list[Row]]:
        """Evaluate the images of a chunk at the same time, and yield the finished rows every second."""
        pending = {self.service.submit(self._evaluate(*each)) for each in chunk.images}
        while pending:
            finished, pending = wait(pending, timeout=RESULTS_EVERY_S)
            if finished:
                yield [row for each in finished for row in each.result()]

    def _check(self) -> None:
        """Check what no image changes, so that a mistake does not become an error of every image.

        A target is a mistake of its images only, unless the model has none of the targets.
        """
        for model in self._spec.models:
            for variant in self._spec.variants:
                refused = None
                for target in self._spec.targets:
                    try:
                        self._check_request(model, variant, target)
                        break
                    except (InvalidArgument, errors.InvalidArgument) as error:
                        if not error.field.startswith("target"):
                            raise
                        refused = refused or error
                else:
                    if refused is not None:
                        raise refused

    def _check_request(self, model: str, variant: Variant, target: int | str | None) -> None:
        no_image = b""
        call = request_messages.explain(
            no_image, **self._options(model, variant), metrics=self._spec.metrics, target=target
        )
        request = cast(pb.ExplainRequest, call.request)
        if any(registry.METRICS[each].needs_truth for each in self._spec.metrics):
            request.truth.boxes.add(right=1, bottom=1)  # the driver checks that the images have boxes
        self.service.submit(self.service.check(request)).result()

    async def _evaluate(self, image: BulkImage, wanted: Sequence[tuple[str, str]]) -> list[Row]:
        keys = [(image.name, model, method) for model, method in wanted]
        try:
            pixels = await asyncio.to_thread(self._reader.read, image)
        except Exception as error:
            return [failed_row(each, *_text(error), image) for each in keys]
        return [*await asyncio.gather(*(self._row(image, pixels, each) for each in keys))]

    async def _row(self, image: BulkImage, pixels: ImageLike, key: Key) -> Row:
        _, model, method = key
        try:
            call = request_messages.explain(
                pixels,
                **self._options(model, self._variants[method]),
                metrics=self._spec.metrics,
                target=image.target,
                boxes=image.boxes,
                predictions=1,
            )
            response = await self.service.explain(cast(pb.ExplainRequest, call.request))
            return row(key, call.parse_response(response), image, with_map=self._spec.maps)
        except Exception as error:
            if isinstance(error, InternalError):
                # If the engine's thread fails, the process ends meanwhile, and another engine evaluates the image.
                await asyncio.sleep(ENGINE_FAILURE_S)
            return failed_row(key, *_text(error), image)

    def _options(self, model: str, variant: Variant) -> dict[str, Any]:
        return {
            "model": model,
            "method": variant.method,
            "layers": variant.layers,
            "parameters": variant.parameters,
            "seed": variant.seed,
            "budget": self._spec.budget,
        }


class BulkEngine:
    """The class of the actors. Ray Data creates one object in each actor, and calls it in several threads.

    Args:
        config: The configuration, with the models of the run only.
        spec: What to compute.
    """

    def __init__(self, config: Config, spec: BulkSpec) -> None:
        log_to_stderr(config)
        if config.device == "cpu":
            keep_memory()
        self._evaluator = ImageEvaluator(config, spec)
        # An engine whose thread has failed answers nothing any more. The run continues on other engines.
        if self._evaluator.refused is None:
            self._evaluator.service.failed.add_done_callback(lambda _: os._exit(1))

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        """Evaluate the pickled chunks of a batch, and yield batches of pickled rows."""
        if self._evaluator.refused is not None:
            yield _batch([self._evaluator.refused])
            return
        for chunk in map(pickle.loads, batch[CHUNK]):
            yield from map(_batch, self._evaluator.results(chunk))


def _batch(results: Sequence[Row | Refused]) -> dict[str, NDArray[Any]]:
    """Return a batch of one row, which contains the pickled results.

    Ray Data passes each row to the driver on its own, which takes more time than a small result.
    """
    return {RESULT: np.array([pickle.dumps(results)], dtype=object)}


def _text(error: Exception) -> tuple[str, str]:
    """Return an error in one line, in the words of the client library, and its kind."""
    match error:
        case CamserveError():
            return " ".join(error.message.split()), error.reason
        case errors.CamserveError():
            return " ".join(error.message.split()), error.reason or error.code.name
        case OSError(strerror=str(cause), filename=str(path)):
            return f"{cause}: {path}", type(error).__name__
        case OSError() | ArrowException():  # of Arrow, for damaged Parquet files
            return " ".join(str(error).split()) or type(error).__name__, type(error).__name__
        case _:
            log.exception("unexpected exception")
            return f"an internal error: {describe(error)}", "INTERNAL"
