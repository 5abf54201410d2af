"""`camserve kserve`."""

from __future__ import annotations

from typing import Annotated

import typer

from camserve import aio
from camserve.addresses import is_loopback
from camserve.connection import channel_credentials
from camserve_cli.extras import needs_extra
from camserve_cli.options import ModelName, Server, with_server_options
from camserve_cli.output import errors_as_lines

__all__ = ["kserve"]

# KServe adds these options to the command of an explainer, with underscores.
_PANEL = "KServe"


@with_server_options
def kserve(
    model: ModelName = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on, without a port.")
    ] = "127.0.0.1",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept plaintext from other machines, for example in a pod.")
    ] = False,
    max_body_mib: Annotated[
        int, typer.Option("--max-body-mib", min=1, help="Maximum size of the body of a request.")
    ] = 96,
    model_name: Annotated[
        str,
        typer.Option("--model_name", rich_help_panel=_PANEL, help="Name of the model in paths: the InferenceService."),
    ] = "model",
    http_port: Annotated[
        int, typer.Option("--http_port", rich_help_panel=_PANEL, min=0, max=65535, help="Port of REST.")
    ] = 8080,
    grpc_port: Annotated[
        int, typer.Option("--grpc_port", rich_help_panel=_PANEL, min=0, max=65535, help="Port of gRPC.")
    ] = 8081,
    predictor_host: Annotated[
        str | None,
        typer.Option("--predictor_host", rich_help_panel=_PANEL, help="Ignored: camserve runs the model itself."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", rich_help_panel=_PANEL, help="Ignored: one process answers all requests."),
    ] = None,
    *,
    server: Server,
) -> None:
    """Serve as the explainer of an InferenceService of KServe, and forward requests to a camserve server.

    Ctrl-C stops it after the running requests are finished. docs/kserve.md describes the requests.
    """
    with needs_extra("kserve", "camserve kserve"):
        import camserve_kserve
    if not (insecure or is_loopback(f"[{host}]" if ":" in host else host)):
        raise typer.BadParameter(
            f"{host} accepts plaintext from other machines; if a proxy, a service mesh or a network policy "
            "protects the port, add --insecure",
            param_hint="--host",
        )
    settings = camserve_kserve.Settings(
        name=model_name,
        model=model,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        max_body_bytes=max_body_mib * 2**20,
    )
    with errors_as_lines():
        credentials = channel_credentials(tls=server.tls, ca=server.ca, certificate=server.cert, key=server.key)
        camserve_kserve.run(
            settings,
            server.connection(aio.Client),
            credentials,
            lambda http, grpc: typer.echo(f"camserve kserve is ready on http://{http}, gRPC on {grpc}"),
        )
