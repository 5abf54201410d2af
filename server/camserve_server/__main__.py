"""`python -m camserve_server` and `camserve serve`: reads the configuration, serves, says how it went."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from camserve_server.config import read
from camserve_server.errors import ConfigError
from camserve_server.service.logs import log_to_stderr
from camserve_server.service.server import Server, run


def serve(
    *, config: Path | None = None, listen: str | None = None, device: str | None = None, insecure: bool | None = None
) -> int:
    """Serves until it is told to stop. Returns the exit status: 0 after a drain, 1 if it broke, 2 if misconfigured."""
    try:
        settings = read(config, listen=listen, device=device, insecure=insecure)
        log_to_stderr(settings)
        return asyncio.run(run(settings, _say_ready))
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


def _say_ready(server: Server) -> None:
    health = f", health on {server.health_address}" if server.health_address else ""
    print(f"camserve is ready on {server.address}{health}, serving {', '.join(server.models)}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("this takes no arguments; `camserve serve` does")
    sys.exit(serve())
