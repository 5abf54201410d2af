"""Time until a server is ready, at its first start and at a later start with the same cache folder."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.bench_setup import Bench
from benchmarks.results import Chart, Findings, Result, Table
from benchmarks.service import running
from benchmarks.subjects import CONFIGS, TINY
from camserve_server.batch_sizes import KIND
from camserve_server.config import ModelConfig
from camserve_server.torch_setup.compiler import compile_obstacle

ATTEMPTS = 5  # to measure batch sizes while no other process uses the machine
TEXT = (
    "Seconds from the start of the process until `camserve serve` is ready with one model. The first start has an "
    "empty `cache_dir`, and the second one finds the batch sizes and the compiled code of the first. A server keeps "
    "only sizes that no other process has disturbed; a first start that kept none is repeated."
)


def section(bench: Bench) -> Result:
    """Start a server with each network twice, without torch.compile and, on a GPU where it works, with it.

    On a CPU, the compiler disturbs the measurement of the batch sizes, so that a first start with it keeps none.
    """
    findings = Findings()
    compiles = bench.device.type == "cuda" and not compile_obstacle()
    for name in bench.names:
        config = TINY if name == TINY.name else CONFIGS[name]
        for compile_ in (False, True)[: 1 + compiles]:
            settings = config.model_copy(update={"compile": compile_, "precision": (bench.precision,)})
            bench.step(f"{name}{', compiled' * compile_}")
            pairs = [_two_starts(settings, bench.device.type) for _ in range(bench.rounds)]
            first, second = (median(seconds) for seconds in zip(*pairs, strict=True))
            findings.bars[f"{name}{', compiled' * compile_}"] = {"first": first, "second": second}
            how = "torch.compile" if compile_ else "network"
            findings.rows.append([name, how, f"{first:.1f}", f"{second:.1f}", f"{first / second:.2f}×"])
    return Result(
        "Start",
        TEXT,
        tables=[
            Table(
                f"Seconds until ready, median of {bench.rounds}:",
                ["model", "forward pass", "first start", "second start", "ratio"],
                findings.rows,
            )
        ],
        charts=[Chart("Time until ready", "seconds", findings.bars)],
    )


def _two_starts(config: ModelConfig, device: str) -> Sequence[float]:
    """Return the seconds of a first and of a second start.

    Raises:
        RuntimeError: Other processes use the machine all the time.
    """
    for _ in range(ATTEMPTS):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "cache"
            first = _start(config, device, folder)
            if config.batch_size or [*folder.glob(f"{KIND}/*.json")]:
                return first, _start(config, device, folder)
    raise RuntimeError(f"other processes disturbed {ATTEMPTS} starts; run the benchmark while the machine is idle")


def _start(config: ModelConfig, device: str, folder: Path) -> float:
    table = config.model_dump(mode="json", exclude_unset=True) | {"compile": config.compile}
    start = time.perf_counter()
    with running(
        f'listen = "127.0.0.1:0"\ndevice = "{device}"\nlog_level = "error"\n',
        CAMSERVE_CACHE_DIR=str(folder),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "torch"),  # torch may have set another one in this process
        TRITON_CACHE_DIR=str(folder / "triton"),
        CAMSERVE_MODELS=json.dumps([table]),
    ):
        return time.perf_counter() - start
