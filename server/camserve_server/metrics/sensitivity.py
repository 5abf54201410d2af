"""Sensitivity-max: On the (In)fidelity and Sensitivity of Explanations.

Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, arXiv:1901.09392; with captum's defaults, as the Poly-CAM paper runs it.
"""

from __future__ import annotations

from dataclasses import replace
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
    samples: Annotated[int, Range(1, 1000), "images near the image, a map of each"] = 10,
    radius: Annotated[float, Range(0, 10), "how far a value of the normalised image is moved at most"] = 0.02,
    seed: int,
    explain: Explainer,
) -> Plan[MetricResult]:
    """The largest relative change of the map when the image hardly changes, from 0 up: max ‖S(x′) − S(x)‖ / ‖S(x)‖.

    x [3, H, W], one class, S [H, W] in [0, 1]; x′ lies uniformly within ±radius of x. Definition 3.
    """
    norm = S.double().norm()
    most = 0.0
    for i in range(samples):
        noise = 2 * torch.rand(x.tensor.shape, generator=generator(seed, i)) - 1
        other = yield from explain(replace(x, tensor=x.tensor + radius * noise.to(x.tensor)))
        most = max(most, float((other.double() - S).norm() / norm)) if norm > 0 else 0.0
    return MetricResult(most)
