"""Batch sizes that were measured before: by an earlier load, by another process, or again on an idle machine.

The bits of maps depend on the batch sizes. The sizes of a loaded model therefore do not change. A load uses the sizes
that are known, so that it gives the bits of earlier loads.

Measurements beside other processes can give a wrong batch size. Therefore only those made on an idle machine are kept.
After a load on a busy machine, the model is measured again, and the result is used when the model is loaded again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
import weakref
from collections.abc import Mapping
from importlib import metadata
from typing import Any, get_args
from weakref import WeakKeyDictionary

import structlog

from camserve_server.cache_folder import CacheFolder
from camserve_server.config import ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.engine.warmup import measure_steps
from camserve_server.errors import CamserveError
from camserve_server.models.model import LaneKind, Model, Passes
from camserve_server.models.structure import structure
from camserve_server.pool_entries import ModelUsers
from camserve_server.torch_setup.machine import machine_facts

FIRST_WAIT_S, LAST_WAIT_S = 30.0, 600.0  # until the next attempt to measure on an idle machine
KIND = "batch-sizes"  # in the cache folder
MAX_SIZE = 1024  # as of `batch_size` in the configuration
# Packages that contain the code of networks, or that run them. Their versions change the speed.
_PACKAGES = ("camserve", "torch", "torchvision", "timm", "transformers", "onnxruntime")

log = structlog.get_logger()


class BatchSizes:
    """The batch sizes that a load does not need to measure. All methods belong to the event loop.

    Args:
        cache: The folder that keeps them for later starts; None for none.
    """

    def __init__(self, cache: CacheFolder | None = None) -> None:
        self._cache = cache
        self._keys: WeakKeyDictionary[Model, dict[str, Any]] = WeakKeyDictionary()
        self._measured: dict[str, dict[LaneKind, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(self, settings: ModelConfig, model: Model) -> Mapping[LaneKind, int]:
        """Return the batch sizes that are configured, that an earlier load measured, or that the cache contains.

        Args:
            settings: The configuration of the model.
            model: The model.

        Returns:
            The size of each kind of lane that is known.
        """
        if settings.batch_size or model.remote:
            return self._known(settings, model)
        key, source = self._key(model), "earlier load"
        if _name(key) not in self._measured and self._cache is not None:
            source = "cache folder"
            stored = await asyncio.to_thread(self._cache.read, KIND, key)
            if _are_sizes(stored):
                self._measured[_name(key)] = stored
            elif stored is not None:
                self._cache.report(KIND, key, "it does not contain batch sizes")
        found = self._known(settings, model)
        if found:
            log.info(
                "batch sizes not measured",
                model=model.name,
                precision=model.precision,
                source=source,
                batch_sizes={**found},
            )
        return found

    async def keep(self, settings: ModelConfig, model: Model) -> None:
        """Keep the batch sizes of a model that was measured on an idle machine for later loads and starts.

        Args:
            settings: The configuration of the model.
            model: The model after its warm-up.
        """
        for each in model.precisions.values():
            if not (each.remote or self._known(settings, each)):
                await self._store(each, each.batch_sizes)

    def forget(self, settings: ModelConfig, model: Model) -> bool:
        """Forget the batch sizes of a model that does not fit into memory with them, so that they are measured.

        Args:
            settings: The configuration of the model.
            model: The model.

        Returns:
            False if no batch size was known, or if it is configured.
        """
        known = [each for each in model.precisions.values() if self._known(settings, each)]
        if settings.batch_size or not known:
            return False
        log.warning("known batch sizes do not fit into memory, measured again", model=model.name)
        for each in model.precisions.values():
            self._measured[_name(self._key(each))] = {}
            each.batch_sizes.clear()
        return True

    def _key(self, model: Model) -> dict[str, Any]:
        key = self._keys.get(model)
        if key is None:
            key = self._keys[model] = measurement_key(model)
        return key

    def _known(self, settings: ModelConfig, model: Model) -> Mapping[LaneKind, int]:
        """Return the batch sizes that are configured or in memory."""
        if settings.batch_size:
            return dict.fromkeys(get_args(Passes), settings.batch_size)
        return self._measured.get(_name(self._key(model)), {})

    async def _store(self, model: Model, sizes: Mapping[LaneKind, int]) -> None:
        key = self._key(model)
        self._measured[_name(key)] = {**sizes}
        if self._cache is not None:
            await asyncio.to_thread(self._cache.write, KIND, key, {**sizes})

    def measure_later(self, settings: ModelConfig, model: Model, engine: Engine, users: ModelUsers) -> None:
        """Measure the model again when the machine is idle, unless its batch sizes are known.

        Args:
            settings: The configuration of the model.
            model: The model. It can be unloaded in the meantime, which ends the measurement.
            engine: Runs the measurements between the batches of requests.
            users: The requests that use the model; a measurement counts as one of them.
        """
        for each in model.precisions.values():
            if not self._known(settings, each):
                task = asyncio.create_task(self._measure(weakref.ref(each), engine, users))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _measure(self, reference: weakref.ref[Model], engine: Engine, users: ModelUsers) -> None:
        wait_s, idle = FIRST_WAIT_S, False
        while not idle:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LAST_WAIT_S)
            model = reference()
            if model is None:
                return
            if not engine.rows_owed():
                idle = await self._measure_now(model, engine, users)
            del model

    async def _measure_now(self, model: Model, engine: Engine, users: ModelUsers) -> bool:
        """Measure a model. Return True if the machine was idle, so that the result counts."""
        started, sizes = time.monotonic(), dict[LaneKind, int]()
        leave = users.join()
        try:
            await asyncio.wrap_future(engine.run_between_batches(measure_steps(model, {}, sizes)))
        except CamserveError:  # the server shuts down, or the device has failed
            return True
        except Exception as error:  # such as a lack of memory beside requests, which use the sizes of the load
            log.warning(
                "batch sizes cannot be measured again",
                model=model.name,
                precision=model.precision,
                reason=f"{type(error).__name__}: {error}".partition("\n")[0],
            )
            return False
        finally:
            leave()
        if engine.machine_was_busy(started):
            return False
        await self._store(model, sizes)
        log.info(
            "measured again on an idle machine",
            model=model.name,
            precision=model.precision,
            batch_sizes=model.batch_sizes,
            batch_sizes_of_the_next_load=sizes,
        )
        return True


def measurement_key(model: Model) -> dict[str, Any]:
    """Return everything that the measured batch sizes of a model depend on, in types of JSON.

    Call it on a thread with the number of threads of torch that the engine has.

    Args:
        model: The model.
    """
    packages = (*_PACKAGES, *["openvino"] * model.openvino, *["triton"] * model.compile)
    return {
        "weights": model.digest,
        "code": model.code,
        "network": _digest([re.sub(" at 0x[0-9a-f]+", "", text) for text in structure(model.module)]),
        "input": [model.preprocessing.channels, *model.preprocessing.size],
        "layer": model.layer.name if model.layer else "",
        "precision": model.precision,
        "one_row": model.one_row,
        "channels_last": model.channels_last,
        "fold_batch_norm": bool(model.folded),
        "compile": model.compile,
        "openvino": model.openvino,
        "device": model.device.type,
        "machine": _digest(machine_facts(model.device)),
        "versions": {name: _version(name) for name in packages},
    }


def _are_sizes(stored: object) -> bool:
    return isinstance(stored, dict) and all(
        kind in get_args(LaneKind) and type(size) is int and 1 <= size <= MAX_SIZE for kind, size in stored.items()
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
