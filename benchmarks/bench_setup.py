"""Settings of a benchmark run: networks, durations and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.separate_process import SeparateProcess
from benchmarks.subjects import CONFIGS, Subject, from_config, served_config
from benchmarks.timing import Rates, Side, alternate


@dataclass(eq=False)
class Bench:
    """Settings and shared state of a benchmark run.

    Attributes:
        device: Device of all measurements.
        seconds: Approximate duration of one measurement of one side.
        rounds: Number of measurements of each side.
        channels: Batch size of the loops of other implementations.
        images: Number of concurrent images for Opti-CAM.
        callers: Number of concurrent callers of the service.
        names: Names of the networks.
        precision: Precision of the networks.
        compiled: True to compile the forward passes of the networks.
        baseline: Checkout of another commit, which the sections "Host" and "Load time" also measure; None for none.
        step: Function that is called with a description before each step.
        loaded: Networks that are already loaded, by name.
    """

    device: torch.device
    seconds: float = 1.5
    rounds: int = 2
    channels: int = 32
    images: int = 8
    callers: int = 16
    names: Sequence[str] = tuple(CONFIGS)
    precision: str = "fp32"
    compiled: bool = False
    baseline: Path | None = None
    step: Callable[[str], None] = lambda text: None
    loaded: dict[str, Subject] = field(default_factory=dict)

    @cached_property
    def separate(self) -> SeparateProcess:
        """Separate process with the default allocator settings of glibc."""
        return SeparateProcess(self.device)

    @cached_property
    def separate_as_served(self) -> SeparateProcess:
        """Separate process that keeps freed memory, as the server does."""
        return SeparateProcess(self.device, keeps_memory=self.device.type == "cpu")

    def close(self) -> None:
        """End the separate processes."""
        self.separate.close()
        self.separate_as_served.close()

    def subjects(self, *names: str) -> Iterator[Subject]:
        """Yield the networks with these names, or all networks of the run if there are no names."""
        for name in self.names:
            if not names or name in names or name not in CONFIGS:
                yield self.subject(name)

    def subject(self, name: str) -> Subject:
        """Return a network and load it on first use."""
        if name not in self.loaded:
            self.step(f"{name}: loading")
            config = served_config(name, self.precision, compile_=self.compiled)
            self.loaded[name] = from_config(config, self.device, self.seconds)
        return self.loaded[name]

    def alternate(self, text: str, sides: dict[str, Side]) -> dict[str, Rates]:
        """Measure the sides alternately."""
        return alternate(sides, self.rounds, lambda: self.step(text))
