"""An explainer for KServe: it answers requests of KServe's protocols with the maps of a camserve server.

The package is built on the `kserve` SDK and on `camserve.aio.Client`. A process that contains it cannot also contain
the Open Inference Protocol of `camserve_server`, because both register the same protobuf messages.
"""

from __future__ import annotations

import sys
from unittest import mock

with mock.patch.object(sys, "argv", sys.argv[:1]):  # The SDK parses the arguments of the process when it is imported.
    import kserve  # noqa: F401

from camserve_kserve.server import Settings, run

__all__ = ["Settings", "run"]
