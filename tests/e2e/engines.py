"""Access to the engine of a server that runs in the process of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Job
from camserve_server.engine.reservation import Reservation
from camserve_server.service.server import Server
from tests.processes import LIMIT_S


def engine_of(server: Server) -> Engine:
    assert server.engine is not None
    return server.engine


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds. The limit is only a safety net."""
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def wait_until_idle(server: Server) -> None:
    """Wait until the engine owes no rows."""
    wait_until(lambda: not engine_of(server).rows_owed())


@contextmanager
def after_submit(notify: Callable[[Job[Any]], None]) -> Iterator[None]:
    """Call `notify` with each job that is submitted to an engine in this context."""
    submit = Reservation.submit

    def notifying(self: Reservation, *args: Any, **kwargs: Any) -> Job[Any]:
        job: Job[Any] = submit(self, *args, **kwargs)
        notify(job)
        return job

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reservation, "submit", notifying)
        yield
