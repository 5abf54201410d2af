"""The result cache of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from camserve_server.config import CacheConfig
from camserve_server.engine.job import Job
from camserve_server.model_pool import Lease
from camserve_server.models.model import LaneKind
from camserve_server.service.codec import CodecThreads
from camserve_server.service.requests import ParsedRequest
from camserve_server.service.result_cache.key import Keys, Request
from camserve_server.service.result_cache.memory import MemoryStore
from camserve_server.service.result_cache.redis_store import RedisStore


class ResultCache:
    """Stores responses by the keys of their requests. All methods belong to the event loop.

    Args:
        config: The table of the cache.
        keys: Computes the keys.
        codec: Its threads compute the keys and digests, which takes milliseconds for large messages.

    Attributes:
        memory: The responses in the memory of this process.
        redis: The responses in Redis; None if there is none.
        hits: The number of responses that were found, by store.
        misses: The number of responses that were not found.

    Raises:
        ConfigError: The URL of Redis is invalid, or the package redis is missing.
    """

    def __init__(self, config: CacheConfig, keys: Keys, codec: CodecThreads) -> None:
        self.memory = MemoryStore(config.max_bytes)
        self.redis = RedisStore(config.redis_url, codec) if config.redis_url else None
        self.hits = {"memory": 0} | ({"redis": 0} if self.redis else {})
        self.misses = 0
        self._config = config
        self._keys = keys
        self._codec = codec

    async def look_up(
        self,
        request: Request,
        parsed: ParsedRequest,
        lease: Lease,
        kind: type[Message],
        owner: Sequence[str],
    ) -> Entry | None:
        """Return the entry of a request.

        A request that names batch sizes has none: it is the replay of a receipt, which must be computed. Neither have
        requests for remote models, because their weights are not known.

        Args:
            request: The message of the caller.
            parsed: Its checked fields.
            lease: Its model.
            kind: The message that is stored.
            owner: What identifies the caller.
        """
        if request.batch_sizes or lease.model.remote:
            return None
        sizes = {**parsed.model.batch_sizes}
        caller = () if self._config.shared else owner
        key = await self._codec.run(
            self._keys.key, request, parsed, lease.settings, sizes, kind.DESCRIPTOR.full_name, caller
        )
        return Entry(self, key, await self._get(key), sizes)

    async def _get(self, key: bytes) -> bytes | None:
        value = self.memory.get(key)
        if value is not None:
            self.hits["memory"] += 1
            return value
        if self.redis is not None and (found := await self.redis.get(key)) is not None:
            self.hits["redis"] += 1
            self.memory.put(key, *found)
            return found.value
        self.misses += 1
        return None

    def put(self, key: bytes, value: bytes) -> None:
        """Store a response."""
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

    def store(self, value: bytes) -> None:
        """Store the serialised response."""
        self.cache.put(self.key, value)
