"""The entry point of `python -m camserve_server` and `camserve serve`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from camserve_server.config import read_config
from camserve_server.errors import ConfigError
from camserve_server.service.logs import log_to_stderr
from camserve_server.service.server import Server, run


def serve(
    *, config: Path | None = None, listen: str | None = None, device: str | None = None, insecure: bool | None = None
) -> int:
    """Run a server until SIGINT or SIGTERM.

    Args:
        config: The TOML file of the configuration; None for the environment and the defaults only.
        listen: Overrides the address of the server.
        device: Overrides the device.
        insecure: Overrides the permission to listen without TLS.

    Returns:
        The exit status: 0 after a signal, 1 if the engine failed, 2 for an invalid configuration.
    """
    try:
        settings = read_config(config, listen=listen, device=device, insecure=insecure)
        log_to_stderr(settings)
        return asyncio.run(run(settings, _print_ready))
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


def _print_ready(server: Server) -> None:
    health = f", health on {server.health_address}" if server.health_address else ""
    print(f"camserve is ready on {server.address}{health}, serving {', '.join(server.models)}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("`python -m camserve_server` takes no arguments; use `camserve serve`")
    sys.exit(serve())
