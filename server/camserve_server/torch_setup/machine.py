"""Facts about the machine on which the speed and the bits of a forward pass depend."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# Beginnings of environment variables that select kernels.
_VARIABLES = ("ATEN_", "CUBLAS_", "CUDNN_", "DNNL_", "KMP_", "MKL_", "NVIDIA_TF32_", "OMP_", "ONEDNN_", "TORCH_")
# Keys of /proc/cpuinfo that describe the processor and its instructions.
_CPU_LINES = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")


def machine_facts(device: torch.device) -> dict[str, object]:
    """Return facts about the processor, the libraries of torch and, for a GPU, the device, in types of JSON.

    The number of threads is that of the calling thread.

    Args:
        device: The device of the models.
    """
    return {
        "machine": platform.machine(),
        "processor": cpu_lines(),
        "threads": torch.get_num_threads(),
        "torch": torch.__config__.show(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "environment": sorted([*item] for item in os.environ.items() if item[0].startswith(_VARIABLES)),
        **(_gpu(device) if device.type == "cuda" else {}),
    }


def cpu_lines() -> Sequence[str]:
    """Return the lines of /proc/cpuinfo that name the first processor and its instructions; none on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return ()
    return [line for line in lines if line.partition("\t")[0].rstrip() in _CPU_LINES]


def _gpu(device: torch.device) -> dict[str, object]:
    facts: Any = torch.cuda.get_device_properties(device)
    cudnn: Any = torch.backends.cudnn
    return {
        "gpu": [facts.name, facts.major, facts.minor, facts.multi_processor_count],
        "cudnn": cudnn.version(),
    }
