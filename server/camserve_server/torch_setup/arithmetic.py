"""Arithmetic of GPUs: whether they may round float32 to TF32."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["full_precision", "gpu_arithmetic"]


class _Settings:
    """The settings of the process, which several threads may use at a time if they want the same.

    torch has these settings once for all threads. The engine of each GPU runs batches on its own thread, so a thread
    that wants other settings waits until the threads before it have finished.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # in order of arrival, so that no thread waits forever
        self._users = 0
        self._tf32 = False
        self._restore: Callable[[], None] = lambda: None

    def enter(self, tf32: bool) -> None:
        """Wait until no other thread needs other settings, and apply them."""
        with self._changed:
            if self._waiting or not self._fits(tf32):
                place = object()
                self._waiting.append(place)
                self._changed.wait_for(lambda: self._waiting[0] is place and self._fits(tf32))
                self._waiting.popleft()
                self._changed.notify_all()
            if not self._users:
                self._restore = _restore_settings()
            self._users += 1
            self._tf32 = tf32
            _apply(tf32)

    def leave(self) -> None:
        """Restore the settings of the program if no thread uses these any more."""
        with self._changed:
            self._users -= 1
            if not self._users:
                self._restore()
                self._changed.notify_all()

    def _fits(self, tf32: bool) -> bool:
        return not self._users or self._tf32 == tf32


_settings = _Settings()


@contextmanager
def gpu_arithmetic(*, tf32: bool) -> Iterator[None]:
    """Permit or forbid TF32 inside the context, and select deterministic convolutions.

    The settings belong to the process. Threads can be inside at the same time if they want the same; others wait. The
    context restores the settings of the program around it when the last thread leaves. Contexts must not be nested.

    Args:
        tf32: True to let convolutions and matrix products round their float32 inputs to 10 bits.
    """
    _settings.enter(tf32)
    try:
        yield
    finally:
        _settings.leave()


@contextmanager
def full_precision() -> Iterator[None]:
    """Forbid TF32 inside the context, without waiting for other threads: for the load of a model, which takes seconds.

    Batches of engines change the settings meanwhile.
    """
    restore = _restore_settings()
    _apply(tf32=False)
    try:
        yield
    finally:
        restore()


def _apply(tf32: bool) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    cudnn.deterministic = True


def _restore_settings() -> Callable[[], None]:
    """Return a function that restores the current settings."""
    cudnn, restore_tf32, deterministic = torch.backends.cudnn, _restore_tf32(), torch.backends.cudnn.deterministic

    def restore() -> None:
        restore_tf32()
        cudnn.deterministic = deterministic

    return restore


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
