"""Sensitivity-max: On the (In)fidelity and Sensitivity of Explanations.

Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, arXiv:1901.09392; with the defaults of captum, as in the Poly-CAM paper.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from camserve_server.plan import Explainer, Image, MetricResult, Plan, Targets
from camserve_server.registry import Range, Sizes, metric
from camserve_server.rows import generator


def _rows(sizes: Sizes, *, samples: int = 10, **_: object) -> int:
    return samples * sizes.rows_per_map


@metric("sensitivity-max", title="Sensitivity-max", paper="arXiv:1901.09392", rows=_rows, higher_is_better=False)
def sensitivity_max(
    x: Image,
    c: Targets,
    S: Tensor,
    *,
    samples: Annotated[int, Range(1, 1000)] = 10,
    radius: Annotated[float, Range(0, 10)] = 0.02,
    seed: int,
    explain: Explainer,
) -> Plan[MetricResult]:
    """Largest relative change of the map for small changes of the image, ≥ 0: max ‖S(x′) − S(x)‖ / ‖S(x)‖.

    Args:
        x: Image [3, H, W].
        c: The target class.
        S: Map S(x) [H, W] in [0, 1].
        samples: Number of images x′, each of which is explained.
        radius: Largest change of a value of the normalised image. x′ is uniform within ±radius of x.
        seed: Seed of the changes.
        explain: Method that made the map.

    Returns:
        The largest relative change (definition 3), ≥ 0.
    """
    norm = S.double().norm()
    most = 0.0
    for i in range(samples):
        noise = 2 * torch.rand(x.tensor.shape, generator=generator(seed, i)) - 1
        other = yield from explain(x.with_tensor(x.tensor + radius * noise.to(x.tensor)))
        most = max(most, float((other.double() - S).norm() / norm)) if norm > 0 else 0.0
    return MetricResult(most)
