"""Control of a front end by the engine process: lines on the standard input of the front end.

This module imports only the standard library, so that a front end can be stopped while it imports all others.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Any

READY, STOP = "ready", "stop"  # the lines that a front end writes and reads
_END_S = 10.0


class Control:
    """Reads the settings, then follows the standard input on a thread, which works even if the event loop is blocked.

    The end of the input means that the engine process has ended. Then this process ends at once.

    Attributes:
        settings: What the engine process has written in the first line.
        stop: Is called when this front end must stop; until it is set, the process ends at once.
    """

    def __init__(self) -> None:
        self.stop: Callable[[], object] = lambda: os._exit(0)
        self.settings: dict[str, Any] = json.loads(sys.stdin.readline() or "{}")
        self._thread = threading.Thread(target=self._follow, name="control", daemon=True)
        self._thread.start()

    def wait_for_end(self) -> None:
        """Wait some seconds for the end of the input, which ends this process.

        The link is lost first if the engine process has been killed, and this process must still remove its folder.
        """
        self._thread.join(_END_S)

    def _follow(self) -> None:
        for line in sys.stdin:
            if line.strip() == STOP:
                self.stop()
        shutil.rmtree(self.settings.get("folder", ""), ignore_errors=True)  # the engine process could not remove it
        os._exit(1)
