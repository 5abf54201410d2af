"""The models: those that are configured, those of them that are loaded, and who makes room for whom.

Everything here happens on the event loop; weights are read on a thread beside it, and batches measured on the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import structlog
import torch

from camserve_server.config import Config, ModelConfig
from camserve_server.engine import Engine
from camserve_server.errors import ConfigError, NotFound, OutOfMemory, Unservable
from camserve_server.models.load import load
from camserve_server.models.model import Model
from camserve_server.warmup import warming_up

State = Literal["ready", "waiting", "unloaded"]

log = structlog.get_logger()


@dataclass
class Loads:
    """How often a model has been loaded or could not be, and how long that took, warm-up included."""

    done: int = 0
    failed: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class _Loaded:
    model: Model
    weight_bytes: int
    users: set[object] = field(default_factory=set)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set when the last user has left it
    used_at: int = 0  # which request of the server was the last for it


@dataclass(eq=False)
class _Place:
    """Of one model. `closed` by an operator, it is loaded for no request."""

    config: ModelConfig
    loaded: _Loaded | None = None
    closed: bool = False
    loading: asyncio.Task[_Loaded] | None = None
    waiting: set[object] = field(default_factory=set)  # who will use it once it is loaded
    weight_bytes: int = 0  # when it was loaded last

    @property
    def state(self) -> State:
        if self.loaded:
            return "ready"
        return "unloaded" if self.closed else "waiting"


class Shelf:
    """Lends out models. One that has had to make room is loaded again when it is asked for.

    The weights of all take at most `max_model_bytes`, if set: the least recently used one goes, when it has finished
    what runs on it.
    """

    def __init__(self, config: Config, engine: Engine, device: torch.device) -> None:
        self.loads: dict[str, Loads] = {}
        self._config = config
        self._engine = engine
        self._device = device
        self._places = {settings.name: _Place(settings) for settings in config.models}
        self._requests = itertools.count(1)
        self._one_at_a_time = asyncio.Lock()

    async def fill(self) -> None:
        """Loads the models in their order, as many as there is room for. Raises ConfigError."""
        most = self._config.max_model_bytes
        for place in self._places.values():
            loaded = await self._loaded(place)
            if most is not None and self._weight_bytes() + loaded.weight_bytes > most:
                log.info("no room at the start: loaded when asked for", model=place.config.name)
                continue
            place.loaded = loaded

    def all(self) -> Iterator[tuple[ModelConfig, State, Model | None]]:
        """Every model, the first one first; the last is there if it is ready."""
        for place in [*self._places.values()]:  # a copy: whoever watches asks on another thread
            yield place.config, place.state, place.loaded.model if place.loaded else None

    @contextlib.asynccontextmanager
    async def lend(self, name: str) -> AsyncIterator[Model]:
        """The model of that name, the first one for none, to be kept loaded meanwhile.

        Raises NotFound, listing the known ones, and Unservable where it cannot be loaded.
        """
        place = self._place(name)
        if place.closed:
            raise Unservable(f"{place.config.name} is not loaded: an operator has unloaded it", reason="UNLOADED")
        loaded, me = place.loaded, object()
        users = loaded.users if loaded else place.waiting
        users.add(me)
        try:
            loaded = loaded or await self._load_once(place)
            loaded.used_at = next(self._requests)
            yield loaded.model
        except ConfigError as error:
            raise Unservable(
                f"{place.config.name} cannot be loaded; the server's log says why", reason="LOAD_FAILED"
            ) from error
        finally:
            users.remove(me)
            if loaded and not users:
                loaded.left.set()

    # ---- for operators -----------------------------------------------------------------------------------------------

    async def load(self, name: str) -> Model:
        """Loads the model as the configuration file has it now. Raises NotFound and ConfigError."""
        place = self._read_again(name)
        loaded = place.loaded or await self._load_once(place)
        place.closed = False
        return loaded.model

    async def unload(self, name: str) -> None:
        """Lends the model no more, and waits for what runs on it. Raises NotFound."""
        place = self._place(name)
        place.closed = True
        await self._take_down([place])

    async def reload(self, name: str) -> Model:
        """Loads the model anew as the configuration file has it now, then waits for what runs on the old one.

        Raises NotFound and ConfigError; then the old one is there still.
        """
        place = self._read_again(name)
        async with self._one_at_a_time:
            fresh = await self._loaded(place)
            old, place.loaded, place.closed = place.loaded, fresh, False
            await self._make_room(place)
        if old:
            await _unused(old)
        return fresh.model

    # ---- loading and making room -------------------------------------------------------------------------------------

    def _place(self, name: str) -> _Place:
        known = ", ".join(self._places)
        if not name:
            return next(iter(self._places.values()))
        if name not in self._places:
            raise NotFound(f"there is no model {name!r}; there are: {known}", field="model", metadata={"known": known})
        return self._places[name]

    def _read_again(self, name: str) -> _Place:
        for settings in self._config.models_now():
            if settings.name == name:
                place = self._places.setdefault(name, _Place(settings))
                place.config = settings
                return place
        return self._place(name)

    async def _load_once(self, place: _Place) -> _Loaded:
        """Loads it; all who wait for it wait for the same load, which goes on if they do not."""
        if place.loading is None:
            place.loading = asyncio.create_task(self._load(place))
        return await asyncio.shield(place.loading)

    async def _load(self, place: _Place) -> _Loaded:
        try:
            async with self._one_at_a_time:
                await self._make_room(place)
                loaded = await self._loaded(place)
                # Nobody can take it away from those who wait before they have had it.
                loaded.users, place.waiting = place.waiting, set()
                place.loaded = loaded
                await self._make_room(place)  # by now its size is known
                return loaded
        except Exception:
            log.exception("cannot be loaded", model=place.config.name)
            raise
        finally:
            place.loading = None

    async def _loaded(self, place: _Place) -> _Loaded:
        name, started = place.config.name, time.monotonic()
        loads = self.loads.setdefault(name, Loads())
        try:
            model = await self._warm(place.config)
        except Exception as error:
            loads.failed += 1
            if isinstance(error, torch.OutOfMemoryError):
                raise OutOfMemory(f"{name} does not fit into the device's memory") from error
            raise
        loads.done += 1
        loads.seconds += time.monotonic() - started
        for each in model.precisions.values():
            log.info(
                "loaded",
                model=name,
                precision=each.precision,
                digest=each.digest,
                device=self._device.type,
                batch_sizes=each.batch_sizes,
            )
        place.weight_bytes = model.weight_bytes
        return _Loaded(model, model.weight_bytes)

    async def _warm(self, config: ModelConfig) -> Model:
        loader = ThreadPoolExecutor(1, "load")
        loading = asyncio.get_running_loop().run_in_executor(loader, load, config, self._device)
        loader.shutdown(wait=False)  # the thread ends with the load, and its OpenMP team too: see device/
        model = await loading
        for each in model.precisions.values():
            await asyncio.wrap_future(self._engine.between(warming_up(each, config.batch_size)))
        return model

    def _weight_bytes(self) -> int:
        return sum(place.loaded.weight_bytes for place in self._places.values() if place.loaded)

    async def _make_room(self, place: _Place) -> None:
        """Takes down the least recently used of the others, idle ones first, until it fits."""
        most = self._config.max_model_bytes
        if most is None:
            return
        needed = 0 if place.loaded else place.weight_bytes
        others = sorted(
            (each for each in self._places.values() if each.loaded and each is not place),
            key=lambda each: (bool(each.loaded.users), each.loaded.used_at) if each.loaded else (False, 0),
        )
        total, going = self._weight_bytes() + needed, list[_Place]()
        for other in others:
            if total <= most:
                break
            assert other.loaded is not None, "only loaded ones make room"
            total -= other.loaded.weight_bytes
            going.append(other)
        await self._take_down(going)

    async def _take_down(self, places: Iterable[_Place]) -> None:
        """Lends them no more, and waits until nobody uses them: with that, their weights are gone."""
        for place in places:
            if place.loaded:
                going, place.loaded = place.loaded, None
                await _unused(going)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


async def _unused(loaded: _Loaded) -> None:
    while loaded.users:
        loaded.left.clear()
        await loaded.left.wait()
    log.info("unloaded", model=loaded.model.name, digest=loaded.model.digest)
