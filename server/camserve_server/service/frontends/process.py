"""The process of a front end."""

from __future__ import annotations

import asyncio
import os

import grpc
import torch
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest

from camserve_server.config import Config
from camserve_server.service.frontends.callers import FrontEndServicer
from camserve_server.service.frontends.control import READY, Control
from camserve_server.service.frontends.shared_memory import SharedMemory
from camserve_server.service.health import Health
from camserve_server.service.listeners import LINK, SHARED_PORT, STOP_GRACE_S, bind, callers_server
from camserve_server.service.load_reports.orca_pb2 import LoadReport
from camserve_server.service.load_reports.reports import LoadReports, copy_load
from camserve_server.service.logs import log_to_stderr
from camserve_server.torch_setup.allocator import keep_memory


def serve(control: Control) -> None:
    """Serve callers until the engine process stops this front end.

    Args:
        control: The settings of the front end, and its end.
    """
    keep_memory()
    torch.set_num_threads(1)
    config = Config(**control.settings["config"])
    log_to_stderr(config)
    asyncio.run(_serve(config, control))


async def _serve(config: Config, control: Control) -> None:
    loop, stopping, settings = asyncio.get_running_loop(), asyncio.Event(), control.settings
    control.stop = lambda: loop.call_soon_threadsafe(stopping.set)
    health = Health()
    channel = grpc.aio.insecure_channel(f"unix:{settings['folder']}/link", LINK)
    servicer = FrontEndServicer(config, settings["identifier"], channel, SharedMemory(settings["memory"]))
    inference = None
    if config.open_inference:
        from camserve_server.service.frontends.inference import FrontEndInferenceServicer

        inference = FrontEndInferenceServicer(servicer, channel)
    load = LoadReport()
    loads = LoadReports(lambda: load.application_utilization)
    server = callers_server(config, servicer, health, servicer.count_refusal, inference, loads, port=SHARED_PORT)
    known = {service: asyncio.Event() for service in settings["services"]}
    copies = [asyncio.create_task(_copy_health(channel, health, *each)) for each in known.items()]
    copies.append(asyncio.create_task(copy_load(channel, load)))
    await asyncio.gather(*(each.wait() for each in known.values()))
    bind(server, "listen", settings["address"], config.tls)
    await server.start()
    print(READY, flush=True)
    await asyncio.wait([asyncio.create_task(stopping.wait()), *copies], return_when=asyncio.FIRST_COMPLETED)
    await server.stop(STOP_GRACE_S)
    if not stopping.is_set():  # the link is lost
        control.wait_for_end()
    # Nothing is left to save. A complete end takes a second, and gRPC logs errors about watchers of Health.
    os._exit(0)


async def _copy_health(channel: grpc.aio.Channel, health: Health, service: str, known: asyncio.Event) -> None:
    """Copy the states of a service from the engine process, and set `known` after the first one."""
    async for answer in health_pb2_grpc.HealthStub(channel).Watch(HealthCheckRequest(service=service)):
        health.set(service, answer.status)
        known.set()
