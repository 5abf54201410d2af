"""Models of the pool in memory, their users and leases, and counters of loads. All methods run on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from camserve_server.config import ModelConfig
from camserve_server.engine.engine import Engine
from camserve_server.errors import Unavailable
from camserve_server.models.model import Model

State = Literal["ready", "waiting", "unloaded"]


@dataclass
class Loads:
    """Counters of the loads of one model.

    Attributes:
        done: The successful loads.
        failed: The failed loads.
        seconds: The time that all loads took, with warm-up.
    """

    done: int = 0
    failed: int = 0
    seconds: float = 0.0


class ModelUsers:
    """The requests that use a model or wait for it."""

    def __init__(self) -> None:
        self._users: set[object] = set()
        self._one_left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._users)

    def join(self) -> Callable[[], None]:
        """Add a user. The returned function removes it; further calls of the function have no effect."""
        user = object()
        self._users.add(user)

        def leave() -> None:
            self._users.discard(user)
            self._one_left.set()

        return leave

    async def all_left(self) -> None:
        """Wait until there are no users."""
        while self._users:
            self._one_left.clear()
            await self._one_left.wait()


@dataclass(frozen=True, eq=False)
class Replica:
    """A copy of a model on one device, and the engine of the device."""

    model: Model
    engine: Engine


@dataclass(eq=False)
class LoadedModel:
    """A model in memory, with a replica on each device, and the settings with which it was loaded.

    `used_at` numbers the latest lease, in the order of all leases.
    """

    replicas: Sequence[Replica]
    settings: ModelConfig
    weight_bytes: int
    users: ModelUsers
    used_at: int = 0

    @property
    def model(self) -> Model:
        """The model on its first device."""
        return self.replicas[0].model


@dataclass(frozen=True, eq=False)
class Lease:
    """A model that stays loaded until the lease is released.

    Attributes:
        replicas: The model on each device, with the engine that runs the plans of requests there.
        settings: The configuration with which the model was loaded.
        release: Ends the lease; further calls have no effect.
    """

    replicas: Sequence[Replica]
    settings: ModelConfig
    release: Callable[[], None]

    @property
    def model(self) -> Model:
        """The model on its first device, for everything that does not depend on the device."""
        return self.replicas[0].model

    def least_busy(self) -> Replica:
        """Return the replica on the working device that owes the fewest rows, the first one of equal ones.

        Reserve the rows of a request before the event loop runs other tasks, which would choose the same device.

        Raises:
            Unavailable: No device of the model works any more, or the server shuts down.
        """
        if len(self.replicas) == 1:  # the engine itself refuses requests if it does not work
            return self.replicas[0]
        working = [each for each in self.replicas if each.engine.working]
        if not working:
            names = ", ".join(each.engine.device for each in self.replicas)
            raise Unavailable(
                f"the devices of {self.model.name} ({names}) have failed, or the server is shutting down; "
                "try another server",
                retry_after_s=1.0,
            )
        return min(working, key=lambda each: each.engine.rows_owed())


@dataclass(eq=False)
class ModelEntry:
    """A configured model. Requests cannot load it while it is `closed` by an operator."""

    config: ModelConfig
    loaded: LoadedModel | None = None
    closed: bool = False
    loading: asyncio.Task[LoadedModel] | None = None
    waiting: ModelUsers = field(default_factory=ModelUsers)  # they become the users of the model that is being loaded
    weight_bytes: int = 0  # of the most recent load

    @property
    def state(self) -> State:
        """The state of the model, as operators see it."""
        if self.closed:
            return "unloaded"
        return "ready" if self.loaded else "waiting"
