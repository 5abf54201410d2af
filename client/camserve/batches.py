"""Many images by many methods, pure: what is to be asked, one by one. The clients keep so many requests in the air."""

# No postponed annotations here: the signatures are read at run time, see `calls.described`.
import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from camserve import request_messages
from camserve.answers import Cost, Explanation, Prediction, Score
from camserve.errors import CamserveError, InvalidArgument, ResourceExhausted
from camserve.images import ImageLike
from camserve.receipt import Receipt

__all__ = ["DEFAULT_METRICS", "Ask", "Failure", "Many", "Result", "Variant", "evaluate_many", "explain_many"]

Answer = TypeVar("Answer")
Failure: TypeAlias = CamserveError | OSError

# As `evaluate` has them.
DEFAULT_METRICS = ("insertion", "deletion", "average-gain")

# What a server says that has too much to do is a guess at when there is room for one more; others may be first.
_MOST_TRIES = 20
_LEAST_WAIT_S = 0.1

# Where an image stands among the images, a model, and the label of a method.
Place: TypeAlias = tuple[int, str, str]


@dataclass(frozen=True)
class Variant:
    """A method as it shall be run, under a `label` of your own: so can one method be there with several parameters."""

    label: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Result:
    """One image by one method on one model: its `explanation`, or the `error` that came instead.

    `image` is what was given and `index` its place among the images; `model` is empty only where a request failed that
    asked for none by name; `method` is a name, or the label of a `Variant`. What is read of a result that failed, such
    as its `scores`, raises its error.
    """

    index: int
    image: ImageLike = field(repr=False)
    model: str
    method: str
    outcome: Explanation | Failure

    @property
    def error(self) -> Failure | None:
        """Why there is no explanation; None where there is one."""
        return None if isinstance(self.outcome, Explanation) else self.outcome

    @property
    def explanation(self) -> Explanation:
        """The answer in full."""
        if isinstance(self.outcome, Explanation):
            return self.outcome
        raise self.outcome

    @property
    def target(self) -> Prediction:
        """The class that was explained."""
        return self.explanation.target

    @property
    def saliency(self) -> NDArray[np.float32]:
        """The map, float32 [H, W] in [0, 1]."""
        return self.explanation.saliency

    @property
    def scores(self) -> dict[str, Score]:
        """By metric."""
        return self.explanation.scores

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of this map must know."""
        return self.explanation.warnings

    @property
    def cost(self) -> Cost:
        """What it took, metrics included."""
        return self.explanation.cost

    @property
    def receipt(self) -> Receipt:
        """With which the map can be made again."""
        return self.explanation.receipt


@dataclass(frozen=True, eq=False)
class Ask(Generic[Answer]):
    """A request that is not made yet, for it would hold its image, and what to make of its outcome."""

    make: Callable[[], request_messages.Call[Explanation]]
    answer: Callable[[Explanation | Failure], Answer]
    tries: int = 0

    def again(self, error: Failure) -> tuple[float, "Ask[Answer]"] | None:
        """After how many seconds to make the request once more, and that; None where the error is to stay."""
        wait_s = error.retry_after_s if isinstance(error, ResourceExhausted) else None
        if wait_s is None or self.tries == _MOST_TRIES - 1:
            return None
        return max(wait_s, _LEAST_WAIT_S), replace(self, tries=self.tries + 1)

    def call(self) -> request_messages.Call[Explanation]:
        """Reads the image. Raises OSError or CamserveError."""
        try:
            return self.make()
        except TypeError as error:  # one image of a wrong type shall not stop the others
            raise InvalidArgument(str(error), field="image") from error


@dataclass(frozen=True, eq=False)
class Many(Generic[Answer]):
    """Requests of which `in_flight` are to be kept in the air."""

    asks: Iterator[Ask[Answer]]
    in_flight: int


def evaluate_many(
    images: Iterable[ImageLike],
    *,
    methods: str | Sequence[str | Variant] | Mapping[str, request_messages.Parameters],
    metrics: str | Sequence[str] | Mapping[str, request_messages.Parameters] = DEFAULT_METRICS,
    models: str | Sequence[str] | None = None,
    labels: Iterable[request_messages.TargetLike | None] | None = None,
    boxes: Iterable[request_messages.BoxesLike | None] | None = None,
    masks: Iterable[object] | None = None,
    budget: int | None = None,
    priority: str | None = None,
    skip: Container[Place] = (),
    in_flight: int = 8,
    timeout: float | None = None,
) -> Many[Result]:
    """Explain many images by many methods and score each map; yields a `Result` for each as soon as it is done.

    images: any number, each as for `explain`. An iterator is read as far as requests are in flight, no further.
    methods: names, `Variant`s, or a mapping from names to parameters.
    metrics: names of metrics that score each map, or a mapping from names to their parameters.
    models: names; None is the server's first.
    labels: the target of each image, an index or label, in the order of the images; None is the predicted class.
    boxes, masks: where the target of each image is, in the same order and as for `explain`; None is nowhere.
    budget, priority: of each request, as for `explain`.
    skip: what is not wanted, as (place of the image from 0, model, method or label of the variant).
    in_flight: how many requests are kept in the air.
    timeout: seconds to wait for each answer; None is the client's.

    Results come in the order in which they are done. One that failed carries its `error`, and stops no other. Where the
    server has too much to do, a request waits for as long as it says and is made again, a few times. Closing the
    iterator early cancels what is in flight.

    Raises InvalidArgument where two methods have the same label, and ValueError where there are more or fewer labels,
    boxes or masks than images.
    """
    variants = _variants(methods)
    if len({each.label for each in variants}) < len(variants):
        raise InvalidArgument("two methods have the same label: name them apart by camserve.Variant", field="methods")
    _check(images, in_flight)

    def asks() -> Iterator[Ask[Result]]:
        for index, image, own in _numbered(images, target=labels, boxes=boxes, mask=masks):
            for model in [models] if models is None or isinstance(models, str) else models:
                for variant in variants:
                    if (index, model or "", variant.label) in skip:
                        continue
                    make = functools.partial(
                        request_messages.explain,
                        image,
                        model=model,
                        method=variant.method,
                        **own,
                        layers=variant.layers,
                        parameters=variant.parameters,
                        metrics=metrics,
                        seed=variant.seed,
                        budget=budget,
                        priority=priority,
                        predictions=1,
                        timeout=timeout,
                    )
                    yield Ask(make, functools.partial(_result, index, image, model, variant.label))

    return Many(asks(), in_flight)


def explain_many(
    images: Iterable[ImageLike],
    *,
    model: str | None = None,
    method: str = "poly-cam",
    target: request_messages.TargetLike | Sequence[request_messages.TargetLike] | None = None,
    labels: Iterable[request_messages.TargetLike | None] | None = None,
    top_k: int | None = None,
    layers: str | Sequence[str] | None = None,
    parameters: request_messages.Parameters | None = None,
    metrics: str | Sequence[str] | Mapping[str, request_messages.Parameters] = (),
    seed: int = 0,
    budget: int | None = None,
    precision: str | None = None,
    priority: str | None = None,
    predictions: int = 5,
    raw: bool = False,
    in_flight: int = 8,
    timeout: float | None = None,
) -> Many[Result]:
    """Explain many images; yields a `Result` for each as soon as it is done.

    images: any number, each as for `explain`. An iterator is read as far as requests are in flight, no further.
    target: of all images, as for `explain`.
    labels: or the target of each image, an index or label, in the order of the images; None is the predicted class.
    in_flight: how many requests are kept in the air.
    timeout: seconds to wait for each answer; None is the client's.

    The other options are those of `explain`. A result has the `index` of its image, and an `explanation` or an `error`.
    Results come in the order in which they are done. One that failed stops no other. Where the server has too much to
    do, a request waits for as long as it says and is made again, a few times. Closing the iterator early cancels what
    is in flight.

    Raises InvalidArgument for both target and labels, and ValueError where there are more or fewer labels than images.
    """
    if target is not None and labels is not None:
        raise InvalidArgument("give either a target for all images or labels for each", field="labels")
    _check(images, in_flight)

    def asks() -> Iterator[Ask[Result]]:
        for index, image, own in _numbered(images, target=labels):
            make = functools.partial(
                request_messages.explain,
                image,
                model=model,
                method=method,
                **{"target": target, **own},
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
                timeout=timeout,
            )
            yield Ask(make, functools.partial(_result, index, image, model, method))

    return Many(asks(), in_flight)


def _check(images: object, in_flight: int) -> None:
    if in_flight < 1:
        raise InvalidArgument(f"in_flight must be at least 1, not {in_flight}", field="in_flight")
    if isinstance(images, str | bytes | PathLike):
        raise InvalidArgument("images must be several: put one into a list", field="images")


def _numbered(
    images: Iterable[ImageLike], **each: Iterable[Any] | None
) -> Iterator[tuple[int, ImageLike, dict[str, Any]]]:
    """Each image with its number and, by name, what is given for it."""
    given = {name: values for name, values in each.items() if values is not None}
    for index, (image, *own) in enumerate(zip(images, *given.values(), strict=True)):
        yield index, image, dict(zip(given, own, strict=True))


def _variants(methods: str | Sequence[str | Variant] | Mapping[str, request_messages.Parameters]) -> list[Variant]:
    if isinstance(methods, Mapping):
        return [Variant(name, name, parameters) for name, parameters in methods.items()]
    given = [methods] if isinstance(methods, str) else methods
    return [each if isinstance(each, Variant) else Variant(each, each) for each in given]


def _result(index: int, image: ImageLike, model: str | None, label: str, outcome: Explanation | Failure) -> Result:
    answered = outcome.receipt.model if isinstance(outcome, Explanation) else ""
    return Result(index, image, model or answered, label, outcome)
