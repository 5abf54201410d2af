"""Declarations that allow importing torchvision if its C++ operators cannot load.

This happens if torch is a CPU build and torchvision a CUDA build. `import torchvision` registers fake implementations
for two operators and fails if they are not declared. Models and transforms do not use the two operators, so declaring
them is enough. Import this module before torchvision or timm.
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
        pass  # the extension was built for another torch
    missing = [operator for operator in ("nms", "qnms") if not hasattr(torch.ops.torchvision, operator)]
    if not missing:
        return None
    # A fragment does not conflict with other code in the process that has declared one of the operators.
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in missing:
        library.define(  # type: ignore[no-untyped-call]
            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    return library


_library = _declare_missing()  # the declarations last as long as this object
