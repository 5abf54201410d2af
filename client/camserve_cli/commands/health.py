"""`camserve health`."""

from __future__ import annotations

import grpc
import typer

from camserve.addresses import proxy_options
from camserve.connection import SERVICE, channel_credentials
from camserve_cli.options import DEFAULT_TIMEOUT_S, Server, with_server_options
from camserve_cli.output import errors_as_lines

__all__ = ["health"]

# A grpc.health.v1 request with the service as field 1, and a response with field 1 = 1 (SERVING). The command encodes
# them itself, because the thin client does not depend on grpcio-health-checking.
_REQUEST = bytes([0x0A, len(SERVICE)]) + SERVICE.encode()
_SERVING = b"\x08\x01"


@with_server_options
def health(*, server: Server) -> None:
    """Check that a server is ready. The exit status is 0 if it is ready and 1 if it is not.

    Health checks need no token. They need no certificate if `--address` is the `health_listen` address of the server.
    """
    with errors_as_lines():
        credentials = channel_credentials(tls=server.tls, ca=server.ca, certificate=server.cert, key=server.key)
    options = proxy_options(server.address)
    with (
        grpc.secure_channel(server.address, credentials, options)
        if credentials
        else grpc.insecure_channel(server.address, options)
    ) as channel:
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/grpc.health.v1.Health/Check", None, None
        )
        try:
            ready = check(_REQUEST, timeout=DEFAULT_TIMEOUT_S if server.timeout is None else server.timeout) == _SERVING
        except grpc.RpcError as error:
            typer.echo(f"error: {server.address}: {error.code().name}: {error.details()}", err=True)
            raise typer.Exit(1) from None
    typer.echo("ready" if ready else "not ready")
    raise typer.Exit(0 if ready else 1)
