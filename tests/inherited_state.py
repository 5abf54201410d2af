"""Reset of the process state that pytest inherits and that would change the results of tests.

`tests/conftest.py` imports this module before everything else, because some packages read the environment when they are
imported. Child processes of the tests inherit the state that is set here.
"""

from __future__ import annotations

import os
import signal
import sys

_PREFIXES = ("CAMSERVE_", "OTEL_")
# Terminal settings. GITHUB_ACTIONS makes typer print colours, for example.
_NAMES = ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "NO_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES")


def _reset_environment() -> None:
    """Remove settings of camserve, of OpenTelemetry and of the terminal, and use no proxy for loopback addresses."""
    for name in [*os.environ]:
        if name.startswith(_PREFIXES) or name in _NAMES:
            del os.environ[name]
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost", "::1"]))
    # Otherwise pytest and each of the hundred processes of the tests compile all modules again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # Tests must neither change the user's cache folder nor depend on it. Those of the folder name one of their own.
    os.environ["CAMSERVE_CACHE_DIR"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"  # several pytest processes must not compete for the cores


def _restore_default_signals() -> None:
    """Make this process, and every process that it starts, react to SIGINT and SIGTERM.

    A process inherits ignored and blocked signals from its parent, and Python does not install its handler for SIGINT
    if that signal is ignored at the start. `make test &` in a script, `trap '' INT` and some CI systems start pytest
    in this state. A new process gets the default action of each signal that its parent handles, so that tests can use
    `subprocess` as usual.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_reset_environment()
_restore_default_signals()
