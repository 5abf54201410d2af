"""Work of the model pool for all devices: checks of devices and replicas, and freeing of memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence

import structlog
import torch

from camserve_server.engine.engine import Engine
from camserve_server.engine.lanes.cuda_graph import empty_cache
from camserve_server.engines import Engines
from camserve_server.models.model import Model
from camserve_server.pool_entries import Replica

log = structlog.get_logger()


async def works(engine: Engine) -> bool:
    """Check the device of an engine, which ends if the device has failed. Return True if the device works."""
    with contextlib.suppress(Exception):
        await asyncio.wrap_future(engine.check())
    return engine.working


async def free_cached_memory(engines: Engines) -> None:
    """Return the memory that torch keeps for later tensors to the GPUs. Log failures: the caller can go on."""
    for engine, device in engines.working().items():
        if device.type == "cuda":
            try:
                await asyncio.wrap_future(engine.run_between_batches(_empty_cache()))
            except Exception as error:  # a device fails, or the server shuts down
                log.warning("cached memory not freed", device=engine.device, reason=str(error))


async def warm_up_all(
    replicas: Sequence[Replica],
    warm_up: Callable[[Replica], Awaitable[bool]],
    *,
    fixed: bool,
    forget: Callable[[], bool],
) -> list[Replica]:
    """Warm replicas up one after the other. The first one measures the batch sizes of all, unless they are known.

    If known ones do not fit into its memory, measure them. If they do not fit into the memory of another device, halve
    them. Then warm all replicas up again.

    Args:
        replicas: All replicas of a model.
        warm_up: Warms up one replica, and returns False if its device has failed.
        fixed: True if the batch sizes are configured, so that they must not change.
        forget: Forgets the known batch sizes, and returns False if there are none.

    Returns:
        The replicas whose devices work.

    Raises:
        torch.OutOfMemoryError: The model does not fit into the memory of a device.
    """
    working = list[Replica]()
    for replica in replicas:
        try:
            if await warm_up(replica):
                working.append(replica)
            continue
        except torch.OutOfMemoryError:
            if fixed or not (_halve_batch_sizes(replica.model) if working else forget()):
                raise
        return await warm_up_all(replicas, warm_up, fixed=fixed, forget=forget)
    return working


def _halve_batch_sizes(model: Model) -> bool:
    """Halve the batch sizes, which all replicas of a model share. Return False if all sizes are 1."""
    sizes = [each.batch_sizes for each in model.precisions.values()]
    if all(size <= 1 for each in sizes for size in each.values()):
        return False
    for each in sizes:
        each.update({kind: max(1, size // 2) for kind, size in each.items()})
    log.warning("out of memory on a device, batches halved", model=model.name, device=model.device_name)
    return True


def unify_fast_forwards(replicas: Sequence[Replica]) -> None:
    """Drop the fast forward passes of replicas that do not all have the same kind, which could give other bits.

    Args:
        replicas: All replicas of a model, after their warm-up and before their first request.
    """
    for same in zip(*(replica.model.precisions.values() for replica in replicas), strict=True):
        if len({(type(each.fast_forward), each.compiled) for each in same}) > 1:
            log.warning("devices differ in their faster forward pass, so none uses it", model=same[0].name)
            for each in same:
                each.fast_forward, each.fast_forward_size, each.compiled = None, 0, False


def _empty_cache() -> Iterator[None]:
    """Free cached memory on the engine's thread, because it must not happen while a CUDA graph is recorded."""
    empty_cache()
    yield
