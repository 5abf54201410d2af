"""Work of the model pool on the threads of the engines: checks of devices, and freeing of memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import structlog
import torch

from camserve_server.engine.engine import Engine
from camserve_server.engines import Engines
from camserve_server.torch_setup.device import check_device

log = structlog.get_logger()


async def works(engine: Engine, device: torch.device) -> bool:
    """Check a device on the thread of its engine, which ends if the device has failed.

    Args:
        engine: The engine of the device.
        device: The device.

    Returns:
        True if the device works.
    """

    def check() -> Iterator[None]:
        check_device(device)
        yield

    with contextlib.suppress(Exception):
        await asyncio.wrap_future(engine.run_between_batches(check()))
    return engine.working


async def free_cached_memory(engines: Engines) -> None:
    """Return the memory that torch keeps for later tensors to the GPUs. Log failures: the caller can go on."""
    for engine, device in engines.working().items():
        if device.type == "cuda":
            try:
                await asyncio.wrap_future(engine.run_between_batches(_empty_cache()))
            except Exception as error:  # a device fails, or the server shuts down
                log.warning("cached memory not freed", device=engine.device, reason=str(error))


def _empty_cache() -> Iterator[None]:
    """Free cached memory on the engine's thread, because it must not happen while a CUDA graph is recorded."""
    torch.cuda.empty_cache()
    yield
