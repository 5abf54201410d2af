"""Settings and fixtures of all tests, among them a real server."""

from __future__ import annotations

from tests import inherited_state  # noqa: F401, isort: skip  # before packages that read the environment

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import structlog
import torch
from hypothesis import HealthCheck, settings

from camserve_server.config import Config, ModelConfig, embedded_model
from camserve_server.service.server import Server
from tests.processes import LIMIT_S

torch.set_num_threads(1)
# The same examples in each run, and no limit for the time of an example or of its generation: a busy machine would
# exceed it.
settings.register_profile("tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
# By default, structlog lists the local variables of each frame, which takes seconds for a traceback.
structlog.configure(
    processors=[structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)],
    # Not stdout, which tests of commands read.
    logger_factory=structlog.WriteLoggerFactory(sys.__stderr__),
)
if torch.cuda.is_available():
    os.environ["CAMSERVE_DEVICE"] = "cpu"  # tests with the mark `gpu` name their device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none, and run files with slow tests first.

    The tests of a file stay together, so that fixtures of a module are set up once. Slow files go first, so that no
    worker is left with one at the end.
    """
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@contextmanager
def serving(config: Config) -> Iterator[Server]:
    """Run a server in a thread of this process; the configuration should listen on port 0 of the loopback address."""
    started: Future[tuple[Server, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def life() -> None:
        server, over = Server(config), asyncio.Event()
        try:
            await server.start()
        except Exception as error:
            await server.stop(grace_s=0)
            started.set_exception(error)
            return
        started.set_result((server, asyncio.get_running_loop(), over))
        await over.wait()
        await server.stop(grace_s=0)

    thread = threading.Thread(target=lambda: asyncio.run(life()), name="server")
    thread.start()
    server, loop, over = started.result(timeout=LIMIT_S)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Run a server with two models: the embedded one at 96×96 pixels, which is the default, and the small "tiny"."""
    small = embedded_model().model_copy(update={"input_size": (96, 96), "batch_size": 4})
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    with serving(Config(listen="127.0.0.1:0", health_listen="127.0.0.1:0", models=[small, tiny])) as running:
        yield running
