"""Figures of a server on a GPU, over gRPC: latencies, many callers, time until ready, and identical bits under load.

`python -m benchmarks.gpu` runs this module in a process of its own. It writes its figures after each measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

import camserve
from benchmarks.arithmetic import tf32
from benchmarks.host import EXPLAIN, call_for, request
from benchmarks.limit import recorded_ascent
from benchmarks.service import running
from benchmarks.subjects import CONFIGS, TINY, photograph
from camserve_server.config import ModelConfig
from camserve_server.models.load import load

ASCENTS = 64  # batch size of the recorded step that Opti-CAM is compared with
BRANCH_ROWS = 4  # a step in parallel branches has the bits of a lane of this size
BRANCHED = (4, 16, 64)  # batch sizes of steps in branches
METHODS = ("grad-cam", "score-cam", "poly-cam", "opti-cam")  # whose latency is measured
COMPARED = ("cam", *METHODS, "rise")  # whose maps are compared alone and under load
# Pairs of precisions to serve; the next pair is tried if the network cannot be served at one of them.
PRECISIONS = {"cuda": (("fp16", "tf32"), ("bf16", "tf32")), "cpu": (("fp32", "bf16"),)}


@dataclass(frozen=True)
class Amounts:
    """Numbers of requests, steps and callers that are measured.

    Attributes:
        repeats: Number of requests of each latency, after two that are not timed.
        steps: Steps of Opti-CAM.
        images: Number of concurrent requests for Opti-CAM.
        compared: Number of images whose maps are compared.
        processes: Number of processes with callers.
        callers: Number of callers in each process.
        seconds: Duration of the calls of many callers.
        front_ends: Number of front ends in the second server.
    """

    repeats: int = 8
    steps: int = 100
    images: int = 32
    compared: int = 2
    processes: int = 4
    callers: int = 48
    seconds: float = 4.0
    front_ends: int = 8


SMALL = Amounts(repeats=1, steps=3, images=2, compared=1, processes=1, callers=2, seconds=0.2, front_ends=2)


@dataclass
class Served:
    """Figures by key with their description, and the reasons of measurements that failed.

    `arithmetic` is the precision of the figures, and whether the forward pass is compiled.
    """

    arithmetic: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[str, str]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: str, value: float, what: str, text: str) -> None:
        """Add a figure and its row of the table."""
        self.figures[key] = value
        self.rows.append((what, text))


class Measuring:
    """Figures of a network that are written to a file after each measurement.

    Args:
        config: The network.
        device: "cuda" or "cpu".
        out: File for the figures.
        amounts: How much is measured.
    """

    def __init__(self, config: ModelConfig, device: str, out: Path, amounts: Amounts) -> None:
        self._config, self._device, self._out, self._amounts = config, device, out, amounts
        self._pixels = np.asarray(photograph().resize(config.input_size[::-1], PIL.Image.Resampling.BILINEAR))
        self.served = Served()

    def run(self) -> Served:
        """Measure everything. A measurement that fails leaves a reason, and the next ones still run."""
        for precisions in PRECISIONS[self._device]:
            self.served.arithmetic = f"{precisions[0]}{', compiled' * (self._config.compile is True)}"
            if self._attempt(f"server with {' and '.join(precisions)}", partial(self._first_server, precisions)):
                self._attempt(
                    f"server with {self._amounts.front_ends} front ends", partial(self._second_server, precisions)
                )
                self._attempt("recorded steps of Opti-CAM", partial(self._recorded, precisions[0]))
                break
        return self.served

    def _attempt(self, what: str, measure: Callable[[], None]) -> bool:
        """Run a measurement and write all figures. Return False if it failed."""
        try:
            measure()
        except Exception as error:
            self.served.failures.append((what, f"{type(error).__name__}: {error}".partition("\n")[0]))
            return False
        finally:
            self._out.write_text(json.dumps(asdict(self.served)), encoding="utf-8")
        return True

    @contextmanager
    def _server(self, precisions: Sequence[str], front_ends: int, key: str) -> Iterator[str]:
        """Run a server, add the seconds until it is ready, and yield its address."""
        config = self._config
        start = time.perf_counter()
        with running(
            f'listen = "127.0.0.1:0"\ndevice = "{self._device}"\nlog_level = "warning"\nfrontends = {front_ends}\n\n'
            f'[[models]]\nname = "{config.name}"\nsource = "{config.source}"\ninput_size = {[*config.input_size]}\n'
            f"precision = {[*precisions]}\ncompile = {json.dumps(config.compile)}\n"
            f"{f'batch_size = {config.batch_size}' if config.batch_size else ''}\n"
        ) as address:
            took = time.perf_counter() - start
            ends = f"{front_ends} front end{'s' * (front_ends > 1)}"
            what = f"Seconds until ready, {' and '.join(precisions)}, {ends}, {key.removeprefix('ready_')} start"
            self.served.add(key, took, what, f"{took:.1f}")
            yield address

    def _first_server(self, precisions: Sequence[str]) -> None:
        """Measure latencies and compare maps. All requests use the first precision."""
        with (
            self._server(precisions, 1, "ready_first") as address,
            camserve.Client(address, timeout=120) as client,
        ):
            self._attempt("batch sizes", partial(self._batch_sizes, client))
            for method in METHODS:
                self._attempt(f"{method}, one at a time", partial(self._latency, client, method, precisions[0]))
            self._attempt("identical bits", partial(self._compare, client))
            self._attempt("concurrent Opti-CAM", partial(self._concurrent, client))

    def _second_server(self, precisions: Sequence[str]) -> None:
        with self._server(precisions, self._amounts.front_ends, "ready_second") as address:
            self._many_callers(address)

    def _ask(self, client: camserve.Client, method: str, image: int = 0) -> camserve.Explanation:
        """Request a map of the photograph, shifted by 8 pixels for each number of the image."""
        parameters = {"steps": self._amounts.steps} if method == "opti-cam" else None
        pixels: NDArray[np.uint8] = np.roll(self._pixels, 8 * image, axis=1)
        return client.explain(pixels, model=self._config.name, method=method, parameters=parameters)

    def _batch_sizes(self, client: camserve.Client) -> None:
        """Add the size of each kind of lane at the first precision, those of the small lanes included."""
        sizes = self._ask(client, "grad-cam").receipt.batch_sizes
        text = ", ".join(f"{kind} {size}" for kind, size in sorted(sizes.items()))
        self.served.rows.append(("Batch size of each kind of lane", text))

    def _latency(self, client: camserve.Client, method: str, precision: str) -> None:
        for image in range(2):
            self._ask(client, method, image)
        seconds, rows = [], 0
        for image in range(self._amounts.repeats):
            start = time.perf_counter()
            rows = self._ask(client, method, image).cost.rows
            seconds.append(time.perf_counter() - start)
        what = f"{method}, one request at a time, {precision}, {rows} rows"
        self.served.add(method, median(seconds), what, f"{1e3 * median(seconds):.1f} ms")

    def _compare(self, client: camserve.Client) -> None:
        """Compare each map with that of the same request in succession, and among others at the same time."""
        requests = [(method, image) for image in range(self._amounts.compared) for method in COMPARED]
        alone = {each: self._ask(client, *each).saliency for each in requests}
        again = {each: self._ask(client, *each).saliency for each in requests}
        others = [(method, image + self._amounts.compared) for method, image in requests]
        with ThreadPoolExecutor(2 * len(requests)) as pool:
            maps = pool.map(lambda each: self._ask(client, *each).saliency, [*others, *requests])
            loaded = dict(zip([*others, *requests], maps, strict=True))
        for method in COMPARED:
            twice, company = (
                max(float(np.abs(alone[each] - found[each]).max()) for each in requests if each[0] == method)
                for found in (again, loaded)
            )
            what = f"Largest difference of maps, {method}: the same request again; among {len(loaded) - 1} others"
            self.served.add(f"bits_{method}", company, what, f"{twice:.0e}; {company:.0e}")

    def _concurrent(self, client: camserve.Client) -> None:
        images = self._amounts.images
        with ThreadPoolExecutor(images) as pool:
            start = time.perf_counter()
            [*_] = pool.map(lambda image: self._ask(client, "opti-cam", image), range(images))
            seconds = time.perf_counter() - start
        rate = images * self._amounts.steps / seconds
        what = f"opti-cam, {images} requests at the same time, {self._amounts.steps} steps"
        self.served.add("opti_rows_per_s", rate, what, f"{seconds:.2f} s, {rate:.0f} rows/s")

    def _recorded(self, precision: str) -> None:
        """Measure the recorded step at batch size `ASCENTS`, at the precision and with the network of the server."""
        model = load(self._config.model_copy(update={"precision": (precision,)}), torch.device(self._device))
        (layer,) = model.default_layers(many=False)
        size = ASCENTS if self._device == "cuda" else 2
        X = model.preprocessing(photograph()).to(self._device).expand(size, -1, -1, -1)
        steps = 20 if self._device == "cuda" else 1
        with tf32(precision == "tf32"):
            one = recorded_ascent(model.module, X, layer.channels, steps)
            rates = [
                (of, recorded_ascent(model.module, X[:of], layer.channels, steps, of // BRANCH_ROWS))
                for of in BRANCHED
                if of <= size
            ]
        rate = one.rows / one.seconds
        self.served.add("recorded_rows_per_s", rate, f"Recorded step of Opti-CAM, batch {size}", f"{rate:.0f} rows/s")
        if rates:
            text = "; ".join(f"batch {of}: {each.rows / each.seconds:.0f} rows/s" for of, each in rates)
            self.served.rows.append((f"The same in parallel branches of {BRANCH_ROWS} rows", text))
        if "opti_rows_per_s" in self.served.figures:
            share = self.served.figures["opti_rows_per_s"] / rate
            self.served.add("opti_share", share, "Concurrent Opti-CAM ÷ recorded step", f"{share:.2f}")

    def _many_callers(self, address: str) -> None:
        amounts = self._amounts
        message = request("grad-cam", self._config.name)
        with ProcessPoolExecutor(amounts.processes, multiprocessing.get_context("spawn")) as pool:
            arguments = (address, message, amounts.callers, amounts.seconds)
            [*_] = pool.map(_calls, *zip(*[(*arguments[:3], 0.5)] * amounts.processes, strict=True))  # starts processes
            done = [*pool.map(_calls, *zip(*[arguments] * amounts.processes, strict=True))]
        rate = sum(requests / seconds for requests, seconds in done)
        callers = amounts.processes * amounts.callers
        what = f"grad-cam, {callers} callers with a connection each, {amounts.front_ends} front ends"
        self.served.add("grad_cam_per_s", rate, what, f"{rate:.0f} requests/s")


def _calls(address: str, message: bytes, callers: int, seconds: float) -> tuple[int, float]:
    return asyncio.run(call_for(address, EXPLAIN, message, callers, seconds, callers))


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_served", description=__doc__)
    parser.add_argument("--device", choices=PRECISIONS, required=True)
    parser.add_argument("--compile", action="store_true", help="compile the forward pass with torch.compile")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    amounts = Amounts(front_ends=max(2, min(8, len(os.sched_getaffinity(0)) // 2))) if on_gpu else SMALL
    config = (CONFIGS["resnet50"] if on_gpu else TINY).model_copy(update={"compile": arguments.compile})
    # The second server is a second start with the cache folder of the first.
    cache = arguments.out.resolve().parent / "cache"
    os.environ["CAMSERVE_CACHE_DIR"] = str(cache)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "torch")  # torch may have set another one in this process
    os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")
    served = Measuring(config, arguments.device, arguments.out, amounts).run()
    for what, text in served.rows:
        print(f"{what}: {text}")
    for what, reason in served.failures:
        print(f"{what}: {reason}", file=sys.stderr)
    return 1 if served.failures else 0


if __name__ == "__main__":
    sys.exit(main())
