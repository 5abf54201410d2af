"""Where and of what the figures are."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def facts(device: torch.device) -> dict[str, str]:
    """Machine, versions, commit and date. Figures are put together if all but date and commit are the same."""
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def commit() -> str:
    """The short name of the commit, with a remark if what is measured has been changed since."""
    name = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--", "server", "client", "benchmarks")
    return f"{name} with changes" if changed else name


def cpu_name() -> str:
    """As the kernel calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
