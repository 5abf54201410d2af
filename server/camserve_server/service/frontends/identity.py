"""Results of the checks of a front end (caller, trace and size), as metadata of the call on the link.

The engine process trusts these metadata, because only the front ends can open the socket of the link. They contain no
secret: the engine process does not need the token itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from camserve_server.config import Config
from camserve_server.service import bounds, security
from camserve_server.service.call import Context
from camserve_server.service.frontends import link_pb2, messages

# Values of keys with the suffix -bin are bytes.
_TOKEN, _SUBJECT, _REFUSAL = "camserve-token-bin", "camserve-subject-bin", "camserve-refusal-bin"
_TRACE = ("traceparent", "tracestate")

Metadata = tuple[tuple[str, str | bytes], ...]


def metadata_of(context: Context) -> Metadata:
    """Return the metadata for the link. Call it in the task of the caller's call.

    Args:
        context: The context of the caller's call.
    """
    values: list[tuple[str, str | bytes]] = [
        (_TOKEN, security.token_name().encode()),
        (_SUBJECT, security.subject(context).encode()),
    ]
    if (refusal := bounds.refusal()) is not None:
        values.append((_REFUSAL, messages.failure(refusal).SerializeToString()))
    values += [(key, value) for key, value in context.invocation_metadata() or () if key in _TRACE]
    return tuple(values)


class TrustFrontEnds(grpc.aio.ServerInterceptor):
    """Takes over what the front end has checked, for the handler of the call.

    Args:
        config: The configuration of the server.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Set the context variables of the call. gRPC runs its handler in the same task."""
        values: dict[str, Any] = dict(handler_call_details.invocation_metadata)
        security.trust(self._config, values.get(_TOKEN, b"").decode(), values.get(_SUBJECT, b"").decode())
        if _REFUSAL in values:
            bounds.refuse(messages.error(link_pb2.Failure.FromString(values[_REFUSAL])))
        return await continuation(handler_call_details)
