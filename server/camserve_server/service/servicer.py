"""The RPCs of ExplainService.

A request takes these steps: parse all fields but the pixels (on the event loop, under a few milliseconds), reserve rows
in the engine, decode the pixels (in a codec thread), run the plan (on the engine's thread), and encode the response (in
a codec thread). Nothing blocks the event loop, so Health answers while the device is saturated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import structlog
from google.protobuf.message import Message

from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc
from camserve_server import registry
from camserve_server.config import Config
from camserve_server.engine.job import Job
from camserve_server.errors import CamserveError, InternalError, Unavailable
from camserve_server.model_pool import ModelPool
from camserve_server.models.model import Model
from camserve_server.pool_entries import Lease
from camserve_server.registry import method_label
from camserve_server.request_plan import limits, plan_request
from camserve_server.request_result import RequestResult
from camserve_server.service import bounds, requests, responses, security, status, trace_context
from camserve_server.service.answers import EVALUATED, EXPLAINED, Answer, Response
from camserve_server.service.call import (
    MAX_REQUEST_ID,
    Call,
    Context,
    announce,
    cancellation,
    checked_request_id,
    deadline,
)
from camserve_server.service.codec import CodecThreads
from camserve_server.service.event_stream import EventStream, StreamMessage
from camserve_server.service.prometheus import Metrics
from camserve_server.service.requests import ParsedRequest, Pixels
from camserve_server.service.result_cache.cache import ResultCache

if TYPE_CHECKING:  # the tracer imports opentelemetry, an optional dependency
    from camserve_server.service.tracer import Tracer

log = structlog.get_logger()
T = TypeVar("T")
Request = TypeVar("Request", pb.ExplainRequest, pb.EvaluateRequest)
Parse: TypeAlias = Callable[[Request, Model, Config], ParsedRequest]


class FrontEnd(Protocol):
    """The front end that has accepted a call."""

    async def decode(self, call: Call, parsed: ParsedRequest) -> Pixels:
        """Let the front end announce the call, and return the pixels that it decodes. Raises CamserveError."""
        ...

    async def announce(self, call: Call, parsed: ParsedRequest) -> None:
        """Let the front end announce a call whose response needs no pixels."""
        ...

    async def finished(self) -> None:
        """Return when the front end has finished the response. Raises CamserveError if it cannot."""
        ...


class Servicer(explain_pb2_grpc.ExplainServiceServicer):
    """Implements ExplainService with a pool of models, each with its engine.

    Args:
        config: The configuration of the server.
        metrics: Counts the calls.
        tracer: Sends a span for each call; None if traces are off.

    Attributes:
        models: The pool of models; None until the configured models are loaded.
        running: The calls that have not ended.
        draining: The server refuses new calls because it shuts down.
        codec: Decodes and encodes.
        cache: The stored responses; None if the configuration does not enable the cache or while the server starts.
    """

    def __init__(self, config: Config, metrics: Metrics, tracer: Tracer | None) -> None:
        self.models: ModelPool | None = None
        self.running: set[Call] = set()
        self.draining = False
        self._config = config
        self.codec = CodecThreads()
        self.cache: ResultCache | None = None
        self._metrics = metrics
        self._tracer = tracer

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls, and wait until the running calls have ended or `grace_s` seconds have passed."""
        self.draining, until = True, time.monotonic() + grace_s
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """Return the maps of an image, and their scores if the request names metrics."""
        return await self._unary("Explain", request, context, requests.parse_explain, EXPLAINED)

    async def ExplainStream(
        self, request: pb.ExplainStreamRequest, context: Context
    ) -> AsyncIterator[pb.ExplainStreamResponse]:
        """Yield progress, intermediate maps and the response of Explain."""
        async for message in self.run(
            "ExplainStream",
            request.request,
            context,
            requests.parse_explain,
            EXPLAINED,
            kinds=(pb.Progress,) if request.heartbeats_only else (pb.Progress, pb.Level, pb.Randomised),
            heartbeats_only=request.heartbeats_only,
        ):
            match message:
                case pb.Progress():
                    yield pb.ExplainStreamResponse(progress=message)
                case pb.Level():
                    yield pb.ExplainStreamResponse(level=message)
                case pb.Randomised():
                    yield pb.ExplainStreamResponse(randomised=message)
                case pb.ExplainResponse():
                    yield pb.ExplainStreamResponse(result=message)

    async def Evaluate(self, request: pb.EvaluateRequest, context: Context) -> pb.EvaluateResponse:
        """Return the scores of one map."""
        return await self._unary("Evaluate", request, context, requests.parse_evaluate, EVALUATED)

    async def EvaluateStream(
        self, request: pb.EvaluateStreamRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateStreamResponse]:
        """Yield progress, the maps of randomised networks and the response of Evaluate."""
        async for message in self.run(
            "EvaluateStream",
            request.request,
            context,
            requests.parse_evaluate,
            EVALUATED,
            kinds=(pb.Progress,) if request.heartbeats_only else (pb.Progress, pb.Randomised),
            heartbeats_only=request.heartbeats_only,
        ):
            match message:
                case pb.Progress():
                    yield pb.EvaluateStreamResponse(progress=message)
                case pb.Randomised():
                    yield pb.EvaluateStreamResponse(randomised=message)
                case pb.EvaluateResponse():
                    yield pb.EvaluateStreamResponse(result=message)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Return the configured models."""
        async with self.call("ListModels", "", context):
            models = [responses.model_message(*each) for each in self.loaded_models().all()]
            return bounds.check_response(pb.ListModelsResponse(models=models), self._config)

    async def ListMethods(self, request: pb.ListMethodsRequest, context: Context) -> pb.ListMethodsResponse:
        """Return the methods, with the rows that they take if the request names a model."""
        async with self.call("ListMethods", "", context):
            methods = [method for _, method in sorted(registry.METHODS.items())]
            if not request.model:
                messages = [responses.method_message(m, None) for m in methods]
            else:
                async with self.loaded_models().lease(request.model) as lease:
                    messages = [responses.method_message(m, lease.model) for m in methods]
            return bounds.check_response(pb.ListMethodsResponse(methods=messages), self._config)

    async def ListMetrics(self, request: pb.ListMetricsRequest, context: Context) -> pb.ListMetricsResponse:
        """Return the metrics."""
        async with self.call("ListMetrics", "", context):
            metrics = [metric for _, metric in sorted(registry.METRICS.items())]
            messages = [responses.metric_message(m) for m in metrics]
            return bounds.check_response(pb.ListMetricsResponse(metrics=messages), self._config)

    # ---- Explain and Evaluate ----------------------------------------------------------------------------------------

    async def _unary(
        self, rpc: str, request: Request, context: Context, parse: Parse[Request], answer: Answer[Response]
    ) -> Response:
        async for message in self.run(rpc, request, context, parse, answer):
            response = message
        return response  # type: ignore[return-value]  # without kinds, the response is the only message

    async def run(
        self,
        rpc: str,
        request: Request,
        context: Context,
        parse: Parse[Request],
        answer: Answer[Response],
        *,
        kinds: Collection[type[StreamMessage]] = (),
        heartbeats_only: bool = False,
        front_end: FrontEnd | None = None,
    ) -> AsyncIterator[StreamMessage | Message]:
        """Run the plan of a request, or return its response from the result cache.

        Args:
            rpc: The name of the RPC.
            request: The message of the caller.
            context: The context of the call.
            parse: Checks all fields of the request but its pixels.
            answer: Makes the response.
            kinds: The kinds of messages that the call returns before its response.
            heartbeats_only: Return progress only to keep the connection open.
            front_end: The front end of the call; None if callers connect to this process.

        Yields:
            The messages of the given kinds, and finally the response.
        """
        async with (
            self.call(rpc, request.request_id, context, request.method.name) as call,
            self.loaded_models().lease(request.model) as lease,
        ):
            parsed = parse(request, lease.model, self._config)
            bounds.check_size(responses.least_bytes(parsed), self._config)
            caller, priority = security.rights(context, self._config, parsed.priority)
            entry = None
            if self.cache is not None:
                owner, events_too = security.identity(context), pb.Randomised in kinds
                entry = await self.cache.look_up(request, parsed, lease, answer.kind, owner, randomised=events_too)
            if entry is not None and entry.value is not None:
                lease.release()  # a slow caller may read the response for long
                call.facts |= {**_facts(parsed), "cached": True}
                await (announce(context, call.request_id) if front_end is None else front_end.announce(call, parsed))
                response = await self.codec.run(answer.restored, entry.value, call.request_id)
                async for message in self._delivered(self._checked(response, front_end), front_end):
                    yield message
                return
            chosen = lease.least_busy()
            engine, parsed = chosen.engine, parsed.on(chosen.model)
            call.after_unexpected = engine.check  # the codec threads use its device, too
            bounded = limits(parsed.model, parsed.method, parsed.rows, budget=parsed.budget, deadline=deadline(context))
            with engine.reserve(parsed.rows.most, bounded, caller, priority) as reservation:
                if front_end is None:
                    await announce(context, call.request_id)
                    pixels = await self.codec.run(requests.decode_pixels, parsed, self._config)
                else:
                    pixels = await front_end.decode(call, parsed)
                subject = parsed.method if pixels.saliency is None else pixels.saliency
                assert subject is not None, "a request without a map has a method"
                events = EventStream(
                    parsed.model, parsed.map_format, kinds, pixels.warnings, heartbeats_only=heartbeats_only
                )
                job = reservation.submit(
                    plan_request(parsed.model, pixels.image, parsed.targets, subject, parsed.metrics, pixels.truth),
                    parsed.model,
                    batch_sizes=parsed.batch_sizes,
                    notify=events.notify,
                )
            call.job = job
            context.add_done_callback(lambda *_: engine.cancel(job))  # type: ignore[arg-type]
            call.facts |= _facts(parsed, engine.device)
            try:
                if kinds:
                    self._release_with(job, events, lease)
                    async for message in events.messages(self.codec.run):
                        yield message

                def respond() -> tuple[Message, bytes | None]:
                    result, warnings = job.future.result(), tuple(events.warnings)
                    made = answer.respond(call.request_id, parsed, pixels.input_digest, job, result, warnings)
                    value = made.SerializeToString() if entry is not None and entry.accepts(job) else None
                    return self._checked(answer.finished(made), front_end), value

                response, value = await self.codec.run_after(job.future, respond)
                if entry is not None and value is not None:
                    entry.store(value, randomised=events.randomised)
                async for message in self._delivered(response, front_end):
                    yield message
            finally:
                # Not earlier, so that the engine's thread does it only for a cancelled call, which ends before its job.
                job.future.add_done_callback(lambda _: self._metrics.finished(job, call.method))
                if job.future.done():
                    facts = {"rows": job.rows, "queue_ms": round(job.queue_ms), "compute_ms": round(job.compute_ms)}
                    call.facts |= facts

    def _checked(self, response: Message, front_end: FrontEnd | None) -> Message:
        """Return a response that this process sends to the caller, unless it is too large. Raises CamserveError."""
        if front_end is None:
            bounds.check_response(response, self._config)
        return response

    async def _delivered(self, response: Message, front_end: FrontEnd | None) -> AsyncIterator[Message]:
        """Yield the response, and wait until the front end, if there is one, has finished it."""
        yield response
        if front_end is not None:
            await front_end.finished()

    def _release_with(self, job: Job[RequestResult], events: EventStream, lease: Lease) -> None:
        """End the events of a stream and the lease with the job.

        The model does not stay leased while a slow caller reads the stream.
        """
        loop = asyncio.get_running_loop()
        job.future.add_done_callback(lambda _: events.end())
        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(lease.release))

    # ---- all calls ---------------------------------------------------------------------------------------------------

    def loaded_models(self) -> ModelPool:
        """Return the pool of models. Raises Unavailable until the configured models are loaded."""
        if self.models is None:
            raise Unavailable("the server is still loading its models; try again", retry_after_s=1.0)
        return self.models

    @asynccontextmanager
    async def call(self, rpc: str, request_id: str, context: Context, method: str = "") -> AsyncIterator[Call]:
        """Log, count and trace a call, and convert exceptions to a gRPC status.

        The log contains no image, label or path.

        Args:
            rpc: The name of the RPC.
            request_id: The identifier that the caller sent; empty for a new one.
            context: The context of the call.
            method: The explanation method as the caller sent it.

        Yields:
            The record of the call, to which the handler adds facts for the log.
        """
        call = Call(rpc, context, request_id[:MAX_REQUEST_ID], method_label(method))
        trace_id = self._tracer.start(call) if self._tracer else trace_context.trace_id_of_caller(context)
        traced = {"trace_id": trace_id} if trace_id else {}
        expires = deadline(context)
        failure: CamserveError | None = None
        try:
            if name := security.caller(context):
                call.facts["caller"] = name
            call.request_id = checked_request_id(request_id)
            structlog.contextvars.bind_contextvars(request_id=call.request_id, **traced)
            if self.draining:
                raise Unavailable("the server is shutting down; try another one", retry_after_s=1.0)
            bounds.check()
            self.running.add(call)
            context.add_done_callback(lambda *_: self.running.discard(call))  # type: ignore[arg-type]
            yield call
        except CamserveError as error:
            failure = error
        except Exception:
            log.exception("unexpected exception", rpc=rpc)
            failure = InternalError("an internal error; the server's log describes it under this request_id")
            call.after_unexpected()
        except BaseException:  # gRPC cancels the task for an expired deadline and for a cancelled call alike
            failure = cancellation(call.started, expires)
            raise
        finally:
            code = failure.code if failure else "OK"
            ms = round(1e3 * (time.monotonic() - call.started), 1)
            # An abandoned generator ends in another task, which does not have the context variables of the call.
            log.info("call", request_id=call.request_id, **traced, rpc=rpc, code=code, ms=ms, **call.facts)
            self._metrics.ended(call, code)
            if self._tracer:
                self._tracer.end(call, code)
        if failure is not None:
            await context.abort(
                status.code(failure),
                failure.message,
                status.trailing_metadata(failure, call.request_id, context.time_remaining()),
            )


def _facts(parsed: ParsedRequest, device: str = "") -> dict[str, object]:
    """Return what the log line of a request contains. `device` is empty if the server has only one."""
    facts = {"model": parsed.model.name, "method": parsed.method.method.name if parsed.method else ""}
    return {**facts, **({"device": device} if device else {})}
