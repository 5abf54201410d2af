"""The estimate of bulk runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import bulk_cost
from benchmarks.simulation import profile
from benchmarks.simulation.profile import MethodCost, Profile, Step
from tests.processes import completed

ROOT = Path(__file__).parent.parent
TIMES = Profile(
    name="",
    source="",
    batch_sizes={"forward": 10, "ascend": 2},
    batch_s={"forward": {10: 0.1}, "ascend": {2: 0.4}},
    row_s={"forward": 0.01},
    host_s=0.5,
    methods={"opti-cam": MethodCost(7, 7, (Step("forward", 2), Step("ascend", 5)))},
)


def test_cost_follows_the_formula() -> None:
    method = TIMES.methods["opti-cam"]
    assert bulk_cost.device_s(TIMES, method, 0) == pytest.approx(2 * 0.02 + 5 * 0.2)
    assert bulk_cost.device_s(TIMES, method, 10) == pytest.approx(12 * 0.02 + 5 * 0.2)
    on_gpu = bulk_cost.cost(TIMES, method, (), images=1000, gpus=4)
    assert on_gpu.limit == "GPU"
    assert on_gpu.hours * 3600 == pytest.approx(bulk_cost.START_S + 1000 * 1.04 / 4)
    assert on_gpu.gpu_hours == pytest.approx(4 * on_gpu.hours)
    short = MethodCost(2, 2, (Step("forward", 2),))
    assert bulk_cost.cost(TIMES, short, (), images=1000, gpus=4).limit == "host"
    assert bulk_cost.cost(TIMES, short, (), images=1000, gpus=4000).limit == "driver"


def test_page_contains_the_table_of_the_command() -> None:
    table = bulk_cost.cost_table(profile.load(profile.FOLDER / "h200.json"), 100_000, 8)
    assert table in (ROOT / "docs" / "bulk.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_driver_receives_all_maps() -> None:
    """The command runs in a process of its own, because Ray leaves threads and sockets behind."""
    done = completed([sys.executable, "-m", "benchmarks.bulk_driver", "--maps", "40"], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[1-9]\d* maps of 224 × 224 pixels a second\n", done.stdout)
