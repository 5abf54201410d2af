"""What tests of the gateway share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from camserve_server.config import Config, ModelConfig
from camserve_server.service.server import Server
from tests.conftest import serving


@pytest.fixture(scope="session")
def tiny() -> Iterator[Server]:
    """A server of one quick model with random weights."""
    model = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    with serving(Config(listen="127.0.0.1:0", models=[model])) as running:
        yield running


@pytest.fixture(autouse=True)
def quiet() -> None:
    """What pynetdicom says of associations that tests break is of no interest."""
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
