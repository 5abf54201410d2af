"""The models and engines of a configuration without listeners: requests and responses stay in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import structlog

from camserve.v1 import explain_pb2 as pb
from camserve_server import registry
from camserve_server.config import Config
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Event, Job
from camserve_server.engine.outcomes import shut_down
from camserve_server.engines import Engines
from camserve_server.errors import CamserveError, InternalError
from camserve_server.model_pool import ModelPool
from camserve_server.plan import MapWarning
from camserve_server.request_plan import limits, plan_request
from camserve_server.request_result import RequestResult
from camserve_server.service import requests, responses
from camserve_server.service.call import checked_request_id
from camserve_server.service.codec import CodecThreads
from camserve_server.service.requests import ParsedRequest

# The caller bounds the number of requests, so the engine refuses none for the rows that wait.
_NO_LIMIT = 2**62
_CLOSE_S = 1.0  # codec threads need less, also for large images

log = structlog.get_logger()
T = TypeVar("T")


class InProcessService:
    """Answers Explain requests as a server does, but without gRPC.

    An event loop in a thread of its own runs the requests. They have no deadline and are never refused because the
    engine is busy, so the caller must bound their number.

    Args:
        config: The configuration. The settings of listeners, tokens and the result cache have no effect.

    Attributes:
        failed: As in `Engines`.

    Raises:
        ConfigError: There is no such device.
    """

    def __init__(self, config: Config) -> None:
        self._config = config.model_copy(update={"max_rows_owed": _NO_LIMIT})
        self._engines = Engines(self._config)
        self.failed = self._engines.failed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._closing = threading.Lock()  # no coroutine may begin after the one that ends all others
        self._closed = False
        self._codec: CodecThreads
        self._models: ModelPool

    def start(self) -> None:
        """Load the models, and return when they are ready.

        Raises:
            ConfigError: A model cannot be loaded.
            CamserveError: A model does not fit into the device's memory.
        """
        self._thread.start()
        self.submit(self._start()).result()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the event loop of the requests. Any thread may call this method.

        Raises:
            Unavailable: The service has been closed.
        """
        with self._closing:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise shut_down()

    async def check(self, request: pb.ExplainRequest) -> None:
        """Check all fields of a request but its pixels.

        Raises:
            CamserveError: A field is wrong; the error names the field.
        """
        async with self._models.lease(request.model) as lease:
            parsed = requests.parse_explain(request, lease.model, self._config)
            limits(parsed.model, parsed.method, parsed.rows, budget=parsed.budget)

    async def explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        """Return the response that a server would return. Call it on the event loop of the requests.

        Raises:
            CamserveError: The request is wrong, or fails.
        """
        async with self._models.lease(request.model) as lease:
            parsed = requests.parse_explain(request, lease.model, self._config)
            chosen = lease.least_busy()
            try:
                return await self._explain_on(chosen.engine, parsed.on(chosen.model), request.request_id)
            except CamserveError:
                raise
            except Exception as error:
                log.exception("unexpected exception")
                chosen.engine.check()  # the codec threads use its device, too
                raise InternalError("an internal error; the log describes it") from error

    async def _explain_on(self, engine: Engine, parsed: ParsedRequest, request_id: str) -> pb.ExplainResponse:
        bounded = limits(parsed.model, parsed.method, parsed.rows, budget=parsed.budget)
        with engine.reserve(parsed.rows.most, bounded, priority=parsed.priority or "normal") as reservation:
            pixels = await self._codec.run(requests.decode_pixels, parsed, self._config)
            assert parsed.method is not None, "a request to Explain has a method"
            warnings = [*pixels.warnings]

            def notify(event: Event) -> None:
                if isinstance(event, MapWarning):
                    warnings.append(event.text)

            job: Job[RequestResult] = reservation.submit(
                plan_request(parsed.model, pixels.image, parsed.targets, parsed.method, parsed.metrics, pixels.truth),
                parsed.model,
                batch_sizes=parsed.batch_sizes,
                notify=notify,
            )

        def respond() -> pb.ExplainResponse:
            result = job.future.result()
            return responses.explain_response(
                checked_request_id(request_id), parsed, pixels.input_digest, job, result, warnings
            )

        try:
            return await self._codec.run_after(job.future, respond)
        except asyncio.CancelledError:
            engine.cancel(job)
            raise

    def close(self) -> None:
        """Fail the running requests with Unavailable, cancel what still waits, and end all threads."""
        self._engines.close()
        with self._closing:
            self._closed = True
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_tasks(self) -> None:
        """Let the codec threads answer the requests that the engines have failed, and cancel all other tasks."""
        tasks = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        if tasks:
            _, waiting = await asyncio.wait(tasks, timeout=_CLOSE_S)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _start(self) -> None:
        self._codec = CodecThreads()
        registry.discover()
        self._engines.start()
        self._models = ModelPool(self._config, self._engines)
        await self._models.load_all()
