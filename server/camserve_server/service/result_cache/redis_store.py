"""Responses in Redis or Valkey, which several servers share.

A server never fails because of Redis: an error or a timeout is a miss, and the server then does without Redis for some
seconds, so that a slow Redis does not delay all requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any, NamedTuple

import structlog

from camserve_server.errors import ConfigError
from camserve_server.service.codec import CodecThreads

READ_TIMEOUT_S, WRITE_TIMEOUT_S = 0.5, 5.0
PAUSE_S = 5.0  # after an error
LOG_EVERY_S = 60.0
# A server writes responses faster than a slow Redis takes them. More than these are dropped, because they need memory.
MAX_WRITES = 32
CLOSE_S = 1.0  # for writes at the end of the server
_PREFIX = "camserve:"
_DIGEST_BYTES = hashlib.sha256().digest_size

log = structlog.get_logger()


class Found(NamedTuple):
    """A value, and the seconds until it expires."""

    value: bytes
    ttl_s: float


class RedisStore:
    """Values in Redis, each with a digest, so that damaged ones are not used. All methods belong to the event loop.

    Args:
        url: The address of Redis. It can contain a password.
        codec: Its threads compute digests.

    Attributes:
        errors: The number of failed reads and writes, and of damaged values.

    Raises:
        ConfigError: The URL is invalid, or the package redis is missing.
    """

    def __init__(self, url: str, codec: CodecThreads) -> None:
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import ResponseError
        except ImportError as error:
            raise ConfigError(
                "cache.redis_url: the package redis is missing; install camserve[redis], or remove the key"
            ) from error
        self.errors = 0
        self._refusal = ResponseError
        self._codec = codec
        # On the clock of `time.monotonic()`.
        self._paused_until = self._writes_paused_until = self._logged = float("-inf")
        self._unlogged = 0
        self._writes: set[asyncio.Task[None]] = set()
        wrong_option = ConfigError(
            "cache.redis_url: an option after ? is invalid; expected options of redis-py, such as ssl_ca_certs=FILE, "
            "but none that decodes values"
        )
        try:
            # One retry, because Redis may have closed an idle connection. It does not wait.
            self._redis: Any = Redis.from_url(
                url,
                socket_timeout=WRITE_TIMEOUT_S,
                socket_connect_timeout=READ_TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),
                protocol=2,  # of all versions of Redis
            )
            # redis-py checks most options when it makes its first connection. This one is not opened.
            pool = self._redis.connection_pool
            decodes = pool.connection_class(**pool.connection_kwargs).encoder.decode_responses
        except Exception:  # of many kinds; the message can contain parts of the URL
            raise wrong_option from None
        if decodes:
            raise wrong_option

    async def get(self, key: bytes) -> Found | None:
        """Return the value of a key; None if there is none, or if Redis fails."""
        if time.monotonic() < self._paused_until:
            return None
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                pipeline = self._redis.pipeline(transaction=False)
                pipeline.get(_name(key))
                pipeline.pttl(_name(key))
                sealed, left_ms = await pipeline.execute()
            if sealed is None or left_ms <= 0:
                return None
        except Exception as error:
            # A refusal, such as of a value that is no string, took no time and says nothing about other keys.
            self._failed(error, pause=not isinstance(error, self._refusal))
            return None
        value = await self._codec.run(_unsealed, key, sealed)
        if value is None:
            self._count("a stored response is damaged")
            return None
        return Found(value, left_ms / 1e3)

    def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Store a value in the background.

        Args:
            key: The key.
            value: The value.
            ttl_s: The seconds after which it expires.
        """
        now = time.monotonic()
        if now >= self._paused_until and now >= self._writes_paused_until and len(self._writes) < MAX_WRITES:
            task = asyncio.create_task(self._write(key, value, ttl_s))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        """Finish the running writes, as far as they take no time, and close the connections."""
        if self._writes:
            _, late = await asyncio.wait(self._writes, timeout=CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._redis.aclose()

    async def _write(self, key: bytes, value: bytes, ttl_s: float) -> None:
        try:
            sealed = await self._codec.run(_sealed, key, value)
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._redis.set(_name(key), sealed, px=max(1, round(1e3 * ttl_s)))
        except Exception as error:
            refused = isinstance(error, self._refusal)  # Redis is full, or read-only: it can still be read
            if refused:
                self._writes_paused_until = time.monotonic() + PAUSE_S
            self._failed(error, pause=not refused)

    def _failed(self, error: Exception, *, pause: bool) -> None:
        if pause:
            self._paused_until = time.monotonic() + PAUSE_S
        self._count(type(error).__name__)  # The text can quote the command that failed, which may have the password.

    def _count(self, reason: str) -> None:
        """Count an error, and log it unless another one has been logged just before."""
        self.errors += 1
        self._unlogged += 1
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            log.warning("result cache does without Redis", reason=reason, errors=self._unlogged)
            self._logged, self._unlogged = now, 0


def _name(key: bytes) -> str:
    return f"{_PREFIX}{key.hex()}"


def _sealed(key: bytes, value: bytes) -> bytes:
    """Return a value behind a digest of itself and its key."""
    return hashlib.sha256(key + value).digest() + value


def _unsealed(key: bytes, sealed: bytes) -> bytes | None:
    """Return the value; None unless it is the one that was stored with this key."""
    digest, value = sealed[:_DIGEST_BYTES], sealed[_DIGEST_BYTES:]
    return value if hashlib.sha256(key + value).digest() == digest else None
