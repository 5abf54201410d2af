"""Lets torchvision be imported where its C++ operators cannot load, as with a CPU-only torch beside its CUDA build.

`import torchvision` registers fakes for two operators and fails if nobody has declared them. Models and transforms use
neither, so declaring them is enough. Import this module before torchvision or timm.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _declare_missing() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for extension in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
    except OSError:
        pass  # built for another torch
    missing = [operator for operator in ("nms", "qnms") if not hasattr(torch.ops.torchvision, operator)]
    if not missing:
        return None
    # A fragment, so that whoever else in the process has declared one of them is not in the way.
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in missing:
        library.define(  # type: ignore[no-untyped-call]
            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    return library


_library = _declare_missing()  # declared for as long as this object lives
