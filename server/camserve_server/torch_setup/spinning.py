"""Control of how long OpenMP threads spin while they wait for each other.

At the end of each parallel section, the threads of libgomp wait for the slowest one. On an idle machine, spinning is
the fastest way to wait. If another process needs the cores, or if a quota limits the CPU time, spinning threads take
the time that the working ones need, and the network runs at a third of its speed.

libgomp has no function that changes the waiting time in a running process. However, it spins only briefly while the
process has more OpenMP threads than the machine has cores. `SpinControl` therefore keeps some idle OpenMP threads as
long as the machine is busy. They change neither the number of threads that compute nor the results.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# If a user sets one of these, the process must not change how its threads wait.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WINDOW_S = 0.4  # time of the batches that one decision is based on
# Least share of the time of a batch in which the calling thread has a core. It is nearly 1 on an idle machine, and at
# most 2/3 on two cores beside one busy process.
MIN_CPU_SHARE = 0.85
FIRST_PROBE_S, LAST_PROBE_S = 5.0, 60.0


class IdleTeam:
    """OpenMP threads that do nothing and exist until `release`.

    Args:
        size: Number of threads of the team, at least 2.
        start_team: Starts a team of this size on the calling thread.
    """

    def __init__(self, size: int, start_team: Callable[[int], None]) -> None:
        started, self._released = threading.Event(), threading.Event()

        def hold() -> None:
            start_team(size)
            started.set()
            self._released.wait()  # the team ends with this thread

        self._thread = threading.Thread(target=hold, name="idle OpenMP team", daemon=True)
        self._thread.start()
        started.wait()

    def release(self) -> None:
        """End the threads."""
        self._released.set()
        self._thread.join()


class SpinControl:
    """Lets the OpenMP threads of this process spin while the machine is idle, and sleep while it is busy.

    The machine counts as busy if the thread that runs the batches does not have a core all the time, although it spins
    where it waits. This cannot be seen while it sleeps instead, so the threads spin again for a moment from time to
    time.

    The methods belong to the thread that runs the batches.

    Args:
        threads: Threads that compute.
        cores: Cores that the process may use.
        start_team: Starts an OpenMP team of a given size on the calling thread. If None, the control does nothing.
        clock: Wall time in seconds.
        cpu_clock: CPU time of the calling thread in seconds.

    Attributes:
        busy_at: Time at which the machine was last found busy, on the clock; minus infinity if never.
    """

    def __init__(
        self,
        threads: int,
        cores: int,
        start_team: Callable[[int], None] | None,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.busy_at = float("-inf")
        self._threads, self._team_size = threads, max(2, cores - threads + 2)
        self._start_team = start_team
        self._clock, self._cpu_clock = clock, cpu_clock
        self._wall_s = self._cpu_s = 0.0
        self._team: IdleTeam | None = None
        self._probe_at = 0.0
        self._probe_after_s = FIRST_PROBE_S

    @property
    def sleeps(self) -> bool:
        """True if waiting threads sleep, because the machine is busy."""
        return self._team is not None

    def was_busy(self, since: float) -> bool:
        """Return True if the machine was found busy after `since`, a time on the clock, or has not been idle again."""
        return self.sleeps or self.busy_at >= since

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Observe the work inside of the context, which is one batch, and decide how the threads wait afterwards."""
        if self._start_team is None:
            yield
            return
        if self._team is not None and self._clock() >= self._probe_at:
            self._team.release()
            self._team = None
        started, cpu_started = self._clock(), self._cpu_clock()
        yield
        if self._team is None:
            self._wall_s += self._clock() - started
            self._cpu_s += self._cpu_clock() - cpu_started
            if self._wall_s >= WINDOW_S:
                self._decide()

    def _decide(self) -> None:
        assert self._start_team is not None, "observing returns early without libgomp"
        busy = self._cpu_s < MIN_CPU_SHARE * self._wall_s
        self._wall_s = self._cpu_s = 0.0
        if not busy:
            self._probe_after_s = FIRST_PROBE_S
            return
        self.busy_at = self._clock()
        if self._threads == 1:  # which waits for no other thread
            return
        self._probe_at = self.busy_at + self._probe_after_s
        self._probe_after_s = min(2 * self._probe_after_s, LAST_PROBE_S)
        self._team = IdleTeam(self._team_size, self._start_team)


def spin_control(device: torch.device) -> SpinControl:
    """Return the control for the thread that runs the batches of a device.

    It does nothing for a GPU, without libgomp, or if the user has chosen how threads wait.

    Args:
        device: The device.
    """
    applies = device.type == "cpu" and not any(name in os.environ for name in _SETTINGS)
    cores = len(os.sched_getaffinity(0))
    return SpinControl(torch.get_num_threads(), cores, _libgomp_team() if applies else None)


def find_libgomp() -> ctypes.CDLL | None:
    """Return the libgomp that torch uses; None if torch uses another OpenMP."""
    maps = Path("/proc/self/maps")
    found = re.search(r"\S*/libgomp[^/\s]*\.so\S*", maps.read_text()) if maps.exists() else None
    return ctypes.CDLL(found[0]) if found else None


def _libgomp_team() -> Callable[[int], None] | None:
    """Return a function that starts a team of the libgomp that torch uses; None if torch uses another OpenMP."""
    libgomp = find_libgomp()
    if libgomp is None:
        return None
    parallel = libgomp.GOMP_parallel
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing, on each thread
    return lambda size: parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))
