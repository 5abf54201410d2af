"""Connection of the clients to a server: channels, retries, TLS, tokens and trace context."""

from __future__ import annotations

import json
import logging
import os
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import grpc

from camserve import environment, errors, images, request_messages
from camserve.addresses import check_target, is_loopback, proxy_options
from camserve.errors import InvalidArgument
from camserve.intermediaries import http_status, request_id_of
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve.version import __version__

__all__ = [
    "DEFAULT_ADDRESS",
    "DEFAULT_TIMEOUT_S",
    "KEEPALIVE_MS",
    "KEEPALIVE_TIMEOUT_MS",
    "SERVICE",
    "BlockingConnection",
    "Connection",
    "Pem",
    "channel_credentials",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"


class DefaultTimeout(float):
    """Timeout in seconds that the user did not choose. It does not apply to each of many requests.

    Many requests wait for each other in the server's queue, so no fixed time fits all of them.
    """


DEFAULT_TIMEOUT_S = DefaultTimeout(30)

# Path of a PEM file, or its content as bytes.
Pem: TypeAlias = "str | PathLike[str] | bytes"

log = logging.getLogger("camserve")

# Part of gRPC's message if Watch was refused, or its connection was lost. If Watch reports that the server is not
# ready, the message is another one.
WATCH_FAILED = "health check call failed"
# Start of gRPC's message if a stream ended without a status.
STREAM_REMOVED = "Stream removed"
RETRY_DELAYS_S = (0.1, 0.4, 1.6)
# Seconds that the client waits for a response of Watch, to find out whether it is refused.
WATCH_TIMEOUT_S = 5.0  # HAProxy tries to reach a server for three seconds

SERVICE = pb.DESCRIPTOR.services_by_name["ExplainService"].full_name
# HealthCheckRequest of grpc.health.v1, whose first field is the name of the service.
_WATCH_REQUEST = b"\n" + bytes([len(SERVICE)]) + SERVICE.encode()

# Pings keep an idle connection open in firewalls and detect a lost connection before the next call. Servers close
# connections that send pings too often; the camserve server allows one ping every 10 s.
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000

_COMMON_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", images.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", images.MAX_MESSAGE_BYTES),
    ("grpc.per_rpc_retry_buffer_size", images.MAX_MESSAGE_BYTES),  # the default would exclude photographs from retries
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),  # the default delays the reconnection to a restarted server by minutes
    ("grpc.primary_user_agent", f"camserve/{__version__}"),
]

_REPORTS = {"enableOobLoadReport": True, "oobReportingPeriod": "0.25s", "weightUpdatePeriod": "0.25s"}

# A call that may take longer than this uses the streaming RPC, because its heartbeats every 15 s keep it alive in
# proxies: they end calls without data, often after a minute, some after 20 s. Shorter calls save the cost of a stream.
LONG_CALL_S = 30.0
_STREAMS = frozenset({"Explain", "Evaluate"})


class OpenChannels(NamedTuple):
    """The channels of a client.

    `explain_many` and `evaluate_many` wait and retry by themselves if the server is busy, so that each attempt has the
    whole timeout. gRPC must therefore not retry RESOURCE_EXHAUSTED on their channel, `many`. `stubs` are those of the
    two channels, in this order.
    """

    default: Any
    many: Any
    stubs: tuple[Any, Any]


def _channel_options(retryable_codes: list[str], *, health_checks: bool) -> list[tuple[str, Any]]:
    service_config = {
        "loadBalancingConfig": [{"weighted_round_robin": _REPORTS}] * health_checks + [{"round_robin": {}}],
        **({"healthCheckConfig": {"serviceName": SERVICE}} if health_checks else {}),
        "methodConfig": [
            {
                "name": [{"service": SERVICE}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 4,
                    "retryableStatusCodes": retryable_codes,
                },
            }
        ],
    }
    keepalive = [
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # for the acknowledgement of sent data
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # for the response to a ping; the default is a minute
    ]
    return [*_COMMON_OPTIONS, *keepalive, ("grpc.service_config", json.dumps(service_config))]


class Connection:
    """Base class of all clients: creates the channels and the options of each call.

    The arguments and errors are those of `camserve.Client`.
    """

    # The module that creates channels: `grpc` for blocking clients, `grpc.aio` for asyncio.
    _grpc: ClassVar[Any] = grpc
    _stub: ClassVar[Any] = ExplainServiceStub
    # Channel options of a subclass, in addition to the common ones.
    _extra_options: ClassVar[list[tuple[str, Any]]] = []

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        tls: bool = False,
        ca: Pem | None = None,
        certificate: Pem | None = None,
        key: Pem | None = None,
        token: str | None = None,
        health_checks: bool = True,
    ) -> None:
        try:
            check_target(address)
        except ValueError as error:
            raise InvalidArgument(str(error), field="address") from error
        self.address = address
        self.timeout = timeout
        # An HTTP header can contain only visible ASCII characters. The message must not reveal the token.
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise InvalidArgument(
                "the token is empty or contains other characters than visible ASCII; check for spaces and line breaks",
                field="token",
            )
        self._credentials = channel_credentials(tls=tls, ca=ca, certificate=certificate, key=key)
        self._headers: list[tuple[str, str]] = []
        if self._credentials is not None:
            if token:
                bearer = grpc.access_token_call_credentials(token)
                self._credentials = grpc.composite_channel_credentials(self._credentials, bearer)
        elif token:
            if not is_loopback(address):
                raise InvalidArgument(
                    f"a token for {address} requires TLS, because plaintext would reveal it on the network; pass tls "
                    "or ca",
                    field="token",
                )
            self._headers = [("authorization", f"Bearer {token}")]
        self._lock = threading.Lock()
        self._health_checks = health_checks
        self._closed = False
        self._pid = os.getpid()
        self._inherited: list[Any] = []  # never used again, but destroying them could block
        self._opened: dict[Any, OpenChannels] = {}
        self._retired: list[tuple[Any, OpenChannels]] = []  # calls may still use them

    def _owner(self) -> Hashable:
        """Return the part of the program that needs channels of its own."""
        return None

    def _channels(self) -> OpenChannels:
        """Return the channels. They are opened when they are first used.

        Raises:
            Cancelled: The client is closed.
            CamserveError: gRPC does not work in this process.
        """
        environment.check()
        self._leave_parent()
        owner = self._owner()
        with self._lock:
            if self._closed:
                raise errors.Cancelled("the client is closed; create a new one")
            if owner not in self._opened:
                default, many = self._channel("UNAVAILABLE", "RESOURCE_EXHAUSTED"), self._channel("UNAVAILABLE")
                # Not for each call: gRPC crashes if another thread closes the channel before the stub is made.
                self._opened[owner] = OpenChannels(default, many, (self._stub(default), self._stub(many)))
            return self._opened[owner]

    def _leave_parent(self) -> None:
        """Forget the channels after a fork. They, and perhaps a lock that is held, belong to the parent process."""
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.Lock()
            self._inherited, self._opened, self._retired = [self._opened, *self._retired], {}, []

    def _channel(self, *retryable_codes: str) -> Any:
        options = _channel_options([*retryable_codes], health_checks=self._health_checks)
        return self._open(self._grpc, [*options, *self._extra_options])

    def _open(self, grpc_module: Any, options: list[tuple[str, Any]]) -> Any:
        options += proxy_options(self.address)
        if self._credentials is None:
            return grpc_module.insecure_channel(self.address, options=options)
        return grpc_module.secure_channel(self.address, self._credentials, options=options)

    def _raise_or_wait(
        self,
        channels: OpenChannels,
        error: grpc.RpcError,
        call: request_messages.PreparedCall[Any],
        delays_s: Iterator[float],
    ) -> None:
        """Wait if no server has started the call and it can be sent again. Otherwise raise the translated error.

        gRPC itself repeats the calls that end with UNAVAILABLE. If a proxy without a server closes a stream early, the
        status is UNKNOWN instead, which gRPC must not repeat, because a proxy also refuses calls with it (HTTP 413).
        """
        assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
        removed = error.code() is grpc.StatusCode.UNKNOWN and (error.details() or "").startswith(STREAM_REMOVED)
        started = request_id_of(error.initial_metadata()) is not None
        if removed and not started and (delay_s := next(delays_s, None)):
            time.sleep(delay_s)
        elif not self._without_watch(channels, error):
            raise self._translate(error, call) from error

    def _without_watch(self, channels: OpenChannels, error: Any) -> bool:
        """Stop checking the health of the server if Watch is refused. Return True if the call can be sent again.

        Such a call was not sent. gRPC itself stops only if the status is UNIMPLEMENTED, but a proxy may refuse Watch
        with another one. The method blocks for up to `WATCH_TIMEOUT_S`.
        """
        if error.code() is not grpc.StatusCode.UNAVAILABLE or WATCH_FAILED not in (error.details() or ""):
            return False
        if self._health_checks and not self._watch_is_refused():
            return False
        with self._lock:
            current = [owner for owner, opened in self._opened.items() if opened is channels]
            if self._health_checks:
                log.warning("%s refuses /grpc.health.v1.Health/Watch; its health is not checked", self.address)
            self._health_checks = False
            for owner in current:
                self._retired.append((owner, self._opened.pop(owner)))
        return True

    def _watch_is_refused(self) -> bool:
        """Call Watch, and return True if something responds but refuses it. Its connection may also have been lost."""
        with self._open(grpc, [*_COMMON_OPTIONS, ("grpc.enable_retries", 0)]) as channel:
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
            try:
                next(watch(_WATCH_REQUEST, timeout=WATCH_TIMEOUT_S, metadata=self._headers), None)
            except grpc.RpcError as error:
                lost = error.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
                return not lost or http_status(error.details() or "") is not None
        return False

    def _take_channels(self) -> list[tuple[Any, Any]]:
        """Mark the client as closed and return all its channels, each with its owner."""
        self._leave_parent()
        with self._lock:
            self._closed = True
            taken = [*self._opened.items(), *self._retired]
            self._opened, self._retired = {}, []
        return [(owner, channel) for owner, channels in taken for channel in channels[:2]]

    def _call_options(self, call: request_messages.PreparedCall[Any], *, one_of_many: bool = False) -> dict[str, Any]:
        """Return the timeout and the metadata of a call."""
        timeout = call.timeout
        if timeout is None and not (one_of_many and isinstance(self.timeout, DefaultTimeout)):
            timeout = self.timeout
        return {"timeout": timeout, "metadata": (*self._headers, *_trace_headers())}

    def _to_send(
        self, call: request_messages.PreparedCall[Any], options: dict[str, Any]
    ) -> request_messages.PreparedCall[Any]:
        """Return the call of the streaming RPC if a call may take long, otherwise the same call."""
        is_long = options["timeout"] is None or options["timeout"] > LONG_CALL_S
        return call.with_heartbeats() if is_long and isinstance(call, request_messages.StreamableCall) else call

    def _translate(self, error: grpc.RpcError, call: request_messages.PreparedCall[Any]) -> errors.CamserveError:
        return errors.from_rpc(
            error,
            address=self.address,
            timeout_s=self._call_options(call)["timeout"],
            explains=call.rpc.removesuffix("Stream") in _STREAMS,
        )


class BlockingConnection(Connection):
    """Base class of the clients whose calls block."""

    def close(self) -> None:
        """Close the connection and cancel all calls in flight. The client cannot be used afterwards."""
        for _, channel in self._take_channels():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def channel_credentials(
    *, tls: bool = False, ca: Pem | None = None, certificate: Pem | None = None, key: Pem | None = None
) -> grpc.ChannelCredentials | None:
    """Return the TLS credentials of a channel.

    Args:
        tls: True to use TLS with the certificate authorities that gRPC trusts by default.
        ca: Certificate authorities to trust instead.
        certificate: Certificate chain of the client. Requires `key`.
        key: Private key of `certificate`, unencrypted.

    Returns:
        The credentials, or None if no argument asks for TLS.

    Raises:
        InvalidArgument: A certificate or key is missing or invalid.
        OSError: A PEM file cannot be read.
    """
    if (certificate is None) != (key is None):
        missing = "key" if key is None else "certificate"
        raise InvalidArgument(f"expected both certificate and key, but {missing} is missing", field="certificate")
    if not tls and ca is None and certificate is None:
        return None
    return _ssl_credentials(*map(_read_pem, (ca, key, certificate)))


def _read_pem(pem: Pem | None) -> bytes | None:
    return pem if pem is None or isinstance(pem, bytes) else Path(pem).read_bytes()


def _ssl_credentials(ca: bytes | None, key: bytes | None, certificate: bytes | None) -> grpc.ChannelCredentials:
    """Return TLS credentials after checking them.

    gRPC itself only logs an invalid certificate, and calls then fail after their timeout.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca is not None:
            context.load_verify_locations(cadata=ca.decode())
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument("ca contains no certificate; expected certificates in PEM format", field="ca") from error
    try:
        if certificate is not None and key is not None:
            with tempfile.NamedTemporaryFile() as file:  # The ssl module can read certificates only from a file.
                file.write(key + b"\n" + certificate)
                file.flush()
                context.load_cert_chain(file.name, password="")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(
            "certificate and key do not match or are invalid; expected a certificate chain and its unencrypted key in "
            "PEM format",
            field="certificate",
        ) from error
    except OSError:  # No temporary file could be written. The TLS handshake reports invalid certificates in this case.
        pass
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _trace_headers() -> list[tuple[str, str]]:
    """Return the W3C trace context of the current OpenTelemetry span, or an empty list if there is no span."""
    if "opentelemetry.trace" not in sys.modules:  # The caller does not use OpenTelemetry.
        return []
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return [*carrier.items()]
