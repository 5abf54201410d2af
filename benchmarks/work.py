"""What a section is handed: the networks, how long to measure, and whom to tell how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks.apart import Apart
from benchmarks.subjects import CONFIGS, Subject, subject
from benchmarks.timing import Rates, Side, alternate


@dataclass(eq=False)
class Bench:
    """Measurements take about `seconds` each, a side and round; each side is measured `rounds` times.

    `step` is called before each piece of work with its name, and how many such pieces there are in a section.
    """

    device: torch.device
    seconds: float = 1.5
    rounds: int = 2
    channels: int = 32  # a batch of the peers' loops
    images: int = 8
    callers: int = 16
    names: Sequence[str] = tuple(CONFIGS)
    step: Callable[[str], None] = lambda text: None
    loaded: dict[str, Subject] = field(default_factory=dict)

    @cached_property
    def apart(self) -> Apart:
        """A process with glibc's defaults."""
        return Apart(self.device)

    @cached_property
    def apart_as_served(self) -> Apart:
        """A process that keeps freed memory, as the server does."""
        return Apart(self.device, keeps_memory=self.device.type == "cpu")

    def close(self) -> None:
        """Ends the processes."""
        self.apart.close()
        self.apart_as_served.close()

    def subjects(self, *names: str) -> Iterator[Subject]:
        """Those of the networks that are measured, one after the other; all of them if none is named."""
        for name in self.names:
            if not names or name in names or name not in CONFIGS:
                yield self.subject(name)

    def subject(self, name: str) -> Subject:
        """Loaded when it is first asked for."""
        if name not in self.loaded:
            self.step(f"{name}: loading")
            self.loaded[name] = subject(name, self.device, self.seconds)
        return self.loaded[name]

    def alternate(self, text: str, sides: dict[str, Side]) -> dict[str, Rates]:
        """Measures the sides in turn."""
        return alternate(sides, self.rounds, lambda: self.step(text))
