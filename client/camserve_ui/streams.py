"""Calls to the camserve server as streams of events for the page.

A stream that is left early cancels its calls on the server.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camserve import aio
from camserve.errors import CamserveError
from camserve.receipt import Receipt
from camserve_ui import answers, problems
from camserve_ui.requests import ExplainForm

__all__ = ["evaluate", "explain", "log_failure", "replay"]

Event = dict[str, Any]
METRICS = ("insertion", "deletion")

log = logging.getLogger("camserve_ui")


async def explain(client: aio.Client, image: bytes, form: ExplainForm) -> AsyncGenerator[Event, None]:
    """Explain an image with all methods of a form at the same time, so that the server fills its batches.

    Args:
        client: Client of the server.
        image: The encoded image file.
        form: The values of the form.

    Yields:
        The events of all methods. `method` names the method. The last event of a method is its explanation or its
        problem.
    """
    # Small, so that a slow browser slows the streams down instead of filling the memory.
    events: asyncio.Queue[Event] = asyncio.Queue(len(form.methods))

    async def follow(name: str) -> None:
        stream = client.explain_stream(
            image, model=form.model, method=name, target=form.target, budget=form.budget, seed=form.seed
        )
        async for each in _converted(stream):
            await events.put({"method": name, **each})
        await events.put({"method": name, "event": "end"})

    tasks = [asyncio.create_task(follow(name)) for name in form.methods]
    try:
        running = len(tasks)
        while running:
            each = await events.get()
            if each["event"] == "end":
                running -= 1
            else:
                yield each
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def evaluate(
    client: aio.Client, image: bytes, saliency: NDArray[np.float32], model: str, target: int
) -> AsyncGenerator[Event, None]:
    """Compute the insertion and the deletion curve of a map.

    Args:
        client: Client of the server.
        image: The encoded image file.
        saliency: The map, float32 [H, W] in [0, 1].
        model: Name of the model.
        target: Index of the class that the map explains.

    Yields:
        Progress, and then the evaluation or a problem.
    """
    stream = client.evaluate_stream(image, saliency=saliency, metrics=METRICS, model=model, target=target)
    async for each in _converted(stream):
        yield each


async def replay(client: aio.Client, image: bytes, receipt: Receipt) -> AsyncGenerator[Event, None]:
    """Compute the map of a receipt again and compare the bits.

    Args:
        client: Client of the server.
        image: The encoded image file.
        receipt: The receipt.

    Yields:
        Progress, and then the comparison or a problem.
    """
    stream = client.replay_stream(receipt, image)
    async for each in _converted(stream):
        yield each


def log_failure(error: BaseException) -> None:
    """Log a bug without its message, which may contain data of the user."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("camserve ui failed with a %s:\n%s", type(error).__name__, where)


async def _converted(stream: AsyncGenerator[Any, None]) -> AsyncIterator[Event]:
    """Yield the events of a stream as JSON values, and an error as the last event."""
    try:
        async with aclosing(stream):
            async for each in stream:
                if (converted := answers.event(each)) is not None:
                    yield converted
    except CamserveError as error:
        yield {"event": "problem", "problem": problems.describe(error)}
    except Exception as error:
        log_failure(error)
        yield {"event": "problem", "problem": problems.internal(error)}
