"""Work of other threads that runs on the engine's thread, step by step between batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import torch

from camserve_server.torch_setup.device import CPU, check_device


class Steps:
    """Runs iterators on the engine's thread and lets batches run between their items.

    Args:
        put: Adds a command to the inbox of the engine.

    Attributes:
        device: The device of the engine, which is checked after an exception of a step.
    """

    def __init__(self, put: Callable[[Callable[[], None]], None]) -> None:
        self.device: torch.device = CPU
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
                # Ends the engine if the CUDA context is broken. `fail` then sets the exception of the future, so that
                # its reader finds the engine closed.
                check_device(self.device)
                done.set_exception(error)
            else:
                self._put(step)

        self._put(step)
        return done

    def fail(self, error: Exception) -> None:
        """Set an exception for all iterators that have not ended. No further step may run."""
        for done in [*self._unfinished]:
            done.set_exception(error)
