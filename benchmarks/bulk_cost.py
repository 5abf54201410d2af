"""Estimate of the time that a bulk run takes on several GPUs: the table of docs/bulk.md.

`python -m benchmarks.bulk_cost` prints it. The estimate uses the measured times of one GPU in
`benchmarks/simulation/profiles` and assumes that the engines do not slow each other down.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import table_text
from benchmarks.results import Table
from benchmarks.simulation import profile
from benchmarks.simulation.profile import MethodCost, Profile
from benchmarks.simulation.settings import TITLES
from camserve_server import registry
from camserve_server.models.model import LaneKind

# Measured: ResNet50 on the GPU of the profile was ready after this time.
START_S = 36.0
# Measured by `python -m benchmarks.bulk_driver` on two cores of an Intel Xeon, 2026-11-27, the slower one of two runs.
DRIVER_S = 1 / 577
METRICS = ("insertion", "deletion", "average-gain")


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a run.

    Attributes:
        rows: Rows of each image.
        device_s: Seconds of each image on its GPU, in full batches.
        hours: Duration of the run, its start included.
        gpu_hours: Duration times the number of GPUs.
        limit: What limits the rate: "GPU", "host" or "driver".
    """

    rows: int
    device_s: float
    hours: float
    gpu_hours: float
    limit: str


def metric_rows(names: Sequence[str]) -> int:
    """Return the forward rows of metrics with their default parameters for one map."""
    registry.discover()
    one_map = registry.Sizes([], 1, (224, 224))
    metrics = [registry.METRICS[name] for name in names]
    return sum(metric.rows(one_map, **metric.check({}, "")) for metric in metrics)


def device_s(times: Profile, method: MethodCost, further_forward_rows: int) -> float:
    """Return the seconds of one image on its device, if all batches are full.

    Each lane runs b rows in t seconds, and each row adds r seconds: n rows take n · (t / b + r).
    """
    rows: Counter[LaneKind] = Counter({"forward": further_forward_rows})
    for step in method.steps:
        rows[step.kind] += step.rows
    return sum(
        count * (times.batch_s[kind][size] / size + times.row_s.get(kind, 0.0))
        for kind, count in rows.items()
        for size in [times.batch_sizes[kind]]
    )


def cost(times: Profile, method: MethodCost, metrics: Sequence[str], images: int, gpus: int) -> Cost:
    """Estimate the cost of a run with one method.

    T = T_start + N · max(t_device / G, t_host / G, t_driver) for N images on G GPUs. The device and the host of a GPU
    work at the same time, and the driver serves all of them.

    Args:
        times: Times of one GPU and its host.
        method: The rows of the method.
        metrics: Metrics that score each map.
        images: Number of images.
        gpus: Number of GPUs.
    """
    scored = metric_rows(metrics)
    on_device = device_s(times, method, scored)
    by_part: Mapping[str, float] = {"GPU": on_device / gpus, "host": times.host_s / gpus, "driver": DRIVER_S}
    limit = max(by_part, key=by_part.__getitem__)
    hours = (START_S + images * by_part[limit]) / 3600
    return Cost(sum(step.rows for step in method.steps) + scored, on_device, hours, hours * gpus, limit)


def cost_table(times: Profile, images: int, gpus: int) -> str:
    """Return the table of all methods of the profile, without metrics and with the default metrics."""
    rows = []
    for name, method in times.methods.items():
        for metrics in ((), METRICS):
            each = cost(times, method, metrics, images, gpus)
            duration = f"{each.hours:.1f} h" if each.hours >= 1 else f"{60 * each.hours:.0f} min"
            rows.append(
                [
                    TITLES[name],
                    "default" if metrics else "none",
                    f"{each.rows:,}",
                    f"{1e3 * each.device_s:.1f}",
                    each.limit,
                    duration,
                    f"{each.gpu_hours:.1f}",
                ]
            )
    header = ["method", "metrics", "rows of an image", "GPU, ms an image", "limited by", f"{gpus} GPUs", "GPU hours"]
    return table_text(Table("", header, rows))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Estimate the time of a bulk run on several GPUs.")
    parser.add_argument("--images", type=int, default=100_000, help="number of images (default: 100,000)")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: 8)")
    parser.add_argument("--profile", type=Path, default=profile.FOLDER / "h200.json", help="measured times of one GPU")
    options = parser.parse_args()
    print(cost_table(profile.load(options.profile), options.images, options.gpus))


if __name__ == "__main__":
    main()
