"""The web server of the page: its address and its life."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable

import uvicorn

from camserve import aio
from camserve.addresses import is_loopback_host, require_host_port, split_host_port
from camserve.errors import InvalidArgument
from camserve_ui.app import create_app

__all__ = ["DEFAULT_LISTEN", "run"]

DEFAULT_LISTEN = "127.0.0.1:8050"
# Seconds that streams may take to end after Ctrl-C.
_GRACE_S = 2


def run(
    client: aio.Client,
    listen: str = DEFAULT_LISTEN,
    *,
    insecure: bool = False,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM. The client is closed at the end.

    Args:
        client: The client of the camserve server that explains the images.
        listen: "HOST:PORT" of the page. Port 0 selects a free one.
        insecure: True to permit addresses that other machines can reach. The page has neither TLS nor a login.
        on_ready: Receives the URL of the page when it can be opened.

    Raises:
        InvalidArgument: The address is malformed, or other machines can reach it and `insecure` is False.
        OSError: The address cannot be bound; the message names it.
    """
    try:
        host, port = split_host_port(require_host_port(listen))
    except ValueError as error:
        raise InvalidArgument(str(error), field="listen") from error
    if not is_loopback_host(listen) and not insecure:
        raise InvalidArgument(
            f"other machines can reach {listen}, and the page has neither TLS nor a login; listen on 127.0.0.1, or "
            "permit the address with insecure",
            field="listen",
        )
    _keep_contents_out_of_logs()
    with _listener(host, int(port), listen) as listener:
        config = uvicorn.Config(
            create_app(client, check_host=not insecure),
            # Otherwise the log would contain addresses of visitors and names of files.
            access_log=False,
            log_level=logging.WARNING,
            http="h11",
            loop="asyncio",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        shown = f"[{host}]" if ":" in host else host
        on_ready(f"http://{shown}:{listener.getsockname()[1]}/")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn repeats the signal after it has stopped
            uvicorn.Server(config).run(sockets=[listener])


def _listener(host: str, port: int, listen: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # The text of the operating system; Python adds the address to it. Errors of names have negative numbers.
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise OSError(f"cannot listen on {listen}: {why}; choose another address with --listen") from error


def _keep_contents_out_of_logs() -> None:
    """Silence messages of image libraries, which quote metadata of files."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
