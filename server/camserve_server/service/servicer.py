"""The RPCs. Each reads its request in a thread, hands a plan to the engine, and writes the answer in a thread.

Nothing here blocks the event loop, so Health answers while the device is saturated.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import structlog

from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc
from camserve_server import registry
from camserve_server.config import Config
from camserve_server.engine.engine import Engine
from camserve_server.engine.job import Event, Job, Progress
from camserve_server.errors import CamserveError, Cancelled, Expired, InternalError, Unavailable
from camserve_server.model_pool import Loan, Shelf
from camserve_server.plan import Level, MapWarning, Randomised, Stage
from camserve_server.registry import method_label
from camserve_server.request_plan import Explained, explain, limits, rows_needed
from camserve_server.service import bounds, requests, responses, security, status, traces
from camserve_server.service.call import MAX_REQUEST_ID, Call, Context, checked_request_id
from camserve_server.service.prometheus import Metrics
from camserve_server.service.requests import Asked

if TYPE_CHECKING:
    from camserve_server.service.spans import Traces

PROGRESS_EVERY_S = 0.1
HEARTBEAT_S = 15.0
CLOCKS_DIFFER_S = 0.01

log = structlog.get_logger()
T = TypeVar("T")
Picture = pb.Level | pb.Randomised
Sent = Picture | Progress | Stage | MapWarning | None


@dataclass(eq=False)
class _Done:
    """The last event of a request: its job, with the cost, and what came of it."""

    job: Job[Explained]
    result: Explained
    remarks: list[str]


class Servicer(explain_pb2_grpc.ExplainServiceServicer):
    """Answers from `engine` with the models of the shelf, which is there once they are loaded."""

    def __init__(self, config: Config, engine: Engine, metrics: Metrics, traces: Traces | None) -> None:
        self.shelf: Shelf | None = None
        self.running: set[Call] = set()
        self.draining = False
        self._config = config
        self._engine = engine
        self._codec = ThreadPoolExecutor(max_workers=4, thread_name_prefix="codec")
        self._metrics = metrics
        self._traces = traces

    async def drain(self, grace_s: float) -> None:
        """Refuses new calls; returns when those that run are answered, but after `grace_s` seconds at the latest."""
        self.draining, until = True, time.monotonic() + grace_s
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        return (await _last(self._explain("Explain", request, context))).result

    async def ExplainStream(
        self, request: pb.ExplainStreamRequest, context: Context
    ) -> AsyncIterator[pb.ExplainStreamResponse]:
        async for event in self._explain("ExplainStream", request.request, context):
            yield event

    async def Evaluate(self, request: pb.EvaluateRequest, context: Context) -> pb.EvaluateResponse:
        return (await _last(self._evaluate("Evaluate", request, context))).result

    async def EvaluateStream(
        self, request: pb.EvaluateStreamRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateStreamResponse]:
        async for event in self._evaluate("EvaluateStream", request.request, context):
            yield event

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with self.call("ListModels", "", context):
            return pb.ListModelsResponse(models=[responses.model_message(*each) for each in self.loaded_shelf().all()])

    async def ListMethods(self, request: pb.ListMethodsRequest, context: Context) -> pb.ListMethodsResponse:
        async with self.call("ListMethods", "", context):
            methods = [method for _, method in sorted(registry.METHODS.items())]
            if not request.model:
                return pb.ListMethodsResponse(methods=[responses.method_message(m, None) for m in methods])
            async with self.loaded_shelf().lend(request.model) as loan:
                return pb.ListMethodsResponse(methods=[responses.method_message(m, loan.model) for m in methods])

    async def ListMetrics(self, request: pb.ListMetricsRequest, context: Context) -> pb.ListMetricsResponse:
        async with self.call("ListMetrics", "", context):
            metrics = [metric for _, metric in sorted(registry.METRICS.items())]
            return pb.ListMetricsResponse(metrics=[responses.metric_message(m) for m in metrics])

    # ---- explain and evaluate ----------------------------------------------------------------------------------------

    async def _explain(
        self, rpc: str, request: pb.ExplainRequest, context: Context
    ) -> AsyncIterator[pb.ExplainStreamResponse]:
        async with (
            self.call(rpc, request.request_id, context, request.method.name) as call,
            self.loaded_shelf().lend(request.model) as loan,
        ):
            self._look(call, request.priority, requests.rows_of_explain(request, loan.model))
            asked = await self._in_thread(requests.explain_request, request, loan.model, self._config)
            async for event in self._run(asked, call, loan):
                match event:
                    case pb.Progress():
                        yield pb.ExplainStreamResponse(progress=event)
                    case pb.Level():
                        yield pb.ExplainStreamResponse(level=event)
                    case pb.Randomised():
                        yield pb.ExplainStreamResponse(randomised=event)
                    case _Done(job, result, remarks):
                        response = await self._in_thread(
                            responses.explain_response, call.request_id, request, asked, job, result, remarks
                        )
                        yield pb.ExplainStreamResponse(result=response)

    async def _evaluate(
        self, rpc: str, request: pb.EvaluateRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateStreamResponse]:
        async with (
            self.call(rpc, request.request_id, context, request.method.name) as call,
            self.loaded_shelf().lend(request.model) as loan,
        ):
            self._look(call, request.priority, requests.rows_of_evaluate(request, loan.model))
            asked = await self._in_thread(requests.evaluate_request, request, loan.model, self._config)
            async for event in self._run(asked, call, loan):
                match event:
                    case pb.Progress():
                        yield pb.EvaluateStreamResponse(progress=event)
                    case pb.Randomised():
                        yield pb.EvaluateStreamResponse(randomised=event)
                    case _Done(job, result, remarks):
                        response = await self._in_thread(
                            responses.evaluate_response, call.request_id, asked, job, result, remarks
                        )
                        yield pb.EvaluateStreamResponse(result=response)

    def _look(self, call: Call, priority: str, rows: int) -> None:
        """Refuses what would be refused anyway, before its image costs anything."""
        caller, allowed = security.rights(call.context, self._config, requests.priority(priority))
        self._engine.look(rows, caller, allowed)

    async def _run(self, asked: Asked, call: Call, loan: Loan) -> AsyncIterator[pb.Progress | Picture | _Done]:
        """Runs the request's plan. Yields pictures, progress now and then, and at the end what came of it.

        The loan ends with the plan, however long the caller takes to read the answer.
        """
        engine, loop = self._engine, asyncio.get_running_loop()
        events: asyncio.Queue[Sent] = asyncio.Queue()

        def tell(event: Event | None) -> None:
            """On the engine's thread, which alone does arithmetic: see device/."""
            sent: Sent
            match event:
                case Level():
                    sent = responses.level(event, asked.model)
                case Randomised():
                    sent = responses.randomised(event)
                case _:
                    sent = event
            loop.call_soon_threadsafe(events.put_nowait, sent)

        model, method = asked.model, asked.call
        caller, priority = security.rights(call.context, self._config, asked.priority)
        job = engine.submit(
            explain(model, asked.image, asked.targets, asked.subject, asked.metrics, asked.truth),
            model,
            rows=rows_needed(model, method, asked.metrics, asked.maps),
            limits=limits(
                model, method, asked.metrics, asked.maps, budget=asked.budget, deadline=_deadline(call.context)
            ),
            batch_sizes=asked.batch_sizes,
            caller=caller,
            priority=priority,
            tell=tell,
        )
        call.job = job
        job.future.add_done_callback(lambda _: self._metrics.finished(job, call.method))
        # A job that is done is not cancelled by it.
        call.context.add_done_callback(lambda *_: engine.cancel(job))  # type: ignore[arg-type]
        job.future.add_done_callback(lambda _: tell(None))
        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(loan.end))
        call.facts |= {"model": model.name, "method": method.method.name if method else ""}

        remarks: list[str] = []
        async for event in _paced(events):
            if isinstance(event, MapWarning):
                remarks.append(event.text)
            else:
                yield event
        call.facts |= {"rows": job.rows, "queue_ms": round(job.queue_ms), "compute_ms": round(job.compute_ms)}
        yield _Done(job, job.future.result(), remarks)

    # ---- what all share ----------------------------------------------------------------------------------------------

    def loaded_shelf(self) -> Shelf:
        """Raises Unavailable while it is being filled."""
        if self.shelf is None:
            raise Unavailable("the models are being loaded", retry_after_s=1.0)
        return self.shelf

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        context = contextvars.copy_context()  # for the log
        return await asyncio.get_running_loop().run_in_executor(self._codec, lambda: context.run(work, *args))

    @asynccontextmanager
    async def call(self, rpc: str, request_id: str, context: Context, method: str = "") -> AsyncIterator[Call]:
        """Logs, counts and traces the call, and turns whatever goes wrong into a status.

        `method` is as the caller gave it. No image, label or path stands in the log.
        """
        call = Call(rpc, context, request_id[:MAX_REQUEST_ID], method_label(method))
        trace_id = self._traces.start(call) if self._traces else traces.callers_trace(context)
        known = {"trace_id": trace_id} if trace_id else {}
        deadline = _deadline(context)
        failure: CamserveError | None = None
        try:
            if name := security.caller(context):
                call.facts["caller"] = name
            call.request_id = checked_request_id(request_id)
            structlog.contextvars.bind_contextvars(request_id=call.request_id, **known)
            if self.draining:
                raise Unavailable("the server is shutting down; try another one", retry_after_s=1.0)
            bounds.check()
            self.running.add(call)
            context.add_done_callback(lambda *_: self.running.discard(call))  # type: ignore[arg-type]
            yield call
        except CamserveError as error:
            failure = error
        except Exception:
            log.exception("bug", rpc=rpc)
            failure = InternalError("an internal error; the server's log says more under this request's id")
        except BaseException:  # gRPC cancels the task for both
            late = deadline is not None and time.monotonic() >= deadline - CLOCKS_DIFFER_S
            failure = Expired("the deadline passed") if late else Cancelled("the caller went away")
            raise
        finally:
            code = failure.code if failure else "OK"
            ms = round(1e3 * (time.monotonic() - call.started), 1)
            # This may be another task than the call's own, which knows nothing of it.
            log.info("call", request_id=call.request_id, **known, rpc=rpc, code=code, ms=ms, **call.facts)
            self._metrics.ended(call, code)
            if self._traces:
                self._traces.end(call, code)
        if failure is not None:
            await context.abort(
                status.code(failure),
                failure.message,
                status.trailing_metadata(failure, call.request_id, context.time_remaining()),
            )


async def _last(events: AsyncIterator[T]) -> T:
    """The event that a stream ends with."""
    async for event in events:
        last = event
    return last


async def _paced(events: asyncio.Queue[Sent]) -> AsyncIterator[pb.Progress | Picture | MapWarning]:
    """Until None: all pictures and remarks, but progress no more often than every 0.1 s, and at least every 15 s."""
    progress = pb.Progress()
    sent = 0.0
    while True:
        try:
            event = await asyncio.wait_for(events.get(), HEARTBEAT_S)
        except TimeoutError:
            yield progress
            continue
        match event:
            case None:
                return
            case Stage(name):
                progress = pb.Progress(rows_done=progress.rows_done, rows_total=progress.rows_total, stage=name)
            case Progress(done, total):
                progress = pb.Progress(rows_done=done, rows_total=total, stage=progress.stage)
                now = time.monotonic()
                if now - sent >= PROGRESS_EVERY_S or done == total:
                    sent = now
                    yield progress
            case _:
                yield event


def _deadline(context: Context) -> float | None:
    """The caller's deadline, of `time.monotonic()`."""
    left = context.time_remaining()
    return None if left is None or not math.isfinite(left) else time.monotonic() + left
