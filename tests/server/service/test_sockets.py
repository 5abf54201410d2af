"""Listeners on Unix sockets."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import camserve
from camserve_server.config import Config, ModelConfig, TokenConfig, read_config
from camserve_server.errors import ConfigError
from tests.conftest import serving
from tests.credentials import hashed
from tests.processes import CAMSERVE, completed

IMAGE = np.zeros((8, 8, 3), np.uint8)


def config(listen: Path, **options: Any) -> Config:
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    return Config(**{"listen": f"unix://{listen}", "models": [tiny], **options})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_all_listeners_can_be_sockets(tmp_path: Path) -> None:
    listen, health, admin = (tmp_path / name for name in ("camserve.sock", "health.sock", "admin.sock"))
    options = {"health_listen": f"unix:{health}", "admin_listen": f"unix://{admin}", "socket_mode": "0660"}
    with serving(config(listen, **options)) as server:
        assert (server.address, server.admin_address) == (f"unix://{listen}", f"unix://{admin}")
        assert [mode(path) for path in (listen, health, admin)] == [0o660] * 3
        for address in (f"unix://{listen}", f"unix:{listen}"):
            with camserve.Client(address) as client:
                assert client.explain(IMAGE, method="grad-cam").maps
        with camserve.Admin(f"unix:{admin}") as operator:
            assert operator.reload("tiny").name == "tiny"
        for address in (f"unix://{listen}", f"unix:{health}"):
            assert completed([*CAMSERVE, "health", "--address", address]).stdout == "ready\n"
    assert not listen.exists()


def test_socket_belongs_to_its_user_by_default_and_takes_tokens(tmp_path: Path) -> None:
    listen = tmp_path / "camserve.sock"
    tokens = [TokenConfig(name="caller", sha256=hashed("secret"))]
    with serving(config(listen, tokens=tokens)):
        assert mode(listen) == 0o600
        with camserve.Client(f"unix:{listen}", token="secret") as client:
            assert client.models()
        with camserve.Client(f"unix:{listen}") as client, pytest.raises(camserve.Unauthenticated):
            client.models()


def test_socket_of_another_server_is_not_replaced(tmp_path: Path) -> None:
    listen = tmp_path / "camserve.sock"
    with serving(config(listen)), camserve.Client(f"unix:{listen}") as client:
        with (
            pytest.raises(ConfigError, match=r"^listen: cannot bind .* no other server uses it"),
            serving(config(listen)),
        ):
            pass
        assert client.models()


def test_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    listen = tmp_path / "camserve.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(listen))
        killed.listen()
    with serving(config(listen)), camserve.Client(f"unix:{listen}") as client:
        assert client.models()


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("unix:camserve.sock", "expected unix: and an absolute path"),
        ("unix://camserve.sock", "expected unix: and an absolute path"),
        ("unix:/" + 107 * "a", "at most 107 bytes"),
    ],
)
def test_address_of_a_socket_is_checked(address: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_config(listen=address)


def test_settings_that_sockets_do_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot share a Unix socket"):
        read_config(listen=f"unix:{tmp_path}/camserve.sock", frontends=2)
    with pytest.raises(ConfigError, match="metrics_listen"):
        read_config(metrics_listen=f"unix:{tmp_path}/camserve.sock")
    missing = config(tmp_path / "none" / "camserve.sock")
    with pytest.raises(ConfigError, match=r"^listen: cannot bind .* its folder exists"), serving(missing):
        pass


def test_client_names_a_socket_without_a_server(tmp_path: Path) -> None:
    with (
        camserve.Client(f"unix:{tmp_path}/none.sock", timeout=5) as client,
        pytest.raises(camserve.Unavailable, match=r"none\.sock") as caught,
    ):
        client.models()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
