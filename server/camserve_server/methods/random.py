"""Random: A Benchmark for Interpretability Methods in Deep Neural Networks.

Hooker, Erhan, Kindermans, Kim 2019, arXiv:1806.10758.
"""

from __future__ import annotations

import torch

from camserve_server.plan import Image, Plan, SaliencyMaps, Targets
from camserve_server.registry import method
from camserve_server.rows import generator


@method("random", title="Random", paper="arXiv:1806.10758", rows=lambda sizes: 0, class_agnostic=True)
def random(x: Image, c: Targets, *, seed: int) -> Plan[SaliencyMaps]:
    """Every pixel by chance: it explains nothing, and puts the pixels in an order that means nothing.

    x [3, H, W], c [T] class indices → maps [T, H, W], unitless, in [0, 1).

    Equations:
        S_ij = U(0, 1)

    Advice:
        A control for metrics. Take several seeds: what a metric gives them is the chance level that a method has to
        beat, and how far they lie apart is what a difference has to exceed.
    """
    # Keyed by the size: the metrics of the same request draw from the same seed.
    S = torch.rand(x.size, generator=generator(seed, *x.size)).to(x.tensor)
    yield from ()
    return SaliencyMaps(S.expand(len(c), -1, -1))
