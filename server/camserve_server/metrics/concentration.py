"""Concentration of a map: the distribution of its mass over the pixels. It does not measure correctness.

Entropy: Evaluating and Aggregating Feature-based Model Explanations, Bhatt, Weller, Moura 2020, arXiv:2005.00631, where
it is called complexity. The mass of the top decile is a point of the Lorenz curve, whose Gini index is the sparseness
of Concise Explanations of Neural Networks using Adversarial Training, Chalasani et al. 2020, arXiv:1810.06583.
"""

from __future__ import annotations

from torch import Tensor

from camserve_server.maps import concentration
from camserve_server.plan import Image, MetricResult, Plan, Targets
from camserve_server.registry import Sizes, metric


def _none(sizes: Sizes) -> int:
    return 0


@metric("entropy", title="Normalised entropy", paper="arXiv:2005.00631", rows=_none, higher_is_better=False)
def entropy(x: Image, c: Targets, S: Tensor) -> Plan[MetricResult]:
    """Normalised entropy of the map, in [0, 1]: 1 for an even map, 0 for a single pixel.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].

    Returns:
        −Σ q log q / log(H·W) of q = S / Σ S, in [0, 1].
    """
    yield from ()
    return MetricResult(concentration.entropy(S))


@metric("top-decile-mass", title="Mass of the top decile", paper="arXiv:1810.06583", rows=_none, higher_is_better=True)
def top_decile_mass(x: Image, c: Targets, S: Tensor) -> Plan[MetricResult]:
    """Share of the map's mass in the highest tenth of the pixels, in [0.1, 1]: 0.1 for an even map.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].

    Returns:
        The share, in [0.1, 1].
    """
    yield from ()
    return MetricResult(concentration.top_decile_mass(S))
