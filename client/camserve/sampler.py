"""Background explanations of a sample of the images that an inference service processes."""

from __future__ import annotations

import inspect
import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from camserve import request_messages
from camserve.batches import Failure, Result
from camserve.client import Client
from camserve.errors import CamserveError, InvalidArgument
from camserve.images import ImageLike

__all__ = ["Counts", "Sampler"]

log = logging.getLogger("camserve")


@dataclass(frozen=True)
class Counts:
    """Counts of the images that a sampler has received and processed.

    Attributes:
        offered: Images passed to `offer`.
        explained: Images that were explained.
        failed: Images whose request or callback failed.
        dropped: Selected images that were not explained because the queue was full, or because `close(wait=False)`
            removed them from the queue.
    """

    offered: int = 0
    explained: int = 0
    failed: int = 0
    dropped: int = 0


class Sampler:
    """Background thread pool that explains a random share of images, and all images with low confidence.

    `offer` never blocks and never fails because of the server: images that do not fit into the queue are dropped.
    Threads may share a sampler. Close it before its client, preferably with a `with` statement.

    Args:
        client: The client that sends the requests.
        on_result: Callback that receives the `Result` of each image, explanation or error. It runs on a thread of the
            sampler. If it raises an exception, the sampler logs the exception and counts the image as failed.
        share: Fraction of the images to select at random, in [0, 1].
        below: Confidence in [0, 1] below which every image is selected. None disables this rule.
        waiting: Maximum number of images that wait for a thread, at least 0.
        in_flight: Number of threads, and of requests at the same time, at least 1.
        sampling_seed: Seed of the random selection.
        **options: Options of `Client.explain` for all images. The default priority is "low".

    Raises:
        InvalidArgument: A number is out of range.
        TypeError: `explain` has no such option.
    """

    def __init__(
        self,
        client: Client,
        on_result: Callable[[Result], object],
        *,
        share: float = 0.01,
        below: float | None = None,
        waiting: int = 16,
        in_flight: int = 1,
        sampling_seed: int = 0,
        **options: Any,
    ) -> None:
        if not 0 <= share <= 1:
            raise InvalidArgument(f"share is {share}; expected 0 to 1", field="share")
        for name, value, least in (("waiting", waiting, 0), ("in_flight", in_flight, 1)):
            if value < least:
                raise InvalidArgument(f"{name} is {value}; expected at least {least}", field=name)
        # Raise the TypeError for an unknown option here instead of once for each image.
        inspect.signature(request_messages.explain).bind(b"", **options)
        self._client, self._on_result = client, on_result
        self._share, self._below, self._capacity = share, below, waiting + in_flight
        self._options = {"method": "poly-cam", "priority": "low", **options}
        self._random = random.Random(sampling_seed)
        self._threads = ThreadPoolExecutor(in_flight, "camserve-sampler")
        self._lock = threading.Lock()
        self._counts = Counts()
        self._unfinished = 0  # images that wait or are being explained
        self._closed = False

    def offer(
        self,
        image: ImageLike,
        *,
        confidence: float | None = None,
        target: request_messages.TargetLike | None = None,
        request_id: str | None = None,
    ) -> bool:
        """Offer an image for explanation. The sampler reads it later, so do not modify an array afterwards.

        Args:
            image: The image, in any form that `Client.explain` accepts.
            confidence: Probability of the class that the service predicted, in [0, 1], compared with `below`.
            target: Index or label of the predicted class. None selects the class that the server's model predicts.
            request_id: Name of the request. The explanation or the error in the result contains it.

        Returns:
            True if the image will be explained.
        """
        with self._lock:
            index = self._counts.offered
            # Draw a number for every image, so that confidences do not affect the selection of later images.
            in_share = self._random.random() < self._share
            uncertain = self._below is not None and confidence is not None and confidence < self._below
            selected = (in_share or uncertain) and not self._closed
            fits = self._unfinished < self._capacity
            self._counts = replace(
                self._counts, offered=index + 1, dropped=self._counts.dropped + (selected and not fits)
            )
            if not (selected and fits):
                return False
            image_options = {"target": target, "request_id": request_id}
            options = self._options | {name: value for name, value in image_options.items() if value is not None}
            try:
                future = self._threads.submit(self._explain, index, image, options)
            except RuntimeError:  # The interpreter is shutting down.
                return False
            self._unfinished += 1
        future.add_done_callback(self._count)
        return True

    @property
    def counts(self) -> Counts:
        """Current counts of images."""
        with self._lock:
            return self._counts

    def close(self, *, wait: bool = True) -> None:
        """Accept no further images.

        Args:
            wait: True to wait until all accepted images are explained. False to drop the images that wait for a thread.
                Requests in flight then finish in the background, or fail when the client is closed.
        """
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=wait, cancel_futures=not wait)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _explain(self, index: int, image: ImageLike, options: dict[str, Any]) -> bool:
        """Explain an image and pass the result to the callback. Return True if both succeed."""
        result = Result(index, image, options.get("model") or "", options["method"], self._outcome(image, options))
        if result.error is None:
            result = replace(result, model=result.receipt.model)
        try:
            self._on_result(result)
        except Exception:
            log.exception("the on_result callback of a sampler raised an exception")
            return False
        return result.error is None

    def _outcome(self, image: ImageLike, options: dict[str, Any]) -> Any:
        try:
            return self._client.explain(image, **options)
        except (CamserveError, OSError) as error:
            failure: Failure = error
        except Exception as error:  # For instance an image of a wrong type, or a closed client.
            failure = CamserveError(f"{type(error).__name__}: {error}")
        if isinstance(failure, CamserveError):
            failure.request_id = failure.request_id or options.get("request_id") or ""
        return failure

    def _count(self, future: Future[bool]) -> None:
        name = "dropped" if future.cancelled() else "explained" if future.result() else "failed"
        with self._lock:
            self._unfinished -= 1
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + 1})
