"""Settings of GPU arithmetic, which belong to the process, when several threads need them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from camserve_server.torch_setup.arithmetic import full_precision, gpu_arithmetic
from tests.support import TIMEOUT_S


def settings() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.deterministic


class Thread:
    """A thread that enters `gpu_arithmetic` and stays inside until `leave`."""

    def __init__(self, tf32: bool, note: Callable[[Thread], None] = lambda thread: None) -> None:
        self.inside, self._leave = threading.Event(), threading.Event()
        self.seen: tuple[bool, bool, bool] | None = None
        self._tf32, self._note = tf32, note
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with gpu_arithmetic(tf32=self._tf32):
            self._note(self)
            self.inside.set()
            assert self._leave.wait(TIMEOUT_S)
            self.seen = settings()

    def leave(self) -> None:
        self._leave.set()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


def test_threads_that_want_the_same_are_inside_together() -> None:
    before = settings()
    threads = [Thread(tf32=True), Thread(tf32=True)]
    for each in threads:
        assert each.inside.wait(TIMEOUT_S)
    for each in threads:
        each.leave()
        assert each.seen == (True, True, True), "the thread that leaves first does not change the settings of the other"
    assert settings() == before


def test_thread_that_wants_other_settings_waits_and_is_not_overtaken() -> None:
    before, order = settings(), list[Thread]()
    first = Thread(True, order.append)
    assert first.inside.wait(TIMEOUT_S)
    other = Thread(False, order.append)
    assert not other.inside.wait(0.1)
    later = Thread(True, order.append)
    assert not later.inside.wait(0.1), "it would let the other thread wait forever"
    first.leave()
    assert other.inside.wait(TIMEOUT_S)
    assert not later.inside.wait(0.1)
    other.leave()
    assert later.inside.wait(TIMEOUT_S)
    later.leave()
    assert order == [first, other, later]
    assert (first.seen, other.seen, later.seen) == ((True,) * 3, (False, False, True), (True,) * 3)
    assert settings() == before


@pytest.fixture
def tf32_program() -> Iterator[None]:
    """Let the program itself permit TF32, so that its settings differ from those of loads."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = settings()
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = True, True, False
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.usefixtures("tf32_program")
def test_load_that_ends_first_leaves_the_settings_of_batches(tf32: bool) -> None:
    before = settings()
    with full_precision():
        batch = Thread(tf32)
        assert batch.inside.wait(TIMEOUT_S)
    batch.leave()
    assert batch.seen == (tf32, tf32, True)
    assert settings() == before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.usefixtures("tf32_program")
def test_load_that_begins_during_a_batch_does_not_change_its_settings(tf32: bool) -> None:
    before = settings()
    batch = Thread(tf32)
    assert batch.inside.wait(TIMEOUT_S)
    with full_precision():
        assert settings() == (tf32, tf32, True)
        batch.leave()
        assert settings() == (False, False, True), "only the load is left"
    assert batch.seen == (tf32, tf32, True)
    assert settings() == before


@pytest.mark.usefixtures("tf32_program")
def test_loads_at_a_time_restore_the_settings_of_the_program() -> None:
    before = settings()
    first, second = full_precision(), full_precision()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings() == (False, False, True)
    second.__exit__(None, None, None)
    assert settings() == before
