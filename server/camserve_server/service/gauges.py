"""Gauges of the engines, the models and the calls in flight, read when Prometheus scrapes the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, get_args

import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from camserve_server.engine.counters import BATCH_BOUNDS_S
from camserve_server.engine.job import Job
from camserve_server.engines import Engines
from camserve_server.pool_entries import State
from camserve_server.service.frontends.supervisor import FrontEnds
from camserve_server.service.servicer import Servicer

LANE = ["model", "precision", "lane"]


class Gauges(Collector):
    """Reads the state of the engines, the models and the calls when Prometheus scrapes the server.

    Args:
        servicer: The source for calls and models.
        engines: The source for rows and batches.
        front_ends: The source for front ends; None if callers connect to the engine's process.
    """

    def __init__(self, servicer: Servicer, engines: Engines, front_ends: FrontEnds | None) -> None:
        self._servicer = servicer
        self._engines = engines
        self._front_ends = front_ends

    def collect(self) -> Iterator[Metric]:
        """Yield all gauges. Prometheus calls it on the thread of its listener."""
        yield from self._server()
        yield from self._devices()
        yield from self._queue()
        yield from self._lanes()
        yield from self._models()
        yield from self._cache()
        yield from _device_memory()

    def _server(self) -> Iterator[Metric]:
        draining = self._servicer.draining
        ready = self._servicer.models is not None and not draining and not self._engines.failed.done()
        yield GaugeMetricFamily("camserve_ready", "1 if the server accepts requests, else 0.", ready)
        yield GaugeMetricFamily(
            "camserve_draining", "1 if the server finishes running calls before it ends, else 0.", draining
        )
        if self._front_ends is not None:
            yield GaugeMetricFamily("camserve_frontends", "Number of front ends that run.", self._front_ends.running)
            yield CounterMetricFamily(
                "camserve_frontend_restarts",
                "Number of front ends that replaced others that had ended.",
                self._front_ends.restarts,
            )

    def _devices(self) -> Iterator[Metric]:
        if not self._engines.several_devices:
            return
        working = GaugeMetricFamily(
            "camserve_device_working", "1 if the engine of the device works, 0 if it has failed.", labels=["device"]
        )
        owed = GaugeMetricFamily(
            "camserve_device_queue_rows", "Rows that the requests on the device still owe.", labels=["device"]
        )
        rows = CounterMetricFamily(
            "camserve_device_rows", "Rows of requests that have run on the device.", labels=["device"]
        )
        for engine in self._engines.local:
            working.add_metric([engine.device], engine.working)
            owed.add_metric([engine.device], engine.rows_owed())
            rows.add_metric([engine.device], engine.counters.rows)
        yield from (working, owed, rows)

    def _queue(self) -> Iterator[Metric]:
        now, calls = time.monotonic(), [*self._servicer.running]
        waiting = [job.submitted for job in (call.job for call in calls) if job and _waits(job)]
        yield GaugeMetricFamily("camserve_requests_in_flight", "Number of calls that have not ended.", len(calls))
        yield GaugeMetricFamily(
            "camserve_requests_oldest_seconds",
            "Seconds since the arrival of the oldest call that has not ended; 0 if there is none.",
            max((now - call.started for call in calls), default=0.0),
        )
        yield GaugeMetricFamily(
            "camserve_queue_rows", "Rows that all reserved and running requests still owe.", self._engines.rows_owed()
        )
        yield GaugeMetricFamily(
            "camserve_queue_max_rows", "The setting max_rows_owed of the server.", self._engines.max_rows_owed
        )
        yield GaugeMetricFamily(
            "camserve_queue_requests", "Number of submitted requests that wait for their first batch.", len(waiting)
        )
        yield GaugeMetricFamily(
            "camserve_queue_oldest_seconds",
            "Seconds that the oldest of these requests has waited; 0 if there is none.",
            now - min(waiting, default=now),
        )

    def _lanes(self) -> Iterator[Metric]:
        rows = CounterMetricFamily("camserve_rows", "Rows of requests that have run.", labels=LANE)
        padding = CounterMetricFamily(
            "camserve_padding_rows", "Padding rows that filled batches to the size of their lane.", labels=LANE
        )
        batches = HistogramMetricFamily("camserve_batch_seconds", "Duration of a batch in seconds.", labels=LANE)
        for lane, counted in self._engines.lanes().items():
            rows.add_metric(lane, counted.rows)
            padding.add_metric(lane, counted.padding)
            within, so_far = [], 0
            for bound, count in zip((*BATCH_BOUNDS_S, "+Inf"), counted.within, strict=True):
                so_far += count
                within.append((str(bound), so_far))
            batches.add_metric(lane, within, counted.seconds)
        yield from (rows, padding, batches)

    def _models(self) -> Iterator[Metric]:
        models = GaugeMetricFamily("camserve_models", "Number of configured models by state.", labels=["state"])
        info = GaugeMetricFamily(
            "camserve_model_info",
            "1 for each loaded model, precision and device.",
            labels=["model", "precision", "digest", "device"],
        )
        memory = GaugeMetricFamily(
            "camserve_model_weight_bytes", "Bytes of the weights of a loaded model.", labels=["model"]
        )
        sizes = GaugeMetricFamily(
            "camserve_batch_size", "Number of rows in a full batch of the kind of lane.", labels=LANE
        )
        loads = CounterMetricFamily(
            "camserve_model_loads", "Number of loads of a model by result.", labels=["model", "result"]
        )
        seconds = CounterMetricFamily(
            "camserve_model_load_seconds", "Seconds that the loads of a model took, with warm-up.", labels=["model"]
        )
        pool = self._servicer.models
        states = dict.fromkeys(get_args(State), 0)
        for config, state, model in pool.all() if pool else ():
            states[state] += 1
            if model is None:
                continue
            memory.add_metric([config.name], model.weight_bytes)
            for each in model.precisions.values():
                for device in each.devices or [str(each.device)]:
                    info.add_metric([each.name, each.precision, each.digest, device], 1)
                for kind, size in [*each.batch_sizes.items()]:
                    sizes.add_metric([each.name, each.precision, kind], size)
        for each_state, count in states.items():
            models.add_metric([each_state], count)
        for name, loaded in [*pool.loads.items()] if pool else ():
            loads.add_metric([name, "ok"], loaded.done)
            loads.add_metric([name, "failed"], loaded.failed)
            seconds.add_metric([name], loaded.seconds)
        yield from (models, info, memory, sizes, loads, seconds)

    def _cache(self) -> Iterator[Metric]:
        cache = self._servicer.cache
        if cache is None:
            return
        hits = CounterMetricFamily(
            "camserve_cache_hits", "Requests that were answered from the result cache.", labels=["store"]
        )
        for store, count in cache.hits.items():
            hits.add_metric([store], count)
        yield hits
        yield CounterMetricFamily(
            "camserve_cache_misses", "Requests whose response was not in the result cache.", cache.misses
        )
        yield GaugeMetricFamily(
            "camserve_cache_bytes", "Bytes of responses in the result cache in memory.", cache.memory.bytes
        )
        yield GaugeMetricFamily("camserve_cache_entries", "Responses in the result cache in memory.", len(cache.memory))
        yield CounterMetricFamily(
            "camserve_cache_evictions",
            "Responses that the result cache in memory dropped to make room for others.",
            cache.memory.evictions,
        )
        if cache.redis is not None:
            yield CounterMetricFamily(
                "camserve_cache_redis_errors",
                "Failed reads and writes of Redis, and damaged responses there.",
                cache.redis.errors,
            )


def _waits(job: Job[Any]) -> bool:
    return job.first_batch is None and job.finished is None


def _device_memory() -> Iterator[Metric]:
    """Yield the memory that torch uses on each GPU. This does not wait for the GPU."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    allocated = GaugeMetricFamily(
        "camserve_device_memory_allocated_bytes", "Bytes of GPU memory that tensors use.", labels=["device"]
    )
    reserved = GaugeMetricFamily(
        "camserve_device_memory_reserved_bytes",
        "Bytes of GPU memory that torch holds, with those of tensors.",
        labels=["device"],
    )
    total = GaugeMetricFamily("camserve_device_memory_total_bytes", "Bytes of memory of the GPU.", labels=["device"])
    for i in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(i):
            device = [f"cuda:{i}"]
            allocated.add_metric(device, torch.cuda.memory_allocated(i))
            reserved.add_metric(device, torch.cuda.memory_reserved(i))
            total.add_metric(device, torch.cuda.get_device_properties(i).total_memory)
    yield from (allocated, reserved, total)
