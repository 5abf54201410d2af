"""Network that computes almost nothing, so that a server's time is that of its host."""

from __future__ import annotations

import time
from typing import ClassVar

import torch
from torch import Tensor, nn


class NullNet(nn.Module):
    """A pooling, a 1 × 1 convolution, and a linear layer behind the mean.

    Attributes:
        cpu_s: CPU seconds of the calling threads in all forward passes of the process.
    """

    cpu_s: ClassVar[float] = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv, self.relu = nn.AvgPool2d(32), nn.Conv2d(3, 8, 1), nn.ReLU()
        self.gap, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, 10] of images [N, 3, H, W]."""
        start = time.thread_time()
        logits: Tensor = self.fc(self.gap(self.relu(self.conv(self.pool(x)))).flatten(1))
        NullNet.cpu_s += time.thread_time() - start
        return logits


def null_net() -> NullNet:
    """Return the network with random weights of a fixed seed."""
    torch.manual_seed(0)
    return NullNet().eval()
