"""A sample of what an inference service is asked, explained in the background."""

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
    """What became of the images: of those `offered`, some are drawn, and `dropped` where too many wait already."""

    offered: int = 0
    explained: int = 0
    failed: int = 0
    dropped: int = 0


class Sampler:
    """Explains, in the background, a `share` of the images that it is offered, and all whose confidence is `below`.

    `in_flight` threads of its own do that. At most `waiting` images wait for them, and what is more is dropped:
    whatever the server does, `offer` returns at once and does not raise.

    on_result: is called with the `Result` of each image, explanation or error, on one of these threads; what it raises
        is logged, and the image counts as failed.
    draw: seeds the draw of the share.
    options: of `Client.explain`, for all images. The priority is "low" if none is given.

    May be shared between threads; to be closed, best by `with`, and before its client.
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
        draw: int = 0,
        **options: Any,
    ) -> None:
        if not 0 <= share <= 1:
            raise InvalidArgument(f"share must lie in [0, 1], not {share}", field="share")
        if waiting < 0:
            raise InvalidArgument(f"waiting must be at least 0, not {waiting}", field="waiting")
        if in_flight < 1:
            raise InvalidArgument(f"in_flight must be at least 1, not {in_flight}", field="in_flight")
        inspect.signature(request_messages.explain).bind(b"", **options)  # a TypeError now rather than for each image
        self._client, self._on_result = client, on_result
        self._share, self._below, self._most = share, below, waiting + in_flight
        self._options = {"method": "poly-cam", "priority": "low", **options}
        self._draw = random.Random(draw)
        self._threads = ThreadPoolExecutor(in_flight, "camserve-sampler")
        self._lock = threading.Lock()
        self._counts = Counts()
        self._taken = 0  # waiting or under way
        self._closed = False

    def offer(
        self,
        image: ImageLike,
        *,
        confidence: float | None = None,
        target: request_messages.TargetLike | None = None,
        request_id: str | None = None,
    ) -> bool:
        """Whether the image is going to be explained. It is read later: an array must not change after this.

        confidence: the probability of the class that was answered, to be compared with `below`.
        target: that class, an index or label; None is the one that the server's model predicts.
        request_id: by which to know it again: in the result's explanation or error.
        """
        with self._lock:
            index = self._counts.offered
            # Drawn for each image, so that confidences do not change which others are in the share.
            drawn = self._draw.random() < self._share
            unsure = self._below is not None and confidence is not None and confidence < self._below
            wanted = (drawn or unsure) and not self._closed
            fits = self._taken < self._most
            self._counts = replace(
                self._counts, offered=index + 1, dropped=self._counts.dropped + (wanted and not fits)
            )
            if not (wanted and fits):
                return False
            own = {"target": target, "request_id": request_id}
            given = {name: value for name, value in own.items() if value is not None}
            try:
                future = self._threads.submit(self._explain, index, image, {**self._options, **given})
            except RuntimeError:  # the interpreter is ending
                return False
            self._taken += 1
        future.add_done_callback(self._ended)
        return True

    @property
    def counts(self) -> Counts:
        """So far."""
        with self._lock:
            return self._counts

    def close(self, *, wait: bool = True) -> None:
        """Take no more. Explain what waits, or drop it; what is under way then ends by itself, or with its client."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=wait, cancel_futures=not wait)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _explain(self, index: int, image: ImageLike, options: dict[str, Any]) -> bool:
        """Whether it was explained."""
        result = Result(index, image, options.get("model") or "", options["method"], self._outcome(image, options))
        if result.error is None:
            result = replace(result, model=result.receipt.model)
        try:
            self._on_result(result)
        except Exception:
            log.exception("what a sampler calls with its results failed")
            return False
        return result.error is None

    def _outcome(self, image: ImageLike, options: dict[str, Any]) -> Any:
        failure: Failure
        try:
            return self._client.explain(image, **options)
        except CamserveError as error:
            failure = error
            failure.request_id = failure.request_id or options.get("request_id") or ""
        except OSError as error:
            failure = error
        except Exception as error:  # an image of a wrong type, a client that is closed
            failure = CamserveError(f"{type(error).__name__}: {error}", request_id=options.get("request_id") or "")
        return failure

    def _ended(self, future: Future[bool]) -> None:
        name = "dropped" if future.cancelled() else "explained" if future.result() else "failed"
        with self._lock:
            self._taken -= 1
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + 1})
