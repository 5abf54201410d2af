"""Responses to Explain and Evaluate: made from the results of jobs, or restored from the result cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from google.protobuf.message import Message

from camserve.v1 import explain_pb2 as pb
from camserve_server.engine.job import Job
from camserve_server.request_result import RequestResult
from camserve_server.service import responses
from camserve_server.service.requests import ParsedRequest

Response = TypeVar("Response", bound=Message)
Respond: TypeAlias = Callable[[str, ParsedRequest, str, "Job[RequestResult]", RequestResult, Sequence[str]], Response]


@dataclass(frozen=True)
class Answer(Generic[Response]):
    """The functions that make the response to a kind of request.

    Attributes:
        kind: The message that `respond` returns, which the result cache stores.
        respond: Makes this message; it runs in a codec thread.
        inner: Returns the response of Explain or Evaluate that the message is or contains.
        convert: Converts the message to the response of another protocol; it runs in a codec thread.
    """

    kind: type[Response]
    respond: Respond[Response]
    inner: Callable[[Response], pb.ExplainResponse | pb.EvaluateResponse]
    convert: Callable[[Response], Message] | None = None

    def finished(self, message: Response) -> Message:
        """Return the response to the caller."""
        return self.convert(message) if self.convert else message

    def restored(self, value: bytes, request_id: str) -> Message:
        """Return the response to the caller from a stored message.

        Args:
            value: The serialised message.
            request_id: The identifier of the request that it answers now.
        """
        message = self.kind.FromString(value)
        response = self.inner(message)
        response.request_id = response.receipt.request_id = request_id
        response.cost.cached = True
        return self.finished(message)


EXPLAINED = Answer[pb.ExplainResponse](pb.ExplainResponse, responses.explain_response, lambda message: message)
EVALUATED = Answer[pb.EvaluateResponse](pb.EvaluateResponse, responses.evaluate_response, lambda message: message)
