"""Load time of models without warm-up, compared with that of another commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench_setup import Bench
from benchmarks.machine import ROOT, commit
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.timing import Side, Timed, alternate

AIM = 0.5  # at least this share of the loads per second of the baseline
ROUNDS = 5
SIDES = ("camserve", "baseline")
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "resnet50": {"source": "torchvision:resnet50", "allow_random_weights": True},
    "efficientnet-lite0": {"source": "embedded:efficientnet-lite0"},
}
TEXT = (
    "A process builds the network, checks it, and finds its layers, without the warm-up, which measures batch sizes. "
    "The first load of each process is not counted, because it imports libraries."
)


class LoadProcess:
    """Process that loads a model again and again.

    Args:
        config: Keys of the model.
        device: Device of the model.
        checkout: Folder of the project whose code the process runs.
    """

    def __init__(self, config: Mapping[str, Any], device: str, checkout: Path = ROOT) -> None:
        folders = (checkout.resolve() / "client", checkout.resolve() / "server", ROOT)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("load_process.py")), json.dumps(config), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # models log their warnings
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
            text=True,
        )
        if self._line() != "ready\n":
            raise RuntimeError(f"the code of {checkout} cannot load {config['source']}; run it by hand to see why")

    def load(self) -> Timed:
        """Load the model and return the time."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Timed(1, float(self._line()))

    def close(self) -> None:
        """End the process."""
        with self._process:
            assert self._process.stdin is not None, "it is a pipe"
            self._process.stdin.close()

    def _line(self) -> str:
        assert self._process.stdout is not None, "it is a pipe"
        return self._process.stdout.readline()


@contextmanager
def processes(config: Mapping[str, Any], device: str, baseline: Path | None) -> Iterator[dict[str, LoadProcess]]:
    """Run a process with this code and, if a checkout is given, one with the code of the checkout."""
    with ExitStack() as ends:
        running: dict[str, LoadProcess] = {}
        for name, checkout in (("camserve", ROOT), ("baseline", baseline)):
            if checkout is not None:
                running[name] = LoadProcess(config, device, checkout)
                ends.callback(running[name].close)
        yield running


def section(bench: Bench) -> Result:
    """Measure the loads of each network, alternately with those of the baseline."""
    findings = Findings()
    for name, keys in CONFIGS.items():
        with processes({**keys, "name": name}, str(bench.device), bench.baseline) as running:
            sides: dict[str, Side] = {side: process.load for side, process in running.items()}
            rates = alternate(sides, ROUNDS, lambda name=name: bench.step(name))  # type: ignore[misc]
        seconds = {side: 1 / each.rate for side, each in rates.items()}
        findings.bars[name] = seconds
        findings.rows.append([name, *(f"{seconds[side]:.2f}" if side in seconds else "" for side in SIDES)])
        if bench.baseline:
            findings.claims.append(
                Claim(
                    f"Loads of {name} ({seconds['camserve']:.2f} s)",
                    f"commit {commit(bench.baseline)} ({seconds['baseline']:.2f} s)",
                    rates["camserve"].over(rates["baseline"]),
                    AIM,
                    because="the loader measures the network by more passes",
                )
            )
    return Result(
        "Load time",
        TEXT,
        claims=findings.claims,
        tables=[Table(f"Seconds of a load, median of {ROUNDS}:", ["model", *SIDES], findings.rows)],
        charts=[Chart("Load of a model without warm-up", "seconds", findings.bars)],
    )
