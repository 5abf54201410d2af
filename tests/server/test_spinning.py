"""The time for which OpenMP threads spin, on idle and on busy machines."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from camserve_server.torch_setup import spinning
from camserve_server.torch_setup.spinning import FIRST_SLEEP_S, LAST_SLEEP_S, WINDOW_S, SpinControl
from tests.processes import completed, started

BATCH_S = 0.1
needs_libgomp = pytest.mark.skipif(spinning.find_libgomp() is None, reason="torch does not use libgomp")


class Machine:
    """Clocks of a machine on which one of two threads lacks a core for a share of the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited = [0.0, 0.0]
        self.spinning_share = self.sleeping_share = 0.0
        self.teams: list[int] = []

    def control(self, threads: int = 2, cores: int = 2) -> SpinControl:
        return SpinControl(threads, cores, self.teams.append, lambda: [*self.waited], lambda: self.now)

    def run(self, control: SpinControl, seconds: float) -> None:
        """Run batches for some seconds."""
        for _ in range(round(seconds / BATCH_S)):
            with control.observing():
                self.now += BATCH_S
                self.waited[1] += BATCH_S * (self.sleeping_share if control.sleeps else self.spinning_share)


def idle_teams() -> int:
    return sum(thread.name == "idle OpenMP team" for thread in threading.enumerate())


def test_threads_spin_on_an_idle_machine() -> None:
    machine = Machine()
    control = machine.control()
    machine.run(control, 60)
    assert not control.sleeps
    assert not machine.teams
    assert control.busy_at == float("-inf")


def test_threads_sleep_while_the_machine_is_busy_and_spin_afterwards() -> None:
    machine = Machine()
    control = machine.control()
    machine.spinning_share, machine.sleeping_share = 0.4, 0.3
    machine.run(control, WINDOW_S + BATCH_S)
    assert control.sleeps
    assert control.busy_at == pytest.approx(machine.now, abs=2 * BATCH_S)
    machine.run(control, 600)
    assert machine.teams == [2], "threads that wait for cores while they sleep need not spin to see it"
    assert idle_teams() == 1

    machine.spinning_share = machine.sleeping_share = 0.0
    machine.run(control, 2 * WINDOW_S)
    assert not control.sleeps
    assert idle_teams() == 0


def test_a_machine_counts_as_busy_until_it_is_found_idle() -> None:
    """A measurement in this time must not count as one of an idle machine."""
    machine = Machine()
    control = machine.control()
    machine.spinning_share = 0.4
    machine.run(control, WINDOW_S + BATCH_S)
    started = machine.now + BATCH_S / 2
    assert control.busy_at < started
    assert control.was_busy(started)
    machine.spinning_share = 0.0
    machine.run(control, FIRST_SLEEP_S + 2 * WINDOW_S)
    assert not control.was_busy(machine.now)


def test_threads_that_lack_cores_only_if_they_spin_do_so_less_and_less() -> None:
    """Other threads of the process can be the reason: they find a core as soon as the OpenMP threads sleep."""
    machine = Machine()
    control = machine.control()
    machine.spinning_share = 0.5
    machine.run(control, 600)
    pauses = 5 + 10 + 20 + 40  # seconds of the first ones; then 60
    assert len(machine.teams) == pytest.approx(5 + (600 - pauses) / LAST_SLEEP_S, abs=2)
    machine.spinning_share = 0.0
    machine.run(control, LAST_SLEEP_S + 1)
    assert not control.sleeps
    machine.run(control, 2 * LAST_SLEEP_S)
    machine.spinning_share = 0.5
    machine.run(control, 2 * WINDOW_S)
    machine.spinning_share = 0.0
    machine.run(control, FIRST_SLEEP_S + 2 * WINDOW_S)
    assert not control.sleeps, "a later loss of cores has nothing to do with the earlier ones"


def test_a_short_pause_of_a_thread_is_not_a_busy_machine() -> None:
    machine = Machine()
    control = machine.control()
    for _ in range(20):
        machine.spinning_share = 0.5
        machine.run(control, BATCH_S)
        machine.spinning_share = 0.0
        machine.run(control, WINDOW_S)
    assert not control.sleeps


def test_a_team_with_other_threads_is_observed_anew() -> None:
    """libgomp ends threads that a smaller team does not need."""
    machine = Machine()
    ended = False

    def waits() -> list[float]:
        if ended:
            raise FileNotFoundError
        return [*machine.waited]

    control = SpinControl(2, 2, machine.teams.append, waits, lambda: machine.now)
    machine.spinning_share = 0.5
    ended = True
    machine.run(control, 4 * WINDOW_S)
    assert not control.sleeps
    ended = False
    machine.run(control, 2 * WINDOW_S)
    assert control.sleeps


@pytest.mark.parametrize(("threads", "cores", "team"), [(2, 2, 2), (4, 16, 14), (64, 64, 2), (8, 2, 2)])
def test_the_idle_team_exceeds_the_cores(threads: int, cores: int, team: int) -> None:
    """A team of n threads on a further thread adds n − 1 OpenMP threads."""
    machine = Machine()
    control = machine.control(threads, cores)
    machine.spinning_share = 0.5
    machine.run(control, 1)
    assert machine.teams == [team]
    assert threads + team - 1 > cores


def test_one_thread_waits_for_no_other() -> None:
    machine = Machine()
    control = machine.control(threads=1)
    machine.spinning_share = 0.5
    machine.run(control, 10)
    assert not control.sleeps
    assert control.busy_at == pytest.approx(machine.now, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_setting_of_a_user_is_not_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1000")
    assert_never_busy(spinning.spin_control(torch.device("cpu")))


@pytest.mark.slow
def test_a_gpu_is_not_observed() -> None:
    assert_never_busy(spinning.spin_control(torch.device("cuda")))


def assert_never_busy(control: SpinControl) -> None:
    with other_processes():
        compute(control, 4 * WINDOW_S)
    assert control.busy_at == float("-inf")


@contextmanager
def other_processes() -> Iterator[None]:
    """Run two processes for each core, which need it all the time."""
    with ExitStack() as stack:
        for _ in range(2 * len(os.sched_getaffinity(0))):
            stack.enter_context(started([sys.executable, "-c", "while True: pass"]))
        yield


def compute(control: SpinControl, seconds: float) -> None:
    """Run batches on a further thread, as the engine does."""

    def batches() -> None:
        x, end = torch.randn(500, 500), time.monotonic() + seconds
        while time.monotonic() < end:
            with control.observing():
                for _ in range(20):
                    x @ x

    thread = threading.Thread(target=batches)
    thread.start()
    thread.join()


@pytest.mark.slow
@needs_libgomp
def test_threads_beside_processes_that_need_all_cores_are_on_a_busy_machine() -> None:
    control = spinning.spin_control(torch.device("cpu"))
    with other_processes():
        compute(control, 4 * WINDOW_S)
    assert control.busy_at > time.monotonic() - 60


CODE = """
import torch
torch.set_num_threads(2)
from camserve_server.torch_setup.spinning import IdleTeam, _libgomp_team, find_libgomp
def threads():
    return len(__import__("os").listdir("/proc/self/task"))
net, x = torch.nn.Conv2d(3, 64, 7).requires_grad_(False), torch.randn(4, 3, 128, 128)
spinning = net(x)
before = threads()
team = IdleTeam(3, _libgomp_team(find_libgomp()))
print(threads() - before)
assert torch.equal(net(x), spinning)
team.release()
while threads() > before:  # the threads end after Python's part of their parent
    pass
assert torch.equal(net(x), spinning)
print("ended")
"""


@pytest.mark.slow
@needs_libgomp
def test_the_team_exists_until_it_is_released_and_changes_no_bit() -> None:
    """A process of its own, because the number of OpenMP threads of the process counts."""
    ran = completed([sys.executable, "-c", CODE])
    assert ran.stdout.split() == ["3", "ended"], ran.stderr


ALONE = """
import os, threading, torch
torch.set_num_threads(2)
from camserve_server.torch_setup.threads import compute_alone
x = torch.randn(1, 1, 500, 500)
def resized():
    return torch.nn.functional.interpolate(x, (1000, 1000), mode="bilinear")
together = resized()
def work():
    compute_alone()
    before = len(os.listdir("/proc/self/task"))
    assert torch.equal(resized(), together)
    print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(torch.get_num_threads())
"""


@pytest.mark.slow
@needs_libgomp
def test_a_codec_thread_starts_no_team() -> None:
    ran = completed([sys.executable, "-c", ALONE])
    assert ran.stdout.splitlines() == ["0 1", "2"], ran.stderr
