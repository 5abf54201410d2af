"""The tests with the mark `gpu` on simulated GPUs, if this machine has no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import TIMEOUT_S

ROOT = Path(__file__).parents[1]
MARK = "mark.gpu"
FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tests", "benchmarks")
    for path in (ROOT / folder).rglob("test_*.py")
    if f"pytest.{MARK}" in path.read_text(encoding="utf-8") and path.name != "test_monitoring.py"  # needs the memory
)
# They need the memory of a GPU, its speed, or torch.compile.
NOT_SIMULATED = (
    "test_graphs_with_shared_memory",
    "test_failed_recording_leaves_no_trace",
    "test_gpu_has_at_most_two_unfinished_batches",
    "compiled",
)
SMOKE = """
import torch
x = torch.ones(3, device="cuda")
assert (x + x).tolist() == [2, 2, 2]
for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
    try:
        x + other
    except RuntimeError as error:
        assert "on the same device" in str(error)
    else:
        raise AssertionError("tensors of two devices were added")
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests run on the GPU of this machine")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("file", FILES)
def test_gpu_tests_pass_on_simulated_gpus(file: str) -> None:
    chosen = ["-m", "gpu", "-k", " and ".join(f"not {each}" for each in NOT_SIMULATED)]
    done = _python("-m", "pytest", "-p", "tests.simulated_gpu", "-p", "no:cacheprovider", "-q", file, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, "all these tests should run"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_tensors_of_several_devices_cannot_be_added() -> None:
    done = _python("-c", f"import tests.simulated_gpu\n{SMOKE}")
    assert done.returncode == 0, done.stderr


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python without the settings of this pytest process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CAMSERVE_"))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=env, timeout=TIMEOUT_S, capture_output=True, text=True)
