"""The connection that both clients make: where to, how it is secured, what is tried again, what goes with each call."""

from __future__ import annotations

import json
import ssl
import sys
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import grpc

from camserve import errors, images, request_messages
from camserve.addresses import is_loopback
from camserve.errors import InvalidArgument
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub
from camserve.version import __version__

__all__ = ["DEFAULT_ADDRESS", "DEFAULT_TIMEOUT_S", "Connection", "Pem"]

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 30.0

# A PEM file, or what is in it.
Pem: TypeAlias = "str | PathLike[str] | bytes"

SERVICE = pb.DESCRIPTOR.services_by_name["ExplainService"].full_name

# Often enough for firewalls to remember an idle connection, and to learn that a machine is gone before its turn comes.
# Servers that allow fewer pings than that close the connection: ours allows one every 10 s.
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", images.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", images.MAX_MESSAGE_BYTES),
    # What is larger than this is not sent again: by default 256 KiB, less than a photograph.
    ("grpc.per_rpc_retry_buffer_size", images.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # By default two minutes, for which a server that is back would not be found.
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.primary_user_agent", f"camserve/{__version__}"),
]


def _options(retried: list[str]) -> list[tuple[str, Any]]:
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": SERVICE},
        "methodConfig": [
            {
                "name": [{"service": SERVICE}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 4,
                    "retryableStatusCodes": retried,
                },
            }
        ],
    }
    keepalive = [
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # of what was sent and not acknowledged
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # of the ping itself; by default a minute
    ]
    return [*_OPTIONS, *keepalive, ("grpc.service_config", json.dumps(config))]


class Connection:
    """What the blocking and the awaited client have in common."""

    _grpc: ClassVar[Any] = grpc
    # Options of its channels beside those of all.
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
    ) -> None:
        self.address = address
        self.timeout = timeout
        # Visible ASCII is what a header can hold; the token itself is not to be in a message.
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise InvalidArgument("a token is visible ASCII characters, without spaces", field="token")
        self._credentials = credentials(tls=tls, ca=ca, certificate=certificate, key=key)
        self._headers: list[tuple[str, str]] = []
        if self._credentials is not None:
            if token:
                bearer = grpc.access_token_call_credentials(token)
                self._credentials = grpc.composite_channel_credentials(self._credentials, bearer)
        elif token:
            if not is_loopback(address):
                raise InvalidArgument(
                    f"a token goes to {address} only by TLS, or anybody on the way could read it: give tls or ca",
                    field="token",
                )
            self._headers = [("authorization", f"Bearer {token}")]
        # Those of many that are refused by a full server wait here, not there: each shall have its whole timeout.
        self._channels = [self._channel("UNAVAILABLE", "RESOURCE_EXHAUSTED"), self._channel("UNAVAILABLE")]
        self._stub, self._stub_for_many = map(ExplainServiceStub, self._channels)

    def _channel(self, *retried: str) -> Any:
        options = [*_options([*retried]), *proxy(self.address), *self._extra_options]
        if self._credentials is None:
            return self._grpc.insecure_channel(self.address, options=options)
        return self._grpc.secure_channel(self.address, self._credentials, options=options)

    def _call_options(self, call: request_messages.PreparedCall[Any]) -> dict[str, Any]:
        """What goes with the call's request."""
        timeout = self.timeout if call.timeout is None else call.timeout
        return {"timeout": timeout, "metadata": (*self._headers, *_trace())}

    def _translate(self, error: grpc.RpcError, call: request_messages.PreparedCall[Any]) -> errors.CamserveError:
        return errors.from_rpc(error, address=self.address, timeout_s=self._call_options(call)["timeout"])


def credentials(
    *, tls: bool = False, ca: Pem | None = None, certificate: Pem | None = None, key: Pem | None = None
) -> grpc.ChannelCredentials | None:
    """Those of TLS, if anything asks for it. Raises OSError and InvalidArgument."""
    if (certificate is None) != (key is None):
        raise InvalidArgument("a certificate needs its key, and a key its certificate", field="certificate")
    if not tls and ca is None and certificate is None:
        return None
    return _tls(*map(_read, (ca, key, certificate)))


def proxy(address: str) -> list[tuple[str, Any]]:
    """Options of a channel: what goes to this machine, in plaintext perhaps, takes no detour."""
    return [("grpc.enable_http_proxy", 0)] if is_loopback(address) else []


def _read(pem: Pem | None) -> bytes | None:
    return pem if pem is None or isinstance(pem, bytes) else Path(pem).read_bytes()


def _tls(ca: bytes | None, key: bytes | None, certificate: bytes | None) -> grpc.ChannelCredentials:
    """Raises InvalidArgument for what gRPC would only log, waiting for the timeout."""
    known = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca is not None:
            known.load_verify_locations(cadata=ca.decode())
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument("ca holds no certificate in PEM", field="ca") from error
    try:
        if certificate is not None and key is not None:
            with tempfile.NamedTemporaryFile() as both:  # which ssl reads from a file only
                both.write(key + b"\n" + certificate)
                both.flush()
                known.load_cert_chain(both.name, password="")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(
            "no PEM, or the key is encrypted or of another certificate", field="certificate"
        ) from error
    except OSError:  # nowhere to write: what is wrong with them will show in the handshake
        pass
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _trace() -> list[tuple[str, str]]:
    """The W3C trace context of the caller's current span, if there is one."""
    if "opentelemetry.trace" not in sys.modules:  # nobody can have started a span
        return []
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return [*carrier.items()]
