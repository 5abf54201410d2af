"""Decision whether torch.compile is used, if the configuration leaves it to the server."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

CompileSetting = bool | Literal["auto"]


def use_compile(setting: CompileSetting, device_type: str, obstacle: Callable[[], str]) -> tuple[bool, str]:
    """Decide whether torch.compile is used.

    "auto" uses it on GPUs. On CPUs the gain is small, and a compilation takes long.

    Args:
        setting: The value in the configuration.
        device_type: The type of the model's device, such as "cuda".
        obstacle: Returns why torch.compile cannot work on a GPU of this machine; empty if it can.

    Returns:
        The decision, and the obstacle if "auto" would otherwise use it; empty in all other cases.
    """
    if setting != "auto":
        return setting, ""
    if device_type != "cuda":
        return False, ""
    reason = obstacle()
    return not reason, reason


def compile_obstacle() -> str:
    """Return why torch.compile cannot work on a GPU of this machine; empty if nothing is missing."""
    if find_spec("triton") is None:
        return "Triton, which compiles for GPUs, is not installed"
    if not find_c_compiler(os.environ, shutil.which):
        return "there is no C compiler (gcc, clang, or the one that CC names)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python (Python.h) are missing"
    return ""


def find_c_compiler(environment: Mapping[str, str], which: Callable[[str], str | None]) -> str | None:
    """Return the C compiler with which Triton builds its launchers; None if there is none.

    Triton calls the program that CC names, as one word, and otherwise gcc or clang.

    Args:
        environment: The environment variables.
        which: Returns the path of a program, or None if there is none of this name.
    """
    if "CC" in environment:
        return which(environment["CC"])
    return which("gcc") or which("clang")
