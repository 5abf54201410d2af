"""The models: those that are configured, those of them that are loaded, and who makes room for whom.

Everything here happens on the event loop; weights are read on a thread beside it, and batches measured on the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import structlog
import torch

from camserve_server.config import Config, ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.engine.warmup import warm_up_steps
from camserve_server.errors import CamserveError, ConfigError, InvalidArgument, NotFound, OutOfMemory, Unservable
from camserve_server.models.load import load
from camserve_server.models.model import Model

State = Literal["ready", "waiting", "unloaded"]

log = structlog.get_logger()
T = TypeVar("T")


@dataclass
class Loads:
    """How often a model has been loaded or could not be, and how long that took, warm-up included."""

    done: int = 0
    failed: int = 0
    seconds: float = 0.0


class _Users:
    """Who uses a model, or waits to use it."""

    def __init__(self) -> None:
        self._users: set[object] = set()
        self._left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._users)

    def join(self) -> Callable[[], None]:
        """One more, until what is returned is called; to call it again does nothing."""
        me = object()
        self._users.add(me)

        def leave() -> None:
            self._users.discard(me)
            self._left.set()

        return leave

    async def gone(self) -> None:
        """Waits until nobody uses it."""
        while self._users:
            self._left.clear()
            await self._left.wait()


@dataclass(frozen=True, eq=False)
class Loan:
    """A model that stays loaded until `end()`."""

    model: Model
    end: Callable[[], None]


@dataclass(eq=False)
class _Resident:
    """A model that is loaded."""

    model: Model
    weight_bytes: int
    users: _Users
    used_at: int = 0  # which request of the server was the last for it


@dataclass(eq=False)
class _Place:
    """Of one model. `closed` by an operator, it is loaded for no request."""

    config: ModelConfig
    resident: _Resident | None = None
    closed: bool = False
    task: asyncio.Task[_Resident] | None = None  # that loads it
    waiting: _Users = field(default_factory=_Users)  # who will use it once it is loaded
    weight_bytes: int = 0  # when it was loaded last

    @property
    def state(self) -> State:
        if self.closed:
            return "unloaded"
        return "ready" if self.resident else "waiting"


class Shelf:
    """Lends out models. One that has had to make room is loaded again when it is asked for.

    The weights of all take at most `max_model_bytes`, if set: the least recently used one goes, when it has finished
    what runs on it. One model is loaded at a time.
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
        """Loads the models in their order, as many as there is room for. Raises CamserveError or ConfigError."""
        for place in self._places.values():
            model = await self._read(place.config)
            place.weight_bytes = model.weight_bytes
            if self._weight_bytes() + model.weight_bytes > self._most:
                log.info("no room at the start: loaded when asked for", model=place.config.name)
                continue
            place.resident = await self._warm(place.config, model, _Users())

    def all(self) -> Iterator[tuple[ModelConfig, State, Model | None]]:
        """Every model, the first one first; the last is there if it is ready."""
        for place in self._places.values():
            ready = place.resident if place.state == "ready" else None
            yield place.config, place.state, ready.model if ready else None

    @contextlib.asynccontextmanager
    async def lend(self, name: str) -> AsyncIterator[Loan]:
        """The model of that name, the first one for none; the loan ends with the context, if not before.

        Raises NotFound, listing the known ones, and Unservable where it cannot be loaded.
        """
        place = self._place(name) if name else next(iter(self._places.values()))
        if place.closed:
            raise Unservable(f"{place.config.name} is not loaded: an operator has unloaded it", reason="UNLOADED")
        resident = place.resident
        # Who waits for it is one of its users already: it cannot go before they have had it.
        leave = (resident.users if resident else place.waiting).join()
        try:
            resident = resident or await self._load_once(place)
            resident.used_at = next(self._requests)
            loan = Loan(resident.model, leave)
            del resident
            yield loan
        except ConfigError as error:
            raise Unservable(
                f"{place.config.name} cannot be loaded; the server's log says why", reason="LOAD_FAILED"
            ) from error
        finally:
            leave()

    # ---- for operators: whether or not they wait for it, what they began is finished ---------------------------------

    async def load(self, name: str) -> Model:
        """Loads the model as the configuration file has it now. Raises NotFound and ConfigError."""
        return await _to_its_end(self._anew(name, only_if_gone=True))

    async def reload(self, name: str) -> Model:
        """Loads the model anew as the configuration file has it now, then waits for what runs on the old one.

        Raises NotFound and ConfigError; then everything is as it was.
        """
        return await _to_its_end(self._anew(name))

    async def unload(self, name: str) -> None:
        """Lends the model no more, and waits for what runs on it. Raises NotFound."""
        place = self._place(name)
        place.closed = True
        await _to_its_end(self._close(place))

    async def _anew(self, name: str, *, only_if_gone: bool = False) -> Model:
        settings = self._settings(name)
        async with self._one_at_a_time:
            place = self._places.get(name) or _Place(settings)
            old = place.resident
            if old is None or not only_if_gone:
                if old is None:
                    await self._make_room(place)
                place.resident = await self._loaded(settings, place)
                place.config = self._places.setdefault(name, place).config = settings
            assert place.resident is not None, "it was there, or has been loaded"
            fresh, place.closed = place.resident, False
            await self._make_room(place)
        going = [old] if old and old is not fresh else []
        del old
        await self._gone(going)
        return fresh.model

    async def _close(self, place: _Place) -> None:
        async with self._one_at_a_time:  # what is being loaded may be this one
            going = [place.resident] if place.resident else []
            place.resident, place.closed = None, True
        await self._gone(going)

    def _settings(self, name: str) -> ModelConfig:
        """As the configuration file has them now."""
        given = {settings.name: settings for settings in self._config.models_now()}
        if name not in given:
            raise _unknown(name, given)
        return given[name]

    # ---- loading and making room -------------------------------------------------------------------------------------

    @property
    def _most(self) -> float:
        return self._config.max_model_bytes or float("inf")

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise _unknown(name, self._places)
        return self._places[name]

    async def _load_once(self, place: _Place) -> _Resident:
        """Loads it; all who wait for it wait for the same load, which goes on if they do not."""
        if place.task is None:
            place.task = asyncio.create_task(self._load(place))
            place.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # somebody has seen it
        return await asyncio.shield(place.task)

    async def _load(self, place: _Place) -> _Resident:
        try:
            async with self._one_at_a_time:
                if place.resident is None:  # an operator may have been faster
                    await self._make_room(place)
                    place.resident = await self._loaded(place.config, place)
                    await self._make_room(place)  # by now its size is known
                return place.resident
        finally:
            place.task = None

    async def _loaded(self, settings: ModelConfig, place: _Place) -> _Resident:
        """Raises ConfigError for what cannot be loaded, and OutOfMemory."""
        model = await self._read(settings)
        resident = await self._warm(settings, model, place.waiting)
        place.weight_bytes, place.waiting = model.weight_bytes, _Users()
        return resident

    async def _read(self, settings: ModelConfig) -> Model:
        model = await self._tried(settings, _on_a_thread(lambda: load(settings, self._device)))
        if model.weight_bytes > self._most:
            raise ConfigError(
                f"max_model_bytes: {settings.name} alone has {model.weight_bytes} bytes of weights, "
                f"{self._config.max_model_bytes} are allowed"
            )
        return model

    async def _warm(self, settings: ModelConfig, model: Model, users: _Users) -> _Resident:
        async def warm() -> None:
            for each in model.precisions.values():
                await asyncio.wrap_future(self._engine.between(warm_up_steps(each, settings.batch_size)))

        await self._tried(settings, warm())
        self.loads[settings.name].done += 1
        for each in model.precisions.values():
            log.info(
                "loaded",
                model=settings.name,
                precision=each.precision,
                digest=each.digest,
                device=self._device.type,
                batch_sizes=each.batch_sizes,
            )
        return _Resident(model, model.weight_bytes, users)

    async def _tried(self, settings: ModelConfig, work: Coroutine[Any, Any, T]) -> T:
        """What comes of the work, which is counted. Raises ConfigError or CamserveError."""
        loads, started = self.loads.setdefault(settings.name, Loads()), time.monotonic()
        try:
            return await work
        except Exception as error:
            loads.failed += 1
            if isinstance(error, torch.OutOfMemoryError):
                error = OutOfMemory(f"{settings.name} does not fit into the device's memory")
            elif not isinstance(error, (CamserveError, ConfigError)):
                log.exception("a model breaks", model=settings.name)
                error = ConfigError(f"models.{settings.name}: {type(error).__name__}: {error}")
            log.error("cannot be loaded", model=settings.name, reason=str(error))
            raise error from None
        finally:
            loads.seconds += time.monotonic() - started

    def _weight_bytes(self) -> int:
        return sum(place.resident.weight_bytes for place in self._places.values() if place.resident)

    async def _make_room(self, place: _Place) -> None:
        """Takes down the least recently used of the others, idle ones first, until it fits."""
        others = [each for each in self._places.values() if each.resident and each is not place]
        others.sort(key=lambda each: (len(each.resident.users) > 0, each.resident.used_at) if each.resident else ())
        needed = 0 if place.resident else place.weight_bytes
        going = list[_Resident]()
        for other in others:
            if self._weight_bytes() + needed <= self._most or other.resident is None:
                break
            going.append(other.resident)
            other.resident = None
        await self._gone(going)

    async def _gone(self, going: list[_Resident]) -> None:
        """Waits until nobody uses them, and empties the list: with that, their weights are free."""
        if not going:
            return
        while going:
            await going[-1].users.gone()
            model = going.pop().model
            log.info("unloaded", model=model.name, digest=model.digest)
            del model
        if self._device.type == "cuda":
            await asyncio.wrap_future(self._engine.between(_empty_cache()))


def _empty_cache() -> Iterator[None]:
    """On the engine's thread: it must not come while a graph is recorded."""
    torch.cuda.empty_cache()
    yield


def _unknown(name: str, known: dict[str, Any]) -> CamserveError:
    if not name:
        return InvalidArgument("name the model", field="model")
    names = ", ".join(known)
    return NotFound(f"there is no model {name!r}; there are: {names}", field="model", metadata={"known": names})


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result; whoever gives up waiting for it does not cancel it."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return await asyncio.shield(task)


async def _on_a_thread(work: Callable[[], T]) -> T:
    """Runs it on a thread that ends with it, and its OpenMP team too: see device/. The process does not wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await done
