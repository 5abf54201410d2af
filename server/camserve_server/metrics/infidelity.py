"""Infidelity: On the (In)fidelity and Sensitivity of Explanations.

Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, arXiv:1901.09392; as captum computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from camserve_server.plan import Image, MetricResult, Plan, Score, Scores, Sum, Targets
from camserve_server.registry import Range, Sizes, metric
from camserve_server.rows import normal


@dataclass(frozen=True, eq=False)
class Disturbed:
    """Row i is x − σ ε_i, ε_i of normal noise."""

    x: Image
    samples: int
    sigma: float
    seed: int

    def __len__(self) -> int:
        return self.samples

    def noise(self, i: int) -> Tensor:
        """σ ε_i, [3, H, W]."""
        return self.sigma * normal(self.x.tensor.shape, self.seed, i).to(self.x.tensor)

    def make(self, start: int, stop: int) -> Tensor:
        return torch.stack([self.x.tensor - self.noise(i) for i in range(start, stop)])


def _rows(sizes: Sizes, *, samples: int = 50, **_: object) -> int:
    return samples


@metric("infidelity", title="Infidelity", paper="arXiv:1901.09392", rows=_rows, higher_is_better=False)
def infidelity(
    x: Image,
    c: Targets,
    S: Tensor,
    *,
    samples: Annotated[int, Range(1, 100_000), "disturbed images"] = 50,
    sigma: Annotated[float, Range(0, 100), "standard deviation of the disturbance, of the normalised image"] = 0.2,
    seed: int,
) -> Plan[MetricResult]:
    """How far the map is from foretelling what a disturbance does to the logit, from 0 up.

    E[(β I·S − (y_c(x) − y_c(x − I)))²] over disturbances I, S being the same for each colour. β is the best factor, so
    that the scale of S does not matter. x [3, H, W], one class, S [H, W] in [0, 1]. Definition 1.
    """
    rows = Disturbed(x, samples, sigma, seed)

    def term(i: int, answer: Scores) -> Tensor:
        told = (rows.noise(i).double() * S).sum()
        done = c.y[0] - answer.logits[0, 0]
        return torch.stack([told * told, told * done, done * done])

    summed = yield from Sum(Score(rows, c), term)
    tt, td, dd = summed.total[0].tolist()
    beta = td / tt if tt > 0 else 0.0
    return MetricResult((beta * beta * tt - 2 * beta * td + dd) / samples)
