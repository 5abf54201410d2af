"""Arithmetic of GPUs: whether they may round float32 to TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["gpu_arithmetic"]


@contextmanager
def gpu_arithmetic(*, tf32: bool) -> Iterator[None]:
    """Permit or forbid TF32 inside the context, and select deterministic convolutions.

    The settings belong to the process. The context restores those of the program around it at its end.

    Args:
        tf32: True to let convolutions and matrix products round their float32 inputs to 10 bits.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    restore, deterministic = _restore_tf32(), cudnn.deterministic
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    cudnn.deterministic = True
    try:
        yield
    finally:
        restore()
        cudnn.deterministic = deterministic


def _restore_tf32() -> Callable[[], None]:
    """Return a function that restores the current settings of TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        before = cudnn.allow_tf32, matmul.allow_tf32
    except (
        RuntimeError
    ):  # the program uses `fp32_precision`, which torch has since 2.9; the older names then raise errors
        settings = (cudnn.conv, cudnn.rnn, matmul)  # type: ignore[attr-defined]
        precisions = [each.fp32_precision for each in settings]

        def restore() -> None:
            for each, precision in zip(settings, precisions, strict=True):
                each.fp32_precision = precision
    else:

        def restore() -> None:
            cudnn.allow_tf32, matmul.allow_tf32 = before

    return restore
