"""The result cache in a real Redis or Valkey: servers that share it, its faults, and what it contains."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve_server.config import CacheConfig, Config, TokenConfig
from camserve_server.errors import ConfigError
from camserve_server.service.result_cache import redis_store
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.credentials import hashed
from tests.e2e.engines import wait_until
from tests.e2e.test_result_cache import SETTINGS, values, without_names
from tests.processes import LIMIT_S, free_port, started
from tests.server.service.frontends.test_calls import bearer, differing
from tests.server.service.test_errors import IMAGE, TIMEOUT_S, method, request

redis = pytest.importorskip("redis")
# Debian has redis-server, and valkey-server in versions after 12. The tests use both if both are installed.
PROGRAMS = [name for name in ("redis-server", "valkey-server") if shutil.which(name)]
pytestmark = pytest.mark.skipif(not PROGRAMS, reason="redis-server is not installed")

PASSWORD = "a password"
USER_PART = ":a%20password@"


class Redis:
    """A server on a Unix socket in a folder of its own and, if a port is given, on 127.0.0.1. It has no files."""

    def __init__(self, program: str, folder: Path, port: int = 0) -> None:
        self.program = program
        self.path = folder / "redis.sock"
        self.port = port
        self.url = f"redis://{USER_PART}127.0.0.1:{port}/0" if port else f"unix://{USER_PART}{self.path}"
        self.client = redis.Redis(unix_socket_path=str(self.path), password=PASSWORD)

    @contextmanager
    def running(self) -> Iterator[None]:
        command = [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.path)]
        command += ["--save", "", "--appendonly", "no", "--requirepass", PASSWORD, "--dir", str(self.path.parent)]
        with started(command) as process:
            until = time.monotonic() + LIMIT_S
            while True:
                with contextlib.suppress(redis.ConnectionError):
                    if self.client.ping():
                        break
                assert process.poll() is None, f"{self.program} has ended"
                assert time.monotonic() < until
                time.sleep(0.02)
            yield
            self.client.close()

    def values(self) -> dict[bytes, bytes]:
        return {key: self.client.get(key) for key in self.client.scan_iter()}


@pytest.fixture(params=PROGRAMS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Redis]:
    server = Redis(request.param, tmp_path)
    with server.running():
        yield server


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is not too slow on a busy machine, and is asked again at once after an error."""
    monkeypatch.setattr(redis_store, "READ_TIMEOUT_S", float(LIMIT_S))
    monkeypatch.setattr(redis_store, "WRITE_TIMEOUT_S", float(LIMIT_S))
    monkeypatch.setattr(redis_store, "PAUSE_S", 0.0)


@contextmanager
def stub_of(server: Server) -> Iterator[ExplainServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield ExplainServiceStub(channel)


@contextmanager
def cached_by(url: str, **changes: Any) -> Iterator[tuple[Server, Callable[..., pb.ExplainResponse]]]:
    """Run a server with this Redis; yield it, and a function that explains the image."""
    settings = SETTINGS | {"cache": CacheConfig(**{"max_bytes": 0, "redis_url": url} | changes.pop("cache", {}))}
    with serving(Config(**settings | changes)) as server, stub_of(server) as stub:

        def explain(secret: str = "", **fields: Any) -> pb.ExplainResponse:
            metadata = bearer(secret) if secret else ()
            response: pb.ExplainResponse = stub.Explain(request(**fields), metadata=metadata, timeout=TIMEOUT_S)
            return response

        yield server, explain


def test_servers_share_responses(stored: Redis) -> None:
    with cached_by(stored.url) as (_, explain):
        first = explain(request_id="first")
        assert not first.cost.cached
        wait_until(stored.values)
    with cached_by(stored.url, cache={"max_bytes": 1 << 20}) as (server, explain):
        second, third = explain(request_id="second"), explain(request_id="third")
        assert second.cost.cached
        assert third.cost.cached
        assert (second.request_id, third.receipt.request_id) == ("second", "third")
        assert differing([without_names(first)], [without_names(second)]) == []
        assert differing([without_names(first)], [without_names(third)]) == []
        hits = server._servicer.cache.hits  # type: ignore[union-attr]  # the server has a cache
        assert hits == {"memory": 1, "redis": 1}, "the first response is then in memory, too"
        assert not explain(method=method("hires-cam")).cost.cached


@pytest.mark.parametrize("program", PROGRAMS)
def test_servers_share_responses_over_tcp(program: str, tmp_path: Path) -> None:
    stored = Redis(program, tmp_path, free_port())
    with stored.running():
        for cached in (False, True):
            with cached_by(stored.url) as (_, explain):
                assert explain().cost.cached is cached
                wait_until(stored.values)


@pytest.mark.slow
def test_servers_with_front_ends_share_responses(stored: Redis) -> None:
    with cached_by(stored.url, frontends=2) as (_, explain):
        first = explain()
        wait_until(stored.values)
    with cached_by(stored.url, frontends=2) as (_, explain):
        second = explain()
    assert (first.cost.cached, second.cost.cached) == (False, True)
    assert differing([without_names(first)], [without_names(second)]) == []


@pytest.mark.parametrize("shared", [False, True])
def test_callers_share_responses_only_if_configured(stored: Redis, shared: bool) -> None:
    tokens = [TokenConfig(name="anna", sha256=hashed("a")), TokenConfig(name="ben", sha256=hashed("b"))]
    with cached_by(stored.url, tokens=tokens) as (_, explain):
        explain("a")
        wait_until(stored.values)
    with cached_by(stored.url, tokens=tokens, cache={"shared": shared}) as (_, explain):
        assert explain("a").cost.cached is not shared, "entries of one caller are not entries of all callers"
        wait_until(lambda: len(stored.values()) == 1 + shared)
        assert explain("b").cost.cached is shared
    renamed = [TokenConfig(name="anna", sha256=hashed("c"))]  # another token with the same name
    with cached_by(stored.url, tokens=renamed) as (_, explain):
        assert not explain("c").cost.cached


def test_keys_are_hashes_that_expire(stored: Redis) -> None:
    with cached_by(stored.url, cache={"ttl_s": 1000.0}) as (_, explain):
        explain()
        wait_until(stored.values)
    [(key, value)] = stored.values().items()
    prefix, _, digest = key.decode().partition(":")
    assert prefix == "camserve"
    assert len(bytes.fromhex(digest)) == 32
    assert 0 < stored.client.ttl(key) <= 1000
    assert IMAGE.tobytes()[:300] not in value


def replace_value(stored: Redis, key: bytes, value: bytes) -> None:
    stored.client.set(key, value, keepttl=True)


@pytest.mark.parametrize(
    "damage",
    [lambda value: value[:-1], lambda value: value[:40] + bytes([value[40] ^ 1]) + value[41:], lambda value: b""],
    ids=["shorter", "changed", "empty"],
)
def test_damaged_values_are_computed_again(stored: Redis, damage: Callable[[bytes], bytes]) -> None:
    with cached_by(stored.url) as (server, explain):
        first = explain()
        wait_until(stored.values)
        [(key, value)] = stored.values().items()
        replace_value(stored, key, damage(value))
        second = explain()
        assert not second.cost.cached
        assert second.receipt.map_digests == first.receipt.map_digests
        assert values(server)["camserve_cache_redis_errors_total"] == 1
        wait_until(lambda: stored.client.get(key) != damage(value))
        assert explain().cost.cached


def test_value_of_another_key_is_not_used(stored: Redis) -> None:
    with cached_by(stored.url) as (_, explain):
        explain()
        explain(method=method("hires-cam"))
        wait_until(lambda: len(stored.values()) == 2)
        (one, value), (other, _) = stored.values().items()
        replace_value(stored, other, value)
        assert stored.client.get(one) == stored.client.get(other)
        cached = [explain(method=method(name)).cost.cached for name in ("grad-cam", "hires-cam")]
        assert sorted(cached) == [False, True]


def test_server_works_without_redis_and_uses_it_again(
    stored: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "LOG_EVERY_S", 3600.0)  # longer than the test takes
    folder = tmp_path / "other"
    folder.mkdir()
    other = Redis(stored.program, folder)
    structlog.contextvars.clear_contextvars()
    with structlog.testing.capture_logs() as logs, cached_by(other.url) as (server, explain):
        first, second = explain(), explain()
        assert not first.cost.cached
        assert not second.cost.cached
        assert first.receipt.map_digests == second.receipt.map_digests
        assert values(server)["camserve_cache_redis_errors_total"] >= 2
        with other.running():
            explain()
            wait_until(other.values)
            assert explain().cost.cached
        assert not explain().cost.cached, "Redis has ended"
        with other.running():
            explain()
            wait_until(other.values)
            assert explain().cost.cached
    lines = [each for each in logs if "Redis" in each["event"]]
    assert len(lines) == 1, "an error is logged at most once in this time"
    assert "password" not in str(logs)
    assert stored.values() == {}


def test_redis_that_refuses_to_store_is_still_read(stored: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "PAUSE_S", float(LIMIT_S))
    with cached_by(stored.url) as (server, explain):
        assert not explain(budget=101).cost.cached
        wait_until(lambda: len(stored.values()) == 1)
        stored.client.config_set("maxmemory", 1)  # the policy noeviction, which is the default, refuses all writes
        assert not explain(budget=102).cost.cached
        wait_until(lambda: values(server)["camserve_cache_redis_errors_total"] == 1)
        assert not explain(budget=103).cost.cached, "no writes are tried for some time"
        assert explain(budget=101).cost.cached
        assert values(server)["camserve_cache_redis_errors_total"] == 1


def test_value_of_another_type_does_not_pause_redis(stored: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "PAUSE_S", float(LIMIT_S))
    with cached_by(stored.url) as (server, explain):
        assert not explain().cost.cached
        wait_until(lambda: len(stored.values()) == 1)
        [key] = stored.values()
        stored.client.delete(key)
        stored.client.lpush(key, "foreign")
        assert not explain().cost.cached
        assert values(server)["camserve_cache_redis_errors_total"] == 1
        wait_until(lambda: stored.client.type(key) == b"string")
        assert explain().cost.cached


def test_slow_redis_delays_a_request_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis accepts connections and does not answer. After the first error, the server does not ask it for a while."""
    monkeypatch.setattr(redis_store, "READ_TIMEOUT_S", 0.05)
    monkeypatch.setattr(redis_store, "PAUSE_S", 3600.0)
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with cached_by(f"unix://{path}") as (server, explain):
            for _ in range(3):
                assert not explain().cost.cached
            assert values(server)["camserve_cache_redis_errors_total"] == 1


def test_refused_password_is_an_error_of_redis(stored: Redis) -> None:
    with structlog.testing.capture_logs() as logs, cached_by(f"unix://:wrong@{stored.path}") as (server, explain):
        assert not explain().cost.cached
        assert values(server)["camserve_cache_redis_errors_total"] >= 1
    assert "wrong@" not in str(logs)


def test_log_does_not_quote_errors_of_redis(tmp_path: Path) -> None:
    """Some servers and proxies quote the command that they do not know, which may contain the password."""

    def quote(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                lines = data.replace(b"\r\n", b" ")
                connection.sendall(b"-ERR unknown command " + lines + b"\r\n")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "quoting.sock"))
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=quote, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        url = f"unix://{USER_PART}{tmp_path}/quoting.sock"
        with structlog.testing.capture_logs() as logs, cached_by(url) as (server, explain):
            assert not explain().cost.cached
            assert values(server)["camserve_cache_redis_errors_total"] >= 1
        listener.shutdown(socket.SHUT_RDWR)
    assert any(line["event"] == "result cache does without Redis" for line in logs)
    assert PASSWORD not in str(logs)
    assert PASSWORD.split()[1] not in str(logs)


@pytest.mark.parametrize(
    "option",
    [
        "db=secret",
        "frobnicate=secret",
        "retry=secret",
        "parser_class=secret",
        "protocol=9",
        "decode_responses=secret",
        "decode_responses=1&encoding=latin-1",
    ],
)
def test_invalid_option_of_the_url_stops_the_server(option: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"^cache\.redis_url: an option after \? is invalid") as caught,
        serving(Config(**SETTINGS | {"cache": CacheConfig(redis_url=f"redis://:secret@localhost?{option}")})),
    ):
        pass
    assert "secret" not in str(caught.value)


def test_missing_package_stops_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis.asyncio", None)
    with (
        pytest.raises(ConfigError, match=r"install camserve\[redis\]"),
        serving(Config(**SETTINGS | {"cache": CacheConfig(redis_url="redis://localhost")})),
    ):
        pass
