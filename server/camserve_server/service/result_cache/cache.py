"""The result cache of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from camserve_server.config import CacheConfig
from camserve_server.engine.job import Job
from camserve_server.models.model import LaneKind
from camserve_server.pool_entries import Lease
from camserve_server.service.codec import CodecThreads
from camserve_server.service.requests import ParsedRequest
from camserve_server.service.result_cache.key import Keys, Request
from camserve_server.service.result_cache.memory import MemoryStore
from camserve_server.service.result_cache.redis_store import RedisStore

# The first byte of a stored value. The maps of networks with random weights are results that a stream sends beside its
# response. Progress and levels are not, so a stored response can replace a stream that has them.
_ALONE, _WITH_EVENTS = b"\0", b"\1"


class ResultCache:
    """Stores responses by the keys of their requests. All methods belong to the event loop.

    Args:
        config: The table of the cache.
        keys: Computes the keys.
        codec: Its threads compute the keys and digests, which takes milliseconds for large messages.
        certificates: Callers have certificates. One whose certificate has no name, and who has no token, then stores
            responses only if all callers share them.

    Attributes:
        memory: The responses in the memory of this process.
        redis: The responses in Redis; None if there is none.
        hits: The number of responses that were found, by store.
        misses: The number of responses that were not found.

    Raises:
        ConfigError: The URL of Redis is invalid, or the package redis is missing.
    """

    def __init__(self, config: CacheConfig, keys: Keys, codec: CodecThreads, *, certificates: bool) -> None:
        self.memory = MemoryStore(config.max_bytes)
        self.redis = RedisStore(config.redis_url, codec) if config.redis_url else None
        self.hits = {"memory": 0} | ({"redis": 0} if self.redis else {})
        self.misses = 0
        self._config = config
        self._needs_owner = certificates and not config.shared
        self._keys = keys
        self._codec = codec

    async def look_up(
        self,
        request: Request,
        parsed: ParsedRequest,
        lease: Lease,
        kind: type[Message],
        owner: Sequence[str],
        *,
        randomised: bool,
    ) -> Entry | None:
        """Return the entry of a request.

        A request that names batch sizes has none: it is the replay of a receipt, which must be computed. Neither have
        requests for remote models, whose weights are not known, and those of callers whose certificate has no name.

        Args:
            request: The message of the caller.
            parsed: Its checked fields.
            lease: Its model.
            kind: The message that is stored.
            owner: What identifies the caller.
            randomised: The caller wants the maps of networks with random weights, too, which are not stored.
        """
        if request.batch_sizes or lease.model.remote or (self._needs_owner and not any(owner)):
            return None
        sizes = {**parsed.model.batch_sizes}
        caller = () if self._config.shared else owner
        key = await self._codec.run(
            self._keys.key, request, parsed, lease.settings, sizes, kind.DESCRIPTOR.full_name, caller
        )
        return Entry(self, key, await self._get(key, randomised=randomised), sizes)

    async def _get(self, key: bytes, *, randomised: bool) -> bytes | None:
        store, value = "memory", self.memory.get(key)
        if value is None and self.redis is not None and (found := await self.redis.get(key)) is not None:
            store, value = "redis", found.value
            self.memory.put(key, *found)
        if value is None or (randomised and value[:1] == _WITH_EVENTS):
            self.misses += 1
            return None
        self.hits[store] += 1
        return value[1:]

    def put(self, key: bytes, value: bytes, *, randomised: bool) -> None:
        """Store a response.

        Args:
            key: The key of its request.
            value: The serialised message.
            randomised: The plan has made maps of networks with random weights before the response.
        """
        value = (_WITH_EVENTS if randomised else _ALONE) + value
        self.memory.put(key, value, self._config.ttl_s)
        if self.redis is not None:
            self.redis.put(key, value, self._config.ttl_s)

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self.redis is not None:
            await self.redis.close()


@dataclass(frozen=True)
class Entry:
    """The place of one response in the cache.

    Attributes:
        cache: The cache.
        key: The key of the request.
        value: The stored response, serialised; None if there is none.
        batch_sizes: The batch sizes with which the response is computed.
    """

    cache: ResultCache
    key: bytes
    value: bytes | None
    batch_sizes: Mapping[LaneKind, int]

    def accepts(self, job: Job[Any]) -> bool:
        """Return True if a response depends on nothing that the key does not contain.

        The deadline of the request, or a lack of memory, may have changed it.

        Args:
            job: The finished job of the request.
        """
        return not job.late and job.batch_sizes == self.batch_sizes

    def store(self, value: bytes, *, randomised: bool) -> None:
        """Store the response. The arguments are those of `ResultCache.put`."""
        self.cache.put(self.key, value, randomised=randomised)
