"""Failures that a proxy, a load balancer or gRPC itself reports in the place of the server.

A camserve server adds error details to every error. An error without them comes from somewhere else: this module finds
out from where, and describes the remedy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import grpc

from camserve.addresses import is_loopback, split_host_port, target_hosts

__all__ = ["ADMITTED", "Failure", "describe", "http_status", "proxy_variable", "request_id_of"]

# Key of the initial metadata that a server sends when it starts a call. The value is the request id, UTF-8.
ADMITTED = "camserve-request-id-bin"

_HTTP_STATUS = re.compile(r"Received http2 header with status: (\d{3})")

# HTTP status → what it means for a call, and the remedy.
_HTTP = {
    "403": "it forbids the call; permit the path /camserve.v1.ExplainService/",
    "404": "it has no route for the call; route the path /camserve.v1.ExplainService/ to the server as gRPC",
    "408": "it waited too long for the request; increase its timeout for request bodies",
    "413": "the request is too large for it; send a smaller image, or increase its limit (nginx: client_max_body_size)",
    "502": "it cannot reach the camserve server; check that the server runs and that the proxy connects to it as gRPC",
    "503": "it has no camserve server for the call; check that the server runs and that it is ready",
    "504": "it waited too long for the camserve server; increase its read timeout",
}
_RETRIED_LATER = {"408", "429", "502", "503", "504"}

# Part of the message of gRPC if a connection fails → explanation and remedy.
_HINTS = {
    "backend unhealthy": "the server is loading its models or shutting down",
    "health check call failed": "the server, or a proxy before it, refuses /grpc.health.v1.Health/Watch, with which "
    "the client finds out whether the server is ready; forward it, or pass health_checks=False",
    "WRONG_VERSION_NUMBER": "the server does not use TLS; remove tls, ca and certificate",
    "CERTIFICATE_VERIFY_FAILED": "the client does not trust the authority of the server's certificate; pass it as ca",
    "not in peer certificate|Hostname Verification": "the server's certificate is not valid for this address",
    "Socket closed": "the server may require TLS (pass tls or ca) or a client certificate (pass certificate and key)",
}
# Parts of the messages of gRPC if the connection or the stream was closed. The status is then not that of a server.
_BROKEN = ("Received RST_STREAM", "Stream removed", "Socket closed", "GOAWAY received", "Connection reset")
# Parts of the messages if this process has cancelled the call or closed the channel; a server that stops cancels, too.
_OWN_CANCELLATION = ("Locally cancelled", "Channel closed", "Channel deallocated")


class Failure(NamedTuple):
    """Description of a failure that the server has not described.

    Attributes:
        code: The status code, which may differ from that of gRPC.
        message: Description and remedy.
        reason: Constant for programs. May be empty.
    """

    code: grpc.StatusCode
    message: str
    reason: str = ""


def http_status(details: str) -> str | None:
    """Return the HTTP status that a proxy has responded with, from the message of gRPC, or None."""
    http = _HTTP_STATUS.search(details)
    return http[1] if http else None


def request_id_of(initial_metadata: Iterable[Any] | None) -> str | None:
    """Return the request id of a call that a server has started, or None if no server has started it."""
    value = next((value for key, value in initial_metadata or () if key == ADMITTED), None)
    return None if value is None else bytes(value).decode(errors="replace")


def describe(
    code: grpc.StatusCode, details: str, *, address: str, timeout_s: float | None, started: bool, explains: bool = True
) -> Failure:
    """Describe a failure of a call whose response contains no error details of a camserve server.

    Args:
        code: Status code of gRPC.
        details: Message of gRPC.
        address: Address of the server.
        timeout_s: Timeout of the call in seconds, or None.
        started: The server has started the call.
        explains: The server announces the start of such a call.

    Returns:
        The description.
    """
    failure = _describe(code, details, address, timeout_s, started=started, explains=explains)
    variable = proxy_variable(address)
    if variable is None or failure.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return failure
    name, proxy = variable
    note = f"the environment variable {name} sends the connection through the proxy {proxy}; to bypass it, add the "
    return failure._replace(message=f"{failure.message}; {note}server to no_proxy")


def _describe(
    code: grpc.StatusCode, details: str, address: str, timeout_s: float | None, *, started: bool, explains: bool
) -> Failure:
    if http := http_status(details):
        return _http_failure(http, code, address)
    if "message larger than max" in details:
        return Failure(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"a message is larger than its receiver accepts ({details}); send a smaller image, request fewer or "
            "smaller maps (map_dtype, native_maps), or increase max_message_bytes of the server",
            "TOO_LARGE",
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failure(code, _deadline_message(address, timeout_s, started=started, explains=explains))
    cancelled = code is grpc.StatusCode.CANCELLED and not any(part in details for part in _OWN_CANCELLATION)
    broken = cancelled or code is grpc.StatusCode.UNAVAILABLE or any(part in details for part in _BROKEN)
    if started and (broken or code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)):
        return Failure(
            grpc.StatusCode.UNAVAILABLE,
            f"the connection to {address} was lost after the server had started the call ({details}), and the client "
            "does not repeat a call that was started; if a proxy is between client and server, increase its read "
            "timeout, otherwise look into the server's log",
            "INTERRUPTED",
        )
    if broken:
        hint = next((f"; {hint}" for pattern, hint in _HINTS.items() if re.search(pattern, details)), "")
        return Failure(grpc.StatusCode.UNAVAILABLE, f"no response from a camserve server at {address}: {details}{hint}")
    return Failure(code, details or code.name)


def _http_failure(status: str, code: grpc.StatusCode, address: str) -> Failure:
    problem = _HTTP.get(status, "check the address and the proxy's log")
    message = f"a proxy or another web server at {address} responded with HTTP status {status}: {problem}"
    if status == "413":
        return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, "TOO_LARGE")
    return Failure(grpc.StatusCode.UNAVAILABLE if status in _RETRIED_LATER else code, message)


def _deadline_message(address: str, timeout_s: float | None, *, started: bool, explains: bool) -> str:
    within = f"within {timeout_s:g} s" if timeout_s is not None else "in time"
    if started or not explains:
        return f"no response from {address} {within}; increase the timeout"
    return (
        f"no response from {address} {within}, and the server has not started the call; increase the timeout, or check "
        "that a camserve server runs at this address and that proxies forward /camserve.v1.ExplainService/ and "
        "/grpc.health.v1.Health/Watch without buffering"
    )


def proxy_variable(address: str) -> tuple[str, str] | None:
    """Return the environment variable that makes gRPC connect through an HTTP proxy, and the proxy's HOST:PORT.

    The rules are those of gRPC. A user name and a password of the proxy are removed.

    Args:
        address: Address of the server.

    Returns:
        Name and HOST:PORT, or None if gRPC connects to the server itself.
    """
    if is_loopback(address):
        return None
    name = next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)
    if name is None:
        return None
    excluded = next((os.environ[name] for name in ("no_grpc_proxy", "no_proxy") if os.environ.get(name)), "")
    suffixes = [each.strip() for each in excluded.split(",") if each.strip()]
    if any(host.endswith(suffix) for host in target_hosts(address) for suffix in suffixes):
        return None
    url = os.environ[name]
    proxy = urlsplit(url if "//" in url else f"//{url}").netloc.rpartition("@")[2]
    return name, proxy or split_host_port(url)[0]
