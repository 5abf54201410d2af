"""`camserve health`."""

from __future__ import annotations

import grpc
import typer

from camserve.connection import SERVICE, channel_credentials, proxy_options
from camserve_cli.options import Server, asks
from camserve_cli.output import errors_as_lines

__all__ = ["health"]

# grpc.health.v1's request, with the service as its field 1, and its answer, with field 1 = 1 for SERVING: not worth a
# package that the thin client does not have.
_REQUEST = bytes([0x0A, len(SERVICE)]) + SERVICE.encode()
_SERVING = b"\x08\x01"


@asks
def health(*, server: Server) -> None:
    """Say whether a server is ready, with exit code 0 if it is and 1 if not; for probes and scripts.

    No token is needed, and no certificate where `--address` is the server's `health_listen`.
    """
    with errors_as_lines():
        given = channel_credentials(tls=server.tls, ca=server.ca, certificate=server.cert, key=server.key)
    options = proxy_options(server.address)
    with (
        grpc.secure_channel(server.address, given, options) if given else grpc.insecure_channel(server.address, options)
    ) as channel:
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/grpc.health.v1.Health/Check", None, None
        )
        try:
            ready = check(_REQUEST, timeout=server.timeout) == _SERVING
        except grpc.RpcError as error:
            typer.echo(f"error: {server.address}: {error.code().name}: {error.details()}", err=True)
            raise typer.Exit(1) from None
    typer.echo("ready" if ready else "not ready")
    raise typer.Exit(0 if ready else 1)
