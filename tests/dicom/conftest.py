"""What tests of the gateway share."""

from __future__ import annotations

import gc
import logging
import warnings
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


@pytest.fixture
def broken_associations() -> Iterator[None]:
    """Tests may break associations: of what pynetdicom says of them, and leaves of them, nothing comes after the test.

    It leaves the socket of a connection that is refused to the garbage collector.
    """
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
