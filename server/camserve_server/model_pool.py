"""The pool of configured models: it leases them to requests, loads them, and unloads them to make room.

All methods run on the event loop. A separate thread reads the weights and copies them to further devices, and the
thread of each device's engine warms its copy up. A remote model has an engine of its own, from its load to its last
request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar

import structlog
import torch

from camserve_server.batch_sizes import BatchSizes
from camserve_server.cache_folder import open_cache_folder
from camserve_server.config import Config, ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.engine.outcomes import shut_down
from camserve_server.engine.warmup import warm_up_steps
from camserve_server.engines import Engines
from camserve_server.errors import (
    CamserveError,
    ConfigError,
    InvalidArgument,
    NotFound,
    OutOfMemory,
    Unavailable,
    Unservable,
)
from camserve_server.models.copies import copied
from camserve_server.models.factories import check_code
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.pool_devices import free_cached_memory, unify_fast_forwards, warm_up_all, works
from camserve_server.pool_entries import Lease, LoadedModel, Loads, ModelEntry, ModelUsers, Replica, State
from camserve_server.torch_setup.threads import in_own_thread

log = structlog.get_logger()
T = TypeVar("T")


class ModelPool:
    """Leases the configured models, and loads them again after they have made room for others.

    The weights of all loaded models take at most `max_model_bytes` of the configuration on each device. When a model
    does not fit, the least recently used ones are unloaded after their running requests. Models are loaded one at a
    time. All methods belong to the event loop.

    Args:
        config: The configuration of the server.
        engines: Run the plans of requests and warm up new models.

    Attributes:
        loads: The counters of each model by its name.
    """

    def __init__(self, config: Config, engines: Engines) -> None:
        self.loads: dict[str, Loads] = {}
        self._config = config
        self._engines = engines
        self._entries = {settings.name: ModelEntry(settings) for settings in config.models}
        self._leases = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()
        cache = open_cache_folder(config.cache_path, chosen=config.cache_dir is not None)
        if cache is not None:
            cache.keep_compiled_code()
        self._batch_sizes = BatchSizes(cache)

    async def load_all(self) -> None:
        """Load the configured models in their order, as many as fit.

        Raises:
            ConfigError: A model cannot be loaded.
            CamserveError: A model does not fit into the device's memory, or the engine closes.
        """
        for entry in self._entries.values():
            model = await self._read(entry.config)
            entry.weight_bytes = model.weight_bytes
            if self._weight_bytes() + model.weight_bytes > self._max_bytes:
                log.info("no room at the start, loaded on demand", model=entry.config.name)
                continue
            entry.loaded = await self._warm(entry.config, model, ModelUsers())

    def all(self) -> Iterator[tuple[ModelConfig, State, Model | None]]:
        """Yield the configuration, the state and, if it is ready, the model of each entry, in the configured order."""
        for entry in self._entries.values():
            ready = entry.loaded if entry.state == "ready" else None
            yield entry.config, entry.state, ready.model if ready else None

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Lease]:
        """Lease a model for the duration of the context, or until the lease is released.

        Args:
            name: The name of the model; empty for the first configured model.

        Yields:
            The lease.

        Raises:
            NotFound: No model has this name; the error lists the configured ones.
            Unservable: The model cannot be loaded, or an operator has unloaded it.
        """
        entry = self._entry(name) if name else next(iter(self._entries.values()))
        if entry.closed:
            raise Unservable(
                f"the model {entry.config.name} is unavailable: an operator has unloaded it; use another model",
                reason="UNLOADED",
            )
        loaded = entry.loaded
        # A request that waits for the model counts as its user, so that the model is not unloaded before it is used.
        leave = (loaded.users if loaded else entry.waiting).join()
        try:
            loaded = loaded or await self._load_once(entry)
            loaded.used_at = next(self._leases)
            lease = Lease(loaded.replicas, loaded.settings, leave)
            del loaded
            yield lease
        except ConfigError as error:
            raise Unservable(
                f"{entry.config.name} cannot be loaded; the server's log says why", reason="LOAD_FAILED"
            ) from error
        finally:
            leave()

    # ---- for operators: an operation that has begun is finished even if its caller stops waiting ---------------------

    async def load(self, name: str) -> Model:
        """Load a model with its current settings in the configuration file, unless it is loaded.

        Args:
            name: The name of the model.

        Returns:
            The loaded model.

        Raises:
            NotFound: The configuration file has no model of this name.
            ConfigError: The model cannot be loaded.
        """
        return await _finish_when_cancelled(self._load_current(name, only_if_unloaded=True))

    async def reload(self, name: str) -> Model:
        """Load a model with its current settings, and wait for the requests that use the previous one.

        After an error, the previous model stays in use.

        Args:
            name: The name of the model.

        Returns:
            The new model.

        Raises:
            NotFound: The configuration file has no model of this name.
            ConfigError: The model cannot be loaded.
        """
        return await _finish_when_cancelled(self._load_current(name))

    async def unload(self, name: str) -> None:
        """Refuse new leases of a model, and wait for the requests that use it.

        Args:
            name: The name of the model.

        Raises:
            NotFound: No model has this name.
        """
        entry = self._entry(name)
        entry.closed = True
        await _finish_when_cancelled(self._close(entry))

    async def _load_current(self, name: str, *, only_if_unloaded: bool = False) -> Model:
        settings = self._current_settings(name)
        async with self._one_at_a_time:
            entry = self._entries.get(name) or ModelEntry(settings)
            old = entry.loaded
            if old is None or not only_if_unloaded:
                check_code(settings)
                if old is None:
                    await self._make_room(entry)
                entry.loaded = await self._load_entry(settings, entry)
                entry.config = self._entries.setdefault(name, entry).config = settings
            assert entry.loaded is not None, "the model was loaded before or has been loaded now"
            new, entry.closed = entry.loaded, False
            await self._make_room(entry)
        replaced = [old] if old and old is not new else []
        del old
        await self._wait_until_unused(replaced)
        return new.model

    async def _close(self, entry: ModelEntry) -> None:
        async with self._one_at_a_time:  # this entry may be loading
            removed = [entry.loaded] if entry.loaded else []
            entry.loaded, entry.closed = None, True
        await self._wait_until_unused(removed)

    def _current_settings(self, name: str) -> ModelConfig:
        """Return the settings of a model as the configuration file contains them now."""
        current = {settings.name: settings for settings in self._config.models_now()}
        if name not in current:
            raise _unknown(name, current)
        return current[name]

    # ---- loading and making room -------------------------------------------------------------------------------------

    @property
    def _max_bytes(self) -> float:
        return self._config.max_model_bytes or float("inf")

    def _entry(self, name: str) -> ModelEntry:
        if name not in self._entries:
            raise _unknown(name, self._entries)
        return self._entries[name]

    async def _load_once(self, entry: ModelEntry) -> LoadedModel:
        """Load a model in a task that all waiting requests share and that their cancellation does not end."""
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load_for_requests(entry))
            # Reading the exception prevents asyncio's warning about an exception that was never retrieved.
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(entry.loading)

    async def _load_for_requests(self, entry: ModelEntry) -> LoadedModel:
        try:
            async with self._one_at_a_time:
                if entry.loaded is None:  # an operator may have loaded it meanwhile
                    await self._make_room(entry)
                    entry.loaded = await self._load_entry(entry.config, entry)
                    await self._make_room(entry)  # the exact size is known only now
                return entry.loaded
        finally:
            entry.loading = None

    async def _load_entry(self, settings: ModelConfig, entry: ModelEntry) -> LoadedModel:
        """Load a model and hand the waiting requests over to it. Raises ConfigError and OutOfMemory."""
        model = await self._read(settings)
        loaded = await self._warm(settings, model, entry.waiting)
        entry.weight_bytes, entry.waiting = model.weight_bytes, ModelUsers()
        return loaded

    async def _read(self, settings: ModelConfig) -> Model:
        model = await self._counted(settings, self._read_on_working_device(settings))
        if model.weight_bytes > self._max_bytes:
            raise ConfigError(
                f"max_model_bytes: {settings.name} alone has {model.weight_bytes} bytes of weights, but the limit is "
                f"{self._config.max_model_bytes}; raise max_model_bytes or remove the model"
            )
        return model

    async def _read_on_working_device(self, settings: ModelConfig) -> Model:
        """Load a model on the first device that works, also if a device fails meanwhile."""
        for engine, device in self._engines.working().items():
            try:
                model = await in_own_thread(partial(load, settings, device), device)
            except Exception:
                if await works(engine) or not self._engines.working():
                    raise
            else:
                for each in model.precisions.values():
                    each.device_name = "" if each.remote else engine.device
                return model
        raise shut_down()

    async def _warm(self, settings: ModelConfig, model: Model, users: ModelUsers) -> LoadedModel:
        """Copy a model to the other devices, and warm up all copies, one after the other."""
        started, engine = time.monotonic(), self._engine_of(model, settings)
        try:
            replicas = [Replica(model, engine)]
            if engine.device:
                replicas += await self._counted(settings, self._copies(model, engine))
            warm_up, forget = partial(self._warm_up, settings), partial(self._batch_sizes.forget, settings, model)
            warming = warm_up_all(replicas, warm_up, fixed=bool(settings.batch_size), forget=forget)
            replicas = await self._counted(settings, warming)
            if not replicas:
                raise shut_down()
            unify_fast_forwards(replicas)
        except BaseException:
            await asyncio.to_thread(self._engines.close_remote, engine)
            raise
        if not model.remote and engine.machine_was_busy(started):
            self._batch_sizes.measure_later(settings, model, engine, users)
        elif engine.machine_was_idle(started):
            await self._batch_sizes.keep(settings, model)
        self.loads[settings.name].done += 1
        devices = tuple(replica.engine.device for replica in replicas if replica.engine.device)
        for replica in replicas:
            for each in replica.model.precisions.values():
                each.devices = devices
        for each in model.precisions.values():
            log.info(
                "loaded",
                model=settings.name,
                precision=each.precision,
                digest=each.digest,
                device=", ".join(devices) or model.device.type,
                batch_sizes=each.batch_sizes,
            )
        return LoadedModel(replicas, settings, model.weight_bytes, users)

    def _engine_of(self, model: Model, settings: ModelConfig) -> Engine:
        """Return the engine of the device that holds a model, or a new one for a remote model."""
        if model.remote:
            return self._engines.start_remote(settings.name, model.remote.connection)
        return next(each for each in self._engines.local if each.device == model.device_name)

    async def _copies(self, model: Model, source: Engine) -> list[Replica]:
        """Copy a model from the device of an engine to all others that work. Leave those out that fail meanwhile."""
        replicas = list[Replica]()
        for engine, device in self._engines.working().items():
            if engine is not source:
                try:
                    copy = await in_own_thread(partial(copied, model, device, engine.device), device)
                    replicas.append(Replica(copy, engine))
                except Exception:
                    if await works(engine):
                        await works(source)  # the copy reads its weights from there
                        raise
        return replicas

    async def _warm_up(self, settings: ModelConfig, replica: Replica) -> bool:
        """Warm a replica up. Return False if its device has failed, and the server may have others."""
        try:
            for each in replica.model.precisions.values():
                # The first replica measures. The others have its sizes, so that all devices give the same bits.
                known = {**each.batch_sizes} or await self._batch_sizes.find(settings, each)
                await asyncio.wrap_future(replica.engine.run_between_batches(warm_up_steps(each, known)))
        except Unavailable:
            if replica.engine.device and not replica.engine.working:
                return False
            raise
        return True

    async def _counted(self, settings: ModelConfig, work: Coroutine[Any, Any, T]) -> T:
        """Await a part of a load, count its time and its failure. Raises ConfigError or CamserveError."""
        loads, started = self.loads.setdefault(settings.name, Loads()), time.monotonic()
        try:
            return await work
        except Exception as error:
            loads.failed += 1
            if isinstance(error, torch.OutOfMemoryError):
                error = OutOfMemory(
                    f"{settings.name} does not fit into the device's memory; unload another model first"
                )
            elif not isinstance(error, (CamserveError, ConfigError)):
                log.exception("exception while a model was loaded", model=settings.name)
                error = ConfigError(f"models.{settings.name}: {type(error).__name__}: {error}")
            log.error("cannot be loaded", model=settings.name, reason=str(error))
            raise error from None
        finally:
            loads.seconds += time.monotonic() - started

    def _weight_bytes(self) -> int:
        return sum(entry.loaded.weight_bytes for entry in self._entries.values() if entry.loaded)

    async def _make_room(self, entry: ModelEntry) -> None:
        """Unload other models, idle and least recently used ones first, until the entry fits."""
        others = [each for each in self._entries.values() if each.loaded and each is not entry]
        others.sort(key=lambda each: (len(each.loaded.users) > 0, each.loaded.used_at) if each.loaded else ())
        needed = 0 if entry.loaded else entry.weight_bytes
        removed = list[LoadedModel]()
        for other in others:
            if self._weight_bytes() + needed <= self._max_bytes or other.loaded is None:
                break
            removed.append(other.loaded)
            other.loaded = None
        await self._wait_until_unused(removed)

    async def _wait_until_unused(self, removed: list[LoadedModel]) -> None:
        """Wait until no request uses these models, and empty the list so that their weights are freed."""
        if not removed:
            return
        while removed:
            await removed[-1].users.all_left()
            loaded = removed.pop()
            await asyncio.to_thread(self._engines.close_remote, loaded.replicas[0].engine)
            log.info("unloaded", model=loaded.model.name, digest=loaded.model.digest)
            del loaded
        await free_cached_memory(self._engines)


def _unknown(name: str, configured: dict[str, Any]) -> CamserveError:
    if not name:
        return InvalidArgument("the request names no model; set the model's name", field="model")
    names = ", ".join(configured)
    return NotFound(f"there is no model {name!r}; there are: {names}", field="model", metadata={"known": names})


async def _finish_when_cancelled(work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that continues if the waiting task is cancelled."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return await asyncio.shield(task)
