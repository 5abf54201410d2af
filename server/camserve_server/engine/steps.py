"""Work of other threads that runs on the engine's thread, step by step between batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future


class Steps:
    """Runs iterators on the engine's thread and lets batches run between their items.

    Args:
        put: Adds a command to the inbox of the engine.
    """

    def __init__(self, put: Callable[[Callable[[], None]], None]) -> None:
        self._put = put
        self._unfinished: set[Future[None]] = set()

    def start(self, steps: Iterator[None]) -> Future[None]:
        """Return a future that is done after the last step, or that raises the exception of a step."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # only the engine sets the result
        self._unfinished.add(done)
        done.add_done_callback(self._unfinished.discard)

        def step() -> None:
            try:
                next(steps)
            except StopIteration:
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)
            else:
                self._put(step)

        self._put(step)
        return done

    def fail(self, error: Exception) -> None:
        """Set an exception for all iterators that have not ended. No further step may run."""
        for done in [*self._unfinished]:
            done.set_exception(error)
