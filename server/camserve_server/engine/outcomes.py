"""The end of a job: its result or its error. Also the delivery of its events."""

from __future__ import annotations

from typing import Any

import structlog
import torch

from camserve_server.engine.job import Event, Job
from camserve_server.errors import CamserveError, Cancelled, Expired, InternalError, OutOfMemory, Unavailable
from camserve_server.torch_setup.device import check_device

log = structlog.get_logger()


def shut_down() -> Unavailable:
    """Return the error of requests that the engine does not finish because it closes."""
    return Unavailable("the server has shut down; try another one", retry_after_s=1.0)


def caller_cancelled() -> Cancelled:
    """Return the error of a request that its caller has cancelled."""
    return Cancelled("the caller cancelled the request")


def expired(job: Job[Any], now: float) -> Expired:
    """Return the error of a job whose deadline has passed.

    Args:
        job: The job.
        now: The current time, on the clock of `time.monotonic()`.
    """
    waited = 1e3 * (now - job.submitted)
    return Expired(
        f"the deadline passed {waited:.0f} ms after the submission, when {job.rows} of about "
        f"{job.rows + job.rows_left} rows were done; allow more time or request fewer rows",
        metadata={"queue_ms": f"{job.queue_ms:.0f}", "rows_done": str(job.rows)},
    )


def set_outcome(job: Job[Any], result: Any, error: Exception | None) -> None:
    """Set the result or the exception of a job's future. An exception of the plan becomes a CamserveError.

    Args:
        job: The job.
        result: The result of the plan.
        error: The error that ended the job; None if the plan returned.

    Raises:
        Exception: The CUDA context is broken, so that the engine cannot go on.
    """
    if error is None:
        job.future.set_result(result)
    elif isinstance(error, CamserveError):
        job.future.set_exception(error)
    elif isinstance(error, torch.OutOfMemoryError):  # raised by the plan itself; batches handle their own
        message = f"the intermediate results for {job.model.name} do not fit into the device's memory"
        job.future.set_exception(OutOfMemory(message))
    else:
        job.context.run(log.error, "plan failed", exc_info=error)
        job.future.set_exception(InternalError("an internal error; the server's log contains the cause"))
        check_device(job.model.device)  # raises and ends the engine if the CUDA context is broken


def notify_job(job: Job[Any], event: Event) -> None:
    """Deliver an event to the receiver of a job. An exception of the receiver does not affect other requests."""
    try:
        job.notify(event)
    except Exception:
        job.context.run(log.debug, "event not delivered")
