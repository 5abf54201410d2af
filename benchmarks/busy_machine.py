"""The engine on a machine that runs other processes, or under a quota of CPU time, by how OpenMP threads wait."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks import engine_runs, subjects
from benchmarks.bench_setup import Bench
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.service import MODEL, lane_size
from benchmarks.subjects import Subject
from benchmarks.timing import Side, Timed
from camserve_server.config import ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.torch_setup.allocator import keep_memory

IDLE_AIM, BUSY_AIM = 0.95, 2 / 3
# The control of camserve does nothing if one of these variables is set. 300,000 is libgomp's own number of spins.
POLICIES: dict[str, dict[str, str]] = {
    "always spin (libgomp)": {"GOMP_SPINCOUNT": "300000"},
    "never spin": {"OMP_WAIT_POLICY": "PASSIVE"},
    "camserve": {},
}
CGROUP = Path("/sys/fs/cgroup/cpu")  # version 1; or version 2 at its root
PERIOD_US = 100_000

TEXT = (
    "An engine in a process of its own runs Score-CAM on {threads} threads, while other processes use the machine, or "
    "while a cgroup limits its CPU time. *Fair share*: the rate on the idle machine, times the share of the cores that "
    "the threads get if all are treated alike, for a process whose threads never wait in vain."
)


@cache
def _engine(config: str) -> tuple[Engine, Subject]:
    """Return the engine of this process, which is never closed, and its model."""
    subject = subjects.from_config(ModelConfig.model_validate_json(config), torch.device("cpu"), 1.0)
    engine = Engine()
    engine.start()
    return engine, subject


def run(config: str, rows: int) -> tuple[Timed, str]:
    """Run a Score-CAM on the engine of this process. Return its time and the digest of its map."""
    engine, subject = _engine(config)
    layer = max(subject.model.layers, key=lambda each: each.channels).name
    job = engine_runs.submit(engine, subject.model, subject.x, subject.call("score-cam", (layer,)), budget=2 + rows)
    result = job.result
    return job.timed, hashlib.sha256(result.maps.numpy().tobytes()).hexdigest()


class PolicyProcess:
    """Process whose OpenMP threads wait in one way. It starts with the first call and ends with `close`."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), keep_memory)

    def __call__(self, config: str, rows: int) -> tuple[Timed, str]:
        """Run a Score-CAM in the process."""
        before = dict(os.environ)
        os.environ.update(self._variables)  # a spawned process inherits them
        try:
            return self._pool.submit(run, config, rows).result()
        finally:
            os.environ.clear()
            os.environ.update(before)

    @property
    def pid(self) -> int:
        """Id of the process."""
        [pid] = self._pool._processes
        return pid

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run processes that use a core each."""
    with ExitStack() as ends:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            ends.callback(process.wait)
            ends.callback(process.kill)
        yield


@contextmanager
def quota(pid: int, cores: float) -> Iterator[bool]:
    """Limit the CPU time of a process by a cgroup. Yield False if this user may not do that."""
    version_1 = CGROUP.exists()
    folder = (CGROUP if version_1 else CGROUP.parent) / f"camserve-bench-{pid}"
    try:
        folder.mkdir()
        if version_1:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD_US)))
        else:
            (folder / "cpu.max").write_text(f"{round(cores * PERIOD_US)} {PERIOD_US}")
        (folder / "cgroup.procs").write_text(str(pid))
    except OSError:
        yield False
    else:
        try:
            yield True
        finally:
            (folder.parent / "cgroup.procs").write_text(str(pid))
    end = time.monotonic() + 10
    while folder.exists() and time.monotonic() < end:
        with suppress(OSError):  # the group is empty a moment later
            folder.rmdir()
        time.sleep(0.1)


def section(bench: Bench) -> Result:
    """Measure each way of waiting on an idle and on a busy machine."""
    findings = Findings()
    threads = torch.get_num_threads()
    for subject in bench.subjects(MODEL) if bench.device.type == "cpu" else ():
        _measure(bench, findings, subject, threads)
    return Result(
        "Busy machines",
        TEXT.format(threads=threads),
        claims=findings.claims,
        tables=[
            Table(
                "Rows per second, median of the rounds:",
                ["model", "machine", "fair share", *POLICIES],
                findings.rows,
            )
        ],
        charts=[Chart("Score-CAM beside other processes", "rows per second", findings.bars)],
    )


def _measure(bench: Bench, findings: Findings, subject: Subject, threads: int) -> None:
    config = subject.config.model_copy(update={"batch_size": lane_size(subject)}).model_dump_json()
    rows = max(16, round(bench.seconds * subject.limit.rate))
    cores = len(os.sched_getaffinity(0))
    digests = set()
    with ExitStack() as ends:
        processes = {name: PolicyProcess(variables) for name, variables in POLICIES.items()}
        for process in processes.values():
            ends.callback(process.close)
            process(config, 16)  # loads the model

        def side(process: PolicyProcess) -> Timed:
            timed, digest = process(config, rows)
            digests.add(digest)
            return timed

        sides: dict[str, Side] = {name: partial(side, process) for name, process in processes.items()}
        idle = 0.0
        for machine, others, limited in (
            ("idle", 0, False),
            ("one busy process", 1, False),
            ("two busy processes", 2, False),
            ("quota of half of the cores", 0, True),
        ):
            with ExitStack() as conditions:
                conditions.enter_context(busy_processes(others))
                quotas = [quota(each.pid, threads / 2) for each in processes.values()] if limited else []
                if not all(conditions.enter_context(each) for each in quotas):
                    continue
                rates = bench.alternate(f"{subject.name}: {machine}", sides)
            idle = idle or rates["always spin (libgomp)"].rate
            fair = idle / 2 if limited else idle * min(1, cores / (threads + others))
            ours, spinning = rates["camserve"], rates["always spin (libgomp)"]
            findings.claims.append(
                Claim(
                    f"Rate with {threads} threads, {machine}",
                    "always spinning" if machine == "idle" else "fair share",
                    ours.over(spinning) if machine == "idle" else ours.rate / fair,
                    IDLE_AIM if machine == "idle" else BUSY_AIM,
                    "share",
                    "identical maps" if len(digests) == 1 else f"{len(digests)} different maps",
                    f"{ours.rate:.1f} of {fair:.1f} rows/s; always spinning {spinning.rate:.1f}",
                )
            )
            findings.bars[machine] = {name: each.rate for name, each in rates.items()}
            cells = [f"{each.rate:.1f}" for each in rates.values()]
            findings.rows.append([subject.name, machine, f"{fair:.1f}", *cells])
