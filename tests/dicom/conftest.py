"""Fixtures of the tests of camserve_dicom: a fake server, a real server, a PACS and a gateway."""

from __future__ import annotations

import gc
import logging
import socketserver
import threading
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from structlog.testing import capture_logs

from camserve_dicom import explain
from camserve_dicom.gateway import steps, workers
from camserve_server.config import Config, ModelConfig
from camserve_server.service.server import Server
from tests.client.conftest import address, client, servicer
from tests.conftest import serving
from tests.dicom.gateways import OpenGateway, config, opened
from tests.dicom.pacs import Pacs, listening, send
from tests.processes import LIMIT_S

__all__ = ["address", "client", "servicer"]

LogLines = list[MutableMapping[str, Any]]


@pytest.fixture(scope="session")
def tiny() -> Iterator[Server]:
    """Run a server with one small model that has random weights."""
    model = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    with serving(Config(listen="127.0.0.1:0", models=[model])) as running:
        yield running


@pytest.fixture(scope="module")
def broken_associations() -> Iterator[None]:
    """Silence pynetdicom in tests that break associations, and collect what they leave.

    pynetdicom does not close the socket of a refused connection. A later module would report it as a ResourceWarning.
    """
    logger = logging.getLogger("pynetdicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let listeners of socketserver stop within 10 ms instead of 500 ms, and retry failed steps soon.

    The wait for a commitment report is long: it ends with the report, however slow the machine is.
    """
    monkeypatch.setattr(socketserver.BaseServer.serve_forever, "__defaults__", (0.01,))
    monkeypatch.setattr(workers, "FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(workers, "POLL_INTERVAL_S", 0.1)
    monkeypatch.setattr(steps, "REPORT_WAIT_S", LIMIT_S)


@pytest.fixture
def no_report_in_same_association(short_waits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait in the association of a commitment request for a report that comes in another one, or never."""
    monkeypatch.setattr(steps, "REPORT_WAIT_S", 0.02)


@pytest.fixture
def send_together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int | None]]:
    """Return a function that sends images as `send`, and delays explanations until all of them have been received.

    Otherwise, the gateway could report their study in between if the machine is busy.
    """
    received = threading.Event()

    def explain_later(*arguments: Any, **options: Any) -> Any:
        assert received.wait(LIMIT_S)
        return explain(*arguments, **options)

    def send_images(address: str, *images: Dataset) -> list[int | None]:
        try:
            return send(address, *images)
        finally:
            received.set()

    monkeypatch.setattr(steps, "explain", explain_later)
    return send_images


@pytest.fixture
def log() -> Iterator[LogLines]:
    """Collect the lines of the gateway's log."""
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    """Run a PACS in this process."""
    with listening() as pacs:
        yield pacs


@pytest.fixture
def gateway(tmp_path: Path, tiny: Server, pacs: Pacs) -> OpenGateway:
    """Return a function that opens a gateway between the server and the PACS."""
    return lambda **keys: opened(config(tmp_path, tiny, pacs, **keys), pacs)
