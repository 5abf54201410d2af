"""The table [cache] of the configuration, whose URL can contain a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from camserve_server.config import CacheConfig, read_config
from camserve_server.config_check import check_config
from camserve_server.errors import ConfigError


def read(tmp_path: Path, text: str) -> CacheConfig | None:
    path = tmp_path / "camserve.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path).cache


def test_cache_is_off_without_the_table(tmp_path: Path) -> None:
    assert read(tmp_path, "") is None
    assert read(tmp_path, "[cache]") == CacheConfig()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("max_bytes = 0", "cache: max_bytes: a cache of 0 bytes stores nothing"),
        ("max_bytes = -1", "cache.max_bytes: "),
        ("ttl_s = 0.5", "cache.ttl_s: "),
        ("ttl_s = inf", "cache.ttl_s: "),  # Redis would refuse to store any response
        ("size = 7", "cache.size: "),
        ('redis_url = "http://:secret@localhost"', "cache.redis_url: the URL is invalid"),
        ('redis_url = "secret"', "cache.redis_url: the URL is invalid"),
        ('redis_url = "redis://"', "cache.redis_url: the URL is invalid"),
        ('redis_url = "redis://:se/cret@localhost"', "cache.redis_url: the URL is invalid"),
        ('redis_url = "redis://:secret@localhost:secret"', "cache.redis_url: the URL is invalid"),
        ('redis_url = "redis://:secret@localhost:99999"', "cache.redis_url: the URL is invalid"),
        ('redis_url = "redis://[:secret"', "cache.redis_url: the URL is invalid"),
        ('redis_url = "unix://:secret@"', "cache.redis_url: the URL is invalid"),
    ],
)
def test_errors_name_the_key_and_not_the_password(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"[cache]\n{table}")
    assert str(caught.value).startswith(message)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://:pass%2Fword@localhost:6379/1",
        "rediss://user:password@redis.internal?ssl_ca_certs=/etc/ca.pem",
        "unix:///run/redis/redis.sock?db=1",
        "unix://:password@/run/redis/redis.sock",
    ],
)
def test_urls_are_accepted(tmp_path: Path, url: str) -> None:
    cache = read(tmp_path, f'[cache]\nmax_bytes = 0\nredis_url = "{url}"')
    assert cache is not None
    assert cache.redis_url == url


def test_password_can_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSERVE_CACHE", '{"redis_url": "redis://:secret@localhost"}')
    cache = read(tmp_path, "[cache]\nmax_bytes = 1000\nshared = true")
    assert cache == CacheConfig(max_bytes=1000, shared=True, redis_url="redis://:secret@localhost")
    assert read(tmp_path, "") == CacheConfig(redis_url="redis://:secret@localhost")
    monkeypatch.setenv("CAMSERVE_CACHE", '{"redis_url": "http://:secret@localhost"}')
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "")
    assert "secret" not in str(caught.value)


def test_check_shows_no_password(tmp_path: Path) -> None:
    path = tmp_path / "camserve.toml"
    path.write_text('[cache]\nmax_bytes = 1000\nredis_url = "redis://:secret@localhost"', encoding="utf-8")
    shown, errors = check_config(path)
    assert not errors
    assert {("cache.max_bytes", "1000"), ("cache.redis_url", "set"), ("cache.ttl_s", "86400.0")} <= {*shown}
    assert "secret" not in str(shown) + repr(read_config(path))
