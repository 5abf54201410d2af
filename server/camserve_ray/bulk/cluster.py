"""Connection to a Ray cluster, and the engines that fit on its nodes."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from camserve.errors import InvalidArgument, Unavailable
from camserve_ray.connection import connect
from camserve_server.config import Config
from camserve_server.errors import ConfigError

__all__ = ["Placement", "connected", "place", "reporting_wait"]

DEFAULT_CPUS = 4
WAIT_REPORT_S = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """The engines of a run.

    Attributes:
        engines: Number of engines.
        cpus: CPUs of each engine; 0 for engines on GPUs.
        gpus: GPUs of each engine, 0 or 1.
    """

    engines: int
    cpus: int
    gpus: int


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster for the duration of the context, unless this process is connected already.

    Args:
        address: HOST:PORT of the cluster, "auto" for the cluster of this machine, or "local" to start one.

    Raises:
        Unavailable: There is no such cluster.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        connect(None if address == "local" else address)
    except ConfigError as error:
        raise Unavailable(
            f"there is no Ray cluster at {address!r}; start one with `ray start --head`, name its HOST:PORT, or use "
            "`local` to start one on this machine for this run"
        ) from error
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # that of Ray aborts the process, with a trace of its own
    import ray.data  # not earlier: `connect` sets variables that Ray reads when it is imported

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # not the file in Ray's folder of logs
            handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


def place(config: Config, cpus_per_engine: int | None, nodes: Sequence[Mapping[str, Any]]) -> Placement:
    """Decide how many engines run on the nodes of a cluster: one on each GPU, or one for a number of CPUs.

    Args:
        config: The configuration. `device` says whether GPUs are used: "auto" uses them if there are any.
        cpus_per_engine: CPUs of each engine on CPUs. None selects `threads` of the configuration or, without it, four,
            but at most those of the smallest node.
        nodes: The nodes, as `ray.nodes` describes them.

    Raises:
        InvalidArgument: No engine fits on a node.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(int(each.get("GPU", 0)) for each in alive)
    kind = config.device.partition(":")[0]
    if gpus and kind != "cpu":
        return Placement(gpus, cpus=0, gpus=1)
    if kind in ("cuda", "all"):
        raise InvalidArgument(
            'the run needs GPUs, but no node of the cluster has one; add a node, or set device = "cpu" in the '
            "configuration",
            field="device",
        )
    cpus = [int(each.get("CPU", 0)) for each in alive]
    wanted = cpus_per_engine or config.threads or max(1, min(DEFAULT_CPUS, *(each for each in cpus if each), 1024))
    engines = sum(each // wanted for each in cpus)
    if not engines:
        raise InvalidArgument(
            f"an engine needs {wanted} CPUs, but the largest node of the cluster has {max(cpus, default=0)}; use fewer "
            "CPUs for each engine",
            field="cpus_per_engine",
        )
    return Placement(engines, cpus=wanted, gpus=0)


@contextmanager
def reporting_wait(placement: Placement, free: Callable[[], Mapping[str, float]]) -> Iterator[threading.Event]:
    """Log every 30 seconds what a run waits for, because Ray waits without a limit for devices that others use.

    Args:
        placement: The engines of the run.
        free: Returns the resources of the cluster that nobody uses, such as `ray.available_resources`.

    Yields:
        An event. Setting it ends the messages, as does the end of the context.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_report_wait, args=(placement, free, ended), daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        ended.set()
        thread.join(1.0)  # not longer: `free` waits for the head node, which may be lost


def _report_wait(placement: Placement, free: Callable[[], Mapping[str, float]], ended: threading.Event) -> None:
    kind, each = ("GPU", placement.gpus) if placement.gpus else ("CPU", placement.cpus)
    while not ended.wait(WAIT_REPORT_S):
        try:
            number = free().get(kind, 0)
        except Exception as error:  # the run itself reports a lost cluster
            log.debug("the resources of the cluster are unknown: %s", error)
            continue
        log.warning(
            "waiting for %ss, or for models to load: the run can use %d engine(s) with %d %s(s) each, and %g %s(s) of "
            "the cluster are free",
            kind,
            placement.engines,
            each,
            kind,
            number,
            kind,
        )
