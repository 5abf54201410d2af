"""Processes and interpreters in which gRPC does not work: children of a fork, and patched standard libraries."""

from __future__ import annotations

import os
import sys
import threading

from camserve.errors import CamserveError

__all__ = ["calls", "check"]

# gRPC itself reads this variable when it is imported.
_FORK_SUPPORT = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in ("1", "true", "yes", "t", "y")


class _Calls:
    """The calls of all clients of this process. It is a context manager for one call.

    Attributes:
        running: Number of the calls that run.
        used: This process has opened a channel.
        problem: Reason why each call of this process would hang. May be empty.
    """

    lock = threading.Lock()
    running, used, problem = 0, False, ""

    def __enter__(self) -> None:
        with self.lock:
            self.running += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.running -= 1


calls = _Calls()


def check() -> None:
    """Check that gRPC works in this process. Call it before a channel is opened or used.

    Raises:
        CamserveError: The process is the child of a fork that gRPC does not support, or gevent or eventlet has replaced
            the standard library and gRPC does not know it.
    """
    if calls.problem:
        raise CamserveError(calls.problem)
    _check_patches()
    calls.used = True


def _check_patches() -> None:
    if (eventlet := sys.modules.get("eventlet.patcher")) is not None and eventlet.is_monkey_patched("thread"):
        raise CamserveError(
            "eventlet has replaced the threads of Python, so a call of gRPC would block all green threads; use gevent "
            "or threads, or make calls in a process without eventlet"
        )
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        from grpc._cython import cygrpc

        if not cygrpc.g_gevent_activated:
            raise CamserveError(
                "gevent has replaced the threads of Python, so a call would block all greenlets; "
                "call grpc.experimental.gevent.init_gevent() after gevent.monkey.patch_all() and before any client"
            )


def _after_fork() -> None:
    if calls.used and (not _FORK_SUPPORT or calls.running):
        calls.problem = (
            "this process was forked from one in which camserve clients had made calls, so gRPC does not work in it; "
            "make the first call after the fork, use the start method spawn or forkserver of multiprocessing, or set "
            "GRPC_ENABLE_FORK_SUPPORT=1 before grpc is imported and fork while no call is in progress"
        )
    calls.lock = threading.Lock()  # another thread may have held it during the fork
    calls.running = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
