"""Entry point of a front-end process, which the engine process starts."""

import signal

from camserve_server.service.frontends.control import Control


def main() -> None:
    """Run a front end until the engine process stops it or ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the engine process decides when its front ends end
        signal.signal(number, signal.SIG_IGN)
    control = Control()
    from camserve_server.service.frontends.process import serve  # takes a second

    serve(control)


if __name__ == "__main__":
    main()
