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
    """Independent random pixels: it explains nothing, and its order of the pixels is arbitrary.

    Args:
        x: Image [3, H, W].
        c: T target classes.
        seed: Seed of the pixels.

    Returns:
        Maps [T, H, W], unitless, in [0, 1).

    Equations:
        S_ij = U(0, 1)

    Advice:
        A control for metrics. Use several seeds: the scores of these maps are the chance level that a method has to
        exceed, and their spread is the smallest difference that means anything.
    """
    # The key separates these numbers from those that metrics of the same request draw with the same seed.
    S = torch.rand(x.size, generator=generator(seed, *x.size)).to(x.tensor)
    yield from ()
    return SaliencyMaps(S.expand(len(c), -1, -1))
