"""Requests for many images: which requests to send, and how to convert each outcome to a `Result`.

This module does not send anything. `camserve.Client` and `camserve.aio.Client` send the requests, several at a time.
The methods of both clients take their signatures and docstrings from these functions (see `camserve.method_docs`).
"""

# The annotations must not be postponed: `camserve.method_docs` reads them at run time.
import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from camserve import request_messages
from camserve.answers import Cost, Explanation, Prediction, Score
from camserve.errors import CamserveError, DeadlineExceeded, InvalidArgument, ResourceExhausted
from camserve.images import ImageLike
from camserve.receipt import Receipt
from camserve.request_messages import DEFAULT_METRICS, BoxesLike, Parameters, TargetLike

__all__ = [
    "MAX_ATTEMPTS",
    "MIN_RETRY_WAIT_S",
    "ConcurrentRequests",
    "Failure",
    "PendingRequest",
    "Result",
    "ResultKey",
    "Variant",
    "evaluate_many",
    "explain_many",
    "retry_wait_s",
    "to_variants",
]

ResultT = TypeVar("ResultT")

# The errors that a single image can cause without stopping the others.
Failure: TypeAlias = CamserveError | OSError
# Index of the image, name of the model, and name of the method or label of the variant.
ResultKey: TypeAlias = tuple[int, str, str]

# How often a request is sent while the server is busy. The retry delay of the server is only an estimate, and requests
# of other callers may use the free capacity first, so a few attempts are not enough.
MAX_ATTEMPTS = 20
MIN_RETRY_WAIT_S = 0.1


@dataclass(frozen=True)
class Variant:
    """Method with fixed parameters and a label, so that one run can contain the same method several times.

    Attributes:
        label: Unique name of the variant in the results.
        method: Name of the method.
        parameters: Parameters that differ from their defaults, by name.
        layers: Names of layers, from fine to coarse. Empty means the model's default layers.
        seed: Seed of all random numbers, 0 to 2⁶⁴ − 1.
    """

    label: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Result:
    """Outcome for one image, one model and one method: an explanation or an error.

    If the request failed, `explanation` and the properties derived from it raise `error`.

    Attributes:
        index: Position of the image among the images, from 0.
        image: The image as the caller passed it.
        model: Name of the model. Empty if the request failed and named no model.
        method: Name of the method, or label of the `Variant`.
        outcome: The explanation or the error.
    """

    index: int
    image: ImageLike = field(repr=False)
    model: str
    method: str
    outcome: Explanation | Failure

    @property
    def error(self) -> Failure | None:
        """The error of a failed request; None if the request succeeded."""
        return None if isinstance(self.outcome, Explanation) else self.outcome

    @property
    def explanation(self) -> Explanation:
        """The complete explanation. Raises `error` if the request failed."""
        if isinstance(self.outcome, Explanation):
            return self.outcome
        raise self.outcome

    @property
    def target(self) -> Prediction:
        """The explained class."""
        return self.explanation.target

    @property
    def saliency(self) -> NDArray[np.float32]:
        """The map, float32 [H, W] in [0, 1]."""
        return self.explanation.saliency

    @property
    def scores(self) -> dict[str, Score]:
        """The scores by name of the metric."""
        return self.explanation.scores

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the map."""
        return self.explanation.warnings

    @property
    def cost(self) -> Cost:
        """Rows, batches and times of the request, metrics included."""
        return self.explanation.cost

    @property
    def receipt(self) -> Receipt:
        """The receipt that reproduces the map."""
        return self.explanation.receipt


def retry_wait_s(error: Failure) -> float | None:
    """Return the seconds after which a busy server may accept the request that it refused with this error.

    Returns:
        The delay that the server names, or None if the error has another cause.
    """
    if isinstance(error, ResourceExhausted) or (
        isinstance(error, DeadlineExceeded) and error.reason == "DEADLINE_UNREACHABLE"
    ):
        return None if error.retry_after_s is None else max(error.retry_after_s, MIN_RETRY_WAIT_S)
    return None


@dataclass(frozen=True, eq=False)
class PendingRequest(Generic[ResultT]):
    """Request that is built shortly before it is sent, so that waiting requests do not hold their images in memory.

    Attributes:
        build_call: Function that reads the image and builds the request.
        to_result: Function that converts the explanation or the error to the result.
        failed_attempts: Number of times that a busy server has refused the request.
    """

    build_call: Callable[[], request_messages.PreparedCall[Explanation]]
    to_result: Callable[[Explanation | Failure], ResultT]
    failed_attempts: int = 0

    def retry(self, error: Failure) -> tuple[float, "PendingRequest[ResultT]"] | None:
        """Return the seconds to wait and the request to send then, or None if the error is final."""
        wait_s = retry_wait_s(error)
        if wait_s is None or self.failed_attempts == MAX_ATTEMPTS - 1:
            return None
        return wait_s, replace(self, failed_attempts=self.failed_attempts + 1)

    def prepare(self) -> request_messages.PreparedCall[Explanation]:
        """Read the image and build the request.

        Returns:
            The prepared call.

        Raises:
            OSError: The image file cannot be read.
            CamserveError: An argument is invalid.
        """
        try:
            return self.build_call()
        except TypeError as error:  # An image of a wrong type must not stop the other images.
            raise InvalidArgument(str(error), field="image") from error


@dataclass(frozen=True, eq=False)
class ConcurrentRequests(Generic[ResultT]):
    """Sequence of requests and the maximum number of requests that run at the same time.

    Attributes:
        requests: The requests, created one by one when there is room for them.
        in_flight: Maximum number of requests that run at the same time, at least 1.
    """

    requests: Iterator[PendingRequest[ResultT]]
    in_flight: int


def evaluate_many(
    images: Iterable[ImageLike],
    *,
    methods: str | Sequence[str | Variant] | Mapping[str, Parameters],
    metrics: str | Sequence[str] | Mapping[str, Parameters] = DEFAULT_METRICS,
    models: str | Sequence[str] | None = None,
    labels: Iterable[TargetLike | None] | None = None,
    boxes: Iterable[BoxesLike | None] | None = None,
    masks: Iterable[object] | None = None,
    budget: int | None = None,
    precision: str | None = None,
    priority: str | None = None,
    map_dtype: str | None = None,
    native_maps: bool = False,
    skip: Container[ResultKey] = (),
    in_flight: int = 8,
    timeout: float | None = None,
) -> ConcurrentRequests[Result]:
    """Explain many images by many methods and score each map.

    The results come in the order in which the requests finish. A failed request does not stop the others. If the server
    is busy, a request waits for the time that the server names and is sent again, up to 20 times in total. Closing the
    iterator cancels the requests in flight.

    Args:
        images: Images in any form that `explain` accepts. An iterator is read only as far as requests are in flight.
        methods: Method names, `Variant`s, or a mapping from method names to parameters.
        metrics: Names of metrics that score each map, or a mapping from names to parameters.
        models: Names of models. None selects the server's first model.
        labels: Target of each image, a class index or label, in the order of the images. None selects the predicted
            class.
        boxes: Boxes of each image for localisation metrics, as for `explain`, in the order of the images.
        masks: Mask of each image for localisation metrics, as for `explain`, in the order of the images.
        budget: Maximum number of rows of each request, at least 1, as for `explain`. None means no limit.
        precision: Arithmetic of the models, one of their `precisions`. None selects the default of each model.
        priority: Priority of each request: "low", "normal" or "high".
        map_dtype: Type in which the server sends the maps, as for `explain`.
        native_maps: True to receive the maps at the resolution of the method, as for `explain`.
        skip: Results to leave out, each as (index of the image, name of the model, method name or label of a
            `Variant`). The name of the model is empty if `models` is None.
        in_flight: Maximum number of requests that run at the same time, at least 1.
        timeout: Timeout of each attempt in seconds. None means that of the client, or no timeout if it has none.

    Yields:
        One `Result` for each image, model and method, as soon as it is available.

    Raises:
        InvalidArgument: Two methods have the same label, `in_flight` is less than 1, or `images` is a single image.
        ValueError: The number of labels, boxes or masks differs from the number of images.
    """
    variants = to_variants(methods)
    labels_seen = [variant.label for variant in variants]
    if repeated := sorted({label for label in labels_seen if labels_seen.count(label) > 1}):
        raise InvalidArgument(
            f"several methods have the label {', '.join(repeated)}; give each a label of its own with camserve.Variant",
            field="methods",
        )
    _check(images, in_flight)

    def requests() -> Iterator[PendingRequest[Result]]:
        for index, image, image_options in _with_options(images, target=labels, boxes=boxes, mask=masks):
            for model in [models] if models is None or isinstance(models, str) else models:
                for variant in variants:
                    if (index, model or "", variant.label) in skip:
                        continue
                    build_call = functools.partial(
                        request_messages.explain,
                        image,
                        model=model,
                        method=variant.method,
                        **image_options,
                        layers=variant.layers,
                        parameters=variant.parameters,
                        metrics=metrics,
                        seed=variant.seed,
                        budget=budget,
                        precision=precision,
                        priority=priority,
                        predictions=1,
                        map_dtype=map_dtype,
                        native_maps=native_maps,
                        timeout=timeout,
                    )
                    yield PendingRequest(build_call, functools.partial(_result, index, image, model, variant.label))

    return ConcurrentRequests(requests(), in_flight)


def explain_many(
    images: Iterable[ImageLike],
    *,
    model: str | None = None,
    method: str = "poly-cam",
    target: TargetLike | Sequence[TargetLike] | None = None,
    labels: Iterable[TargetLike | None] | None = None,
    top_k: int | None = None,
    layers: str | Sequence[str] | None = None,
    parameters: Parameters | None = None,
    metrics: str | Sequence[str] | Mapping[str, Parameters] = (),
    seed: int = 0,
    budget: int | None = None,
    precision: str | None = None,
    priority: str | None = None,
    predictions: int = 5,
    raw: bool = False,
    map_dtype: str | None = None,
    native_maps: bool = False,
    in_flight: int = 8,
    timeout: float | None = None,
) -> ConcurrentRequests[Result]:
    """Explain many images by one method.

    The results come in the order in which the requests finish. A failed request does not stop the others. If the server
    is busy, a request waits for the time that the server names and is sent again, up to 20 times in total. Closing the
    iterator cancels the requests in flight.

    Args:
        images: Images in any form that `explain` accepts. An iterator is read only as far as requests are in flight.
        model: Name of the model. None selects the server's first model.
        method: Name of the method.
        target: Target of all images, as for `explain`. Excludes `labels`.
        labels: Target of each image, a class index or label, in the order of the images. None selects the predicted
            class.
        top_k: Number of most probable classes to explain in each image, 1 to 64. Excludes `target` and `labels`.
        layers: Names of layers, from fine to coarse. None selects the model's default layers.
        parameters: Parameters of the method that differ from their defaults, by name.
        metrics: Names of metrics that score each map, or a mapping from names to parameters.
        seed: Seed of all random numbers of each request, 0 to 2⁶⁴ − 1.
        budget: Maximum number of rows of each request, at least 1, as for `explain`. None means no limit.
        precision: Arithmetic of the model, one of its `precisions`. None selects the model's default.
        priority: Priority of each request: "low", "normal" or "high".
        predictions: Number of most probable classes to return for each image, 1 to 1000.
        raw: True to also return each map at its original resolution.
        map_dtype: Type in which the server sends the maps, as for `explain`.
        native_maps: True to receive the maps at the resolution of the method, as for `explain`.
        in_flight: Maximum number of requests that run at the same time, at least 1.
        timeout: Timeout of each attempt in seconds. None means the timeout that was passed to the client, or no timeout
            if none was passed.

    Yields:
        One `Result` for each image, as soon as it is available. Its `index` names the image.

    Raises:
        InvalidArgument: Both `target` and `labels` are set, `in_flight` is less than 1, or `images` is a single image.
        ValueError: The number of labels differs from the number of images.
    """
    if target is not None and labels is not None:
        raise InvalidArgument("both target and labels are set; expected at most one of them", field="labels")
    _check(images, in_flight)

    def requests() -> Iterator[PendingRequest[Result]]:
        for index, image, image_options in _with_options(images, target=labels):
            build_call = functools.partial(
                request_messages.explain,
                image,
                model=model,
                method=method,
                **{"target": target, **image_options},
                top_k=top_k,
                layers=layers,
                parameters=parameters,
                metrics=metrics,
                seed=seed,
                budget=budget,
                precision=precision,
                priority=priority,
                predictions=predictions,
                raw=raw,
                map_dtype=map_dtype,
                native_maps=native_maps,
                timeout=timeout,
            )
            yield PendingRequest(build_call, functools.partial(_result, index, image, model, method))

    return ConcurrentRequests(requests(), in_flight)


def _check(images: object, in_flight: int) -> None:
    if in_flight < 1:
        raise InvalidArgument(f"in_flight is {in_flight}; expected at least 1", field="in_flight")
    if isinstance(images, str | bytes | PathLike):
        raise InvalidArgument("images is a single image; pass a list of images", field="images")


def _with_options(
    images: Iterable[ImageLike], **values_by_option: Iterable[Any] | None
) -> Iterator[tuple[int, ImageLike, dict[str, Any]]]:
    """Yield each image with its index and its own value of each option that is not None."""
    options = {name: values for name, values in values_by_option.items() if values is not None}
    for index, (image, *image_values) in enumerate(zip(images, *options.values(), strict=True)):
        yield index, image, dict(zip(options, image_values, strict=True))


def to_variants(methods: str | Sequence[str | Variant] | Mapping[str, Parameters]) -> list[Variant]:
    """Convert method names, variants, or a mapping from method names to parameters to variants."""
    if isinstance(methods, Mapping):
        return [Variant(name, name, parameters) for name, parameters in methods.items()]
    names_or_variants = [methods] if isinstance(methods, str) else methods
    return [each if isinstance(each, Variant) else Variant(each, each) for each in names_or_variants]


def _result(index: int, image: ImageLike, model: str | None, label: str, outcome: Explanation | Failure) -> Result:
    default_model = outcome.receipt.model if isinstance(outcome, Explanation) else ""
    return Result(index, image, model or default_model, label, outcome)
