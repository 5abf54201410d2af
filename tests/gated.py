"""A network that a test can hold in a server process, so that requests run as long as the test needs them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from torch import Tensor, nn

from tests import nets

GATE = "TEST_GATE"  # environment variable with the path of the gate


class Gated(nn.Module):
    """The tiny network, whose forward pass waits while the file of the gate exists."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        while Path(os.environ[GATE]).exists():
            time.sleep(0.01)
        return self.net(x)  # type: ignore[no-any-return]


class GatedOnEngine(Gated):
    """The tiny network, which waits only on the engine's thread, and creates the file `GATE.reached` there."""

    def forward(self, x: Tensor) -> Tensor:
        if not threading.current_thread().name.startswith("engine"):
            return self.net(x)  # type: ignore[no-any-return]
        Path(f"{os.environ[GATE]}.reached").touch()
        return super().forward(x)
