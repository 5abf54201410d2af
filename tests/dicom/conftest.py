"""What tests of DICOM share: callers of the client's tests, a PACS, and a gateway to it."""

from __future__ import annotations

import gc
import logging
import socketserver
import warnings
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from camserve_dicom.gateway import steps, workers
from camserve_server.config import Config, ModelConfig
from camserve_server.service.server import Server
from tests.client.fake_server import address, client, servicer
from tests.conftest import serving
from tests.dicom.gateways import Opened, config, opened
from tests.dicom.pacs import Pacs, listening

__all__ = ["address", "client", "servicer"]


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


@pytest.fixture(autouse=True)
def no_idle_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners end at once, instead of within half a second; what failed is soon tried again."""
    monkeypatch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (0.01,))
    monkeypatch.setattr(workers, "FIRST_RETRY_S", 0.1)


@pytest.fixture
def no_answers_in_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a PACS that answers storage commitments in associations of its own, or not at all."""
    monkeypatch.setattr(steps, "REPORT_WAIT_S", 0.02)


@pytest.fixture
def log() -> Iterator[list[MutableMapping[str, Any]]]:
    """Lines of the gateway's log during the test."""
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    with listening() as pacs:
        yield pacs


@pytest.fixture
def gateway(tmp_path: Path, tiny: Server, pacs: Pacs) -> Opened:
    """Opens a gateway between the server and the PACS."""
    return lambda **given: opened(config(tmp_path, tiny, pacs, **given))
