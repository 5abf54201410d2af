"""ADCC: Revisiting The Evaluation of Class Activation Mapping for Explainability.

Poppi, Cornia, Baraldi, Cucchiara 2021, arXiv:2104.10252.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camserve_server.plan import Cached, Explainer, Image, MetricResult, Plan, Score, Targets
from camserve_server.registry import Sizes, metric
from camserve_server.rows import Masked, resize


def _rows(sizes: Sizes) -> int:
    return 1 + sizes.rows_per_map


@metric("adcc", title="ADCC", paper="arXiv:2104.10252", rows=_rows, higher_is_better=True)
def adcc(x: Image, c: Targets, S: Tensor, *, explain: Explainer) -> Plan[MetricResult]:
    """Harmonic mean of coherency, simplicity and the remaining probability, in [0, 1].

    Coherency is (1 + r) / 2, where r is the correlation of S and the map of x ⊙ S. Simplicity is 1 − mean S. The third
    term is 1 − average drop. A map that explains nothing has a low value of at least one of them.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        explain: Method that made the map.

    Returns:
        The harmonic mean (eq. 8), in [0, 1].
    """
    scores = yield from Cached("masked", 1, lambda: iter(Score(Masked(x, S[None], mask=resize), c)))
    p, o = float(c.p[0]), float(scores.probabilities[0, 0])
    kept = 0.0 if p == 0 else 1 - max(p - o, 0.0) / p
    other = yield from explain(x.with_tensor(x.tensor * S))
    parts = [(1 + _correlation(S, other)) / 2, 1 - float(S.mean()), kept]
    return MetricResult(3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation, in [−1, 1]. It is −1 if one map is constant."""
    a, b = a.flatten().double(), b.flatten().double()
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return float(torch.dot(a, b) / norm) if norm > 0 else -1.0
