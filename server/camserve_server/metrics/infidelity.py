"""Infidelity: On the (In)fidelity and Sensitivity of Explanations.

Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, arXiv:1901.09392; computed as by captum.
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
class Noisy:
    """Noisy images: row i is x − σ ε_i, where ε_i is standard normal noise.

    Attributes:
        x: The image.
        samples: Number of rows.
        sigma: Standard deviation σ of the noise, in units of the normalised image.
        seed: Seed of the noise.
    """

    x: Image
    samples: int
    sigma: float
    seed: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.samples

    def noise(self, i: int) -> Tensor:
        """Return the noise σ ε_i of a row.

        Args:
            i: Index of the row.

        Returns:
            The noise [3, H, W].
        """
        return self.sigma * normal(self.x.tensor.shape, self.seed, i).to(self.x.tensor)

    def make(self, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) [n, 3, H, W]."""
        return torch.stack([self.x.tensor - self.noise(i) for i in range(start, stop)])


def _rows(sizes: Sizes, *, samples: int = 50, **_: object) -> int:
    return samples


@metric("infidelity", title="Infidelity", paper="arXiv:1901.09392", rows=_rows, higher_is_better=False)
def infidelity(
    x: Image,
    c: Targets,
    S: Tensor,
    *,
    samples: Annotated[int, Range(1, 100_000)] = 50,
    sigma: Annotated[float, Range(0, 100)] = 0.2,
    seed: int,
) -> Plan[MetricResult]:
    """Squared error of the map as a prediction of the effect of noise on the logit, ≥ 0.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map [H, W] in [0, 1].
        samples: Number of noisy images.
        sigma: Standard deviation of the noise, in units of the normalised image.
        seed: Seed of the noise.

    Returns:
        E[(β I·S − (y_c(x) − y_c(x − I)))²] over the noise I (definition 1), ≥ 0. S is the same for each colour. β is
        the factor with the lowest error, so the scale of S does not matter.
    """
    rows = Noisy(x, samples, sigma, seed)

    def term(i: int, answer: Scores) -> Tensor:
        predicted = (rows.noise(i).double() * S).sum()
        actual = c.y[0] - answer.logits[0, 0]
        return torch.stack([predicted * predicted, predicted * actual, actual * actual])

    summed = yield from Sum(Score(rows, c), term)
    pp, pa, aa = summed.total[0].tolist()
    beta = pa / pp if pp > 0 else 0.0
    # Rounding can give a negative value. NaN stays NaN in this order of arguments.
    return MetricResult(max((beta * beta * pp - 2 * beta * pa + aa) / samples, 0.0))
