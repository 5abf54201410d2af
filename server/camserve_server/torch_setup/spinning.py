"""Control of how long OpenMP threads spin while they wait for each other.

At the end of each parallel section, the threads of libgomp wait for the slowest one. On an idle machine, spinning is
the fastest way to wait. If another process needs the cores, or if a quota limits the CPU time, spinning threads take
the time that the working ones need, and the network runs at a third of its speed.

libgomp has no function that changes the waiting time in a running process. However, it spins only briefly while the
process has more OpenMP threads than the machine has cores. `SpinControl` therefore keeps some idle OpenMP threads as
long as the machine is busy. They change neither the number of threads that compute nor the results.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

_SCHEDSTAT = Path("/proc/self/schedstat")  # Linux: CPU time, time without a core, and number of time slices
# If a user sets one of these, the process must not change how its threads wait.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WINDOW_S = 0.4  # time of the batches that one decision is based on
# Share of the time of the batches in which one of the threads is ready to run and has no core: nearly 0 on an idle
# machine, and at least 1/3 on two cores beside one busy process. Between the limits, the threads go on as before.
BUSY_SHARE, IDLE_SHARE = 0.15, 0.05
# Threads that find the machine busy as soon as they spin again sleep longer and longer.
FIRST_SLEEP_S, LAST_SLEEP_S = 5.0, 60.0


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

    The machine counts as busy if one of these threads often has no core when it could run. Other processes or a quota
    can be the reason, and also other threads of this process.

    The methods belong to the thread that runs the batches.

    Args:
        threads: Threads that compute.
        cores: Cores that the process may use.
        start_team: Starts an OpenMP team of a given size on the calling thread. If None, the control does nothing.
        waits: Returns the seconds that each thread of the calling thread's team has been without a core so far.
        clock: Wall time in seconds.

    Attributes:
        busy_at: Time at which the machine was last found busy, on the clock; minus infinity if never.
    """

    def __init__(
        self,
        threads: int,
        cores: int,
        start_team: Callable[[int], None] | None,
        waits: Callable[[], Sequence[float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.busy_at = float("-inf")
        self._threads, self._team_size = threads, max(2, cores - threads + 2)
        self._start_team = start_team
        self._waits, self._clock = waits, clock
        self._wall_s = 0.0  # since `_waited` was read
        self._waited: Sequence[float] | None = None
        self._team: IdleTeam | None = None
        self._spinning_since = float("-inf")
        self._sleep_until, self._sleep_s = 0.0, FIRST_SLEEP_S

    @property
    def sleeps(self) -> bool:
        """True if waiting threads sleep, because the machine is busy."""
        return self._team is not None

    @property
    def observes(self) -> bool:
        """True if the control finds out whether the machine is busy."""
        return self._start_team is not None

    def was_busy(self, since: float) -> bool:
        """Return True if the machine was found busy after `since`, a time on the clock, or has not been idle again."""
        return self.sleeps or self.busy_at >= since

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Observe the work inside of the context, which is one batch, and decide how the threads wait afterwards."""
        if self._start_team is None:
            yield
            return
        started = self._clock()
        yield
        self._wall_s += self._clock() - started
        if self._waited is None or self._wall_s >= WINDOW_S:
            self._end_window()

    def _end_window(self) -> None:
        """Decide by the waits since the last window, if the threads are the same, and begin a new window."""
        before, wall_s = self._waited, self._wall_s
        self._waited, self._wall_s = None, 0.0
        with contextlib.suppress(OSError):  # libgomp has ended a thread of the team
            self._waited = self._waits()
        if before is not None and self._waited is not None:
            longest_s = max(now - then for now, then in zip(self._waited, before, strict=True))
            self._decide(longest_s / wall_s)

    def _decide(self, share: float) -> None:
        """Change how the threads wait if it does not fit the share of the time in which one of them had no core."""
        assert self._start_team is not None, "observing returns early without libgomp"
        now = self._clock()
        if share >= BUSY_SHARE:
            self.busy_at = now
            if self._threads > 1 and self._team is None:  # one thread waits for no other
                soon = now - self._spinning_since < self._sleep_s
                self._sleep_s = min(2 * self._sleep_s, LAST_SLEEP_S) if soon else FIRST_SLEEP_S
                self._sleep_until = now + self._sleep_s
                self._team = IdleTeam(self._team_size, self._start_team)
        elif share < IDLE_SHARE and self._team is not None and now >= self._sleep_until:
            self._team.release()
            self._team, self._spinning_since = None, now


def spin_control(device: torch.device) -> SpinControl:
    """Return the control for the thread that runs the batches of a device.

    It does nothing for a GPU, without libgomp, if the system does not measure how long threads wait, or if the user has
    chosen how threads wait.

    Args:
        device: The device.
    """
    applies = device.type == "cpu" and not any(name in os.environ for name in _SETTINGS) and _SCHEDSTAT.exists()
    libgomp, threads = find_libgomp() if applies else None, torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    return SpinControl(threads, cores, _libgomp_team(libgomp), _TeamWaits(libgomp, threads))


def no_control() -> SpinControl:
    """Return a control that does nothing, for a thread without an OpenMP team."""
    return SpinControl(1, 1, None, list)


class _TeamWaits:
    """Seconds that each thread of the calling thread's OpenMP team has been ready to run without a core.

    Args:
        libgomp: The libgomp that torch uses.
        threads: Threads of the team.
    """

    def __init__(self, libgomp: ctypes.CDLL | None, threads: int) -> None:
        self._libgomp, self._threads = libgomp, threads
        self._files: list[Path] = []

    def __call__(self) -> list[float]:
        """Return the seconds of each thread since its start. Always call it on the same thread.

        Raises:
            OSError: A thread has ended. The next call finds the new team.
        """
        if not self._files:
            self._files = [Path(f"/proc/self/task/{each}/schedstat") for each in self._team()]
        try:
            return [int(file.read_text().split()[1]) / 1e9 for file in self._files]
        except OSError:
            self._files = []
            raise

    def _team(self) -> list[int]:
        """Return the identifiers of the threads of the team, which libgomp keeps for later parallel sections."""
        assert self._libgomp is not None, "SpinControl does nothing without libgomp"
        found: list[int] = []
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: found.append(threading.get_native_id()))
        self._libgomp.GOMP_parallel(function, None, ctypes.c_uint(self._threads), ctypes.c_uint(0))
        return found


def find_libgomp() -> ctypes.CDLL | None:
    """Return the libgomp that torch uses; None if torch uses another OpenMP."""
    maps = Path("/proc/self/maps")
    found = re.search(r"\S*/libgomp[^/\s]*\.so\S*", maps.read_text()) if maps.exists() else None
    return ctypes.CDLL(found[0]) if found else None


def _libgomp_team(libgomp: ctypes.CDLL | None) -> Callable[[int], None] | None:
    """Return a function that starts a team of the libgomp that torch uses; None if torch uses another OpenMP."""
    if libgomp is None:
        return None
    parallel = libgomp.GOMP_parallel
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing, on each thread
    return lambda size: parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))
