"""Network that a test can hold on one node of a cluster: while it is loaded, or while an engine evaluates an image."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor, nn

from tests.nets import tiny_cnn

# Folder with a file hold-NODE for each node whose engines are held, and hold-load-NODE for each node that loads no
# network. Without this variable, none is held. An engine that is held creates the file held-NODE-PID.
FOLDER = "CAMSERVE_TEST_HOLD"
NODE = "CAMSERVE_TEST_NODE"
# Normalised values of a white image are above 2; those of all other images of the tests have a mean below 1.
_WHITE = 1.5


class HeldNet(nn.Module):
    """The tiny network, which waits at a white image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().mean(dim=(1, 2, 3)).max()) > _WHITE:
            _wait("hold")
        logits: Tensor = self.net(x)
        return logits


def held_net() -> HeldNet:
    """Return the network with the weights of `tiny_cnn`."""
    _wait("hold-load")
    return HeldNet()


def _wait(name: str) -> None:
    """Wait while there is a file with this name and that of the node."""
    folder, node = os.environ.get(FOLDER), os.environ.get(NODE)
    while folder and Path(folder, f"{name}-{node}").exists():
        Path(folder, f"held-{node}-{os.getpid()}").touch()
        time.sleep(0.02)
