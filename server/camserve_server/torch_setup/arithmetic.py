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
    that wants other settings waits until the threads before it have finished. Loads and batches do not
    wait for each other. The settings of the program return when the last of both has ended.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # in order of arrival, so that no thread waits forever
        self._users = 0
        self._loads = 0
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
            self._remember()
            self._users += 1
            self._tf32 = tf32
            _apply(tf32)

    def leave(self) -> None:
        """Restore the settings of the loads or of the program if no thread uses these any more."""
        with self._changed:
            self._users -= 1
            self._restore_if_unused()
            self._changed.notify_all()

    def begin_load(self) -> None:
        """Forbid TF32 without waiting, except while other threads need it."""
        with self._changed:
            self._remember()
            self._loads += 1
            if not self._users:
                _apply(tf32=False)

    def end_load(self) -> None:
        """Restore the settings of the program if no batch and no other load runs."""
        with self._changed:
            self._loads -= 1
            self._restore_if_unused()

    def _remember(self) -> None:
        """Note the settings of the program, which are the current ones if nothing has changed them."""
        if not self._users and not self._loads:
            self._restore = _restore_settings()

    def _restore_if_unused(self) -> None:
        if self._users:
            return
        if self._loads:
            _apply(tf32=False)
        else:
            self._restore()

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

    The settings of batches of engines take precedence while they run.
    """
    _settings.begin_load()
    try:
        yield
    finally:
        _settings.end_load()


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
