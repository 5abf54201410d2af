"""Facts about the machine, the software and the commit of a benchmark run."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def facts(device: torch.device, precision: str = "fp32") -> dict[str, str]:
    """Return machine, precision, versions, commit and date. Runs are combined if all but date and commit are equal."""
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
        "precision": precision,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def commit(checkout: Path = ROOT) -> str:
    """Return the short name of a checkout's commit, with a remark if its working tree differs from it."""
    name = _git(checkout, "rev-parse", "--short", "HEAD") or "unknown"
    changed = _git(checkout, "status", "--porcelain", "--", "server", "client", "benchmarks")
    return f"{name} with changes" if changed else name


def cpu_name() -> str:
    """Return the name of the CPU as reported by the kernel."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(checkout: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return ""
    return done.stdout.strip()
