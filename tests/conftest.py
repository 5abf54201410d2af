"""What all tests share: one thread each, so that several processes do not fight for the cores; and a real server."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the servers that tests start

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from camserve_server.config import Config, ModelConfig, embedded
from camserve_server.service.server import Server
from tests.processes import restore_default_signals

restore_default_signals()
torch.set_num_threads(1)
if torch.cuda.is_available():
    os.environ["CAMSERVE_DEVICE"] = "cpu"  # tests marked `gpu` name theirs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip without one; the slow ones go first, so that no worker ends with them."""
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@contextmanager
def serving(config: Config) -> Iterator[Server]:
    """A real server on a free loopback port, in a thread of its own."""
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
    server, loop, over = started.result(timeout=120)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Two models: the embedded one at 96×96 pixels, the default, and "tiny", a quick one with random weights."""
    small = embedded().model_copy(update={"input_size": (96, 96), "batch_size": 4})
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    with serving(Config(listen="127.0.0.1:0", health_listen="127.0.0.1:0", models=[small, tiny])) as running:
        yield running
