"""`camserve ui`."""

from __future__ import annotations

import threading
import webbrowser
from typing import Annotated

import typer

from camserve import aio
from camserve_cli.extras import needs_extra
from camserve_cli.options import Server, with_server_options
from camserve_cli.output import errors_as_lines

__all__ = ["ui"]


@with_server_options
def ui(
    *,
    server: Server,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the page. Port 0 selects a free one.")
    ] = "127.0.0.1:8050",
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Allow --listen on an address that other machines can reach. The page has neither TLS nor a login: "
            "everybody who reaches it uses the server with your credentials.",
        ),
    ] = False,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Show a web page that explains images. Ctrl-C stops it.

    The page loads images, compares methods, shows maps while they are refined, measures them, and replays receipts.
    --address names the camserve server, --listen the address of the page. Images stay in the browser and in memory;
    nothing is written to disk, and the page loads nothing from the internet.

    With the extra `dicom`, the page also reads DICOM files.
    """
    with needs_extra("ui", "camserve ui"):
        import camserve_ui

    def ready(url: str) -> None:
        typer.echo(f"camserve ui is ready on {url}")
        if browser:
            # A browser in the terminal returns only at its end, and it waits for the page.
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    with errors_as_lines():
        client = server.connection(aio.Client)
        camserve_ui.run(client, listen, insecure=insecure, on_ready=ready)
