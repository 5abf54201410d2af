"""How long OpenMP threads spin, on idle and on busy machines."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch

from camserve_server.torch_setup import spinning
from camserve_server.torch_setup.spinning import FIRST_PROBE_S, LAST_PROBE_S, WINDOW_S, SpinControl
from tests.processes import completed

BATCH_S = 0.1
needs_libgomp = pytest.mark.skipif(spinning._libgomp_team() is None, reason="torch does not use libgomp")


class Machine:
    """Clocks of a machine on which the thread of the batches gets a share of a core."""

    def __init__(self) -> None:
        self.now = self.cpu = 0.0
        self.share = 1.0
        self.teams: list[int] = []

    def control(self, threads: int = 2, cores: int = 2) -> SpinControl:
        return SpinControl(threads, cores, self.teams.append, lambda: self.now, lambda: self.cpu)

    def run(self, control: SpinControl, seconds: float) -> None:
        """Run batches for some seconds."""
        for _ in range(round(seconds / BATCH_S)):
            with control.observing():
                self.now += BATCH_S
                self.cpu += self.share * BATCH_S


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
    machine.share = 0.6
    machine.run(control, WINDOW_S + BATCH_S)
    assert control.sleeps
    assert control.busy_at == pytest.approx(machine.now, abs=2 * BATCH_S)
    assert idle_teams() == 1

    machine.share = 1.0
    machine.run(control, FIRST_PROBE_S + WINDOW_S + BATCH_S)
    assert not control.sleeps
    assert idle_teams() == 0


def test_a_machine_counts_as_busy_until_it_is_found_idle() -> None:
    """A measurement that ends before the next probe must not count as one of an idle machine."""
    machine = Machine()
    control = machine.control()
    machine.share = 0.6
    machine.run(control, WINDOW_S + BATCH_S)
    started = machine.now + BATCH_S / 2
    machine.run(control, 1)
    assert control.busy_at < started
    assert control.was_busy(started)
    machine.share = 1.0
    machine.run(control, FIRST_PROBE_S + WINDOW_S + BATCH_S)
    assert not control.was_busy(machine.now)


def test_a_machine_that_stays_busy_is_probed_less_and_less() -> None:
    machine = Machine()
    control = machine.control()
    machine.share = 0.6
    machine.run(control, 600)
    pauses = 5 + 10 + 20 + 40  # seconds between the first probes; then 60
    assert len(machine.teams) == pytest.approx(5 + (600 - pauses) / LAST_PROBE_S, abs=2)
    machine.share = 1.0
    machine.run(control, LAST_PROBE_S + 1)
    assert not control.sleeps


def test_a_short_pause_of_the_thread_is_not_a_busy_machine() -> None:
    machine = Machine()
    control = machine.control()
    for _ in range(20):
        machine.share = 0.5
        machine.run(control, BATCH_S)
        machine.share = 1.0
        machine.run(control, WINDOW_S)
    assert not control.sleeps


@pytest.mark.parametrize(("threads", "cores", "team"), [(2, 2, 2), (4, 16, 14), (64, 64, 2), (8, 2, 2)])
def test_the_idle_team_exceeds_the_cores(threads: int, cores: int, team: int) -> None:
    """A team of n threads on a further thread adds n − 1 OpenMP threads."""
    machine = Machine()
    control = machine.control(threads, cores)
    machine.share = 0.5
    machine.run(control, 1)
    assert machine.teams == [team]
    assert threads + team - 1 > cores


def test_one_thread_waits_for_no_other() -> None:
    machine = Machine()
    control = machine.control(threads=1)
    machine.share = 0.5
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
    with control.observing():
        time.sleep(WINDOW_S + 0.1)  # as if other processes had used the core of this thread
    assert control.busy_at == float("-inf")


@pytest.mark.slow
@needs_libgomp
def test_a_thread_without_a_core_is_on_a_busy_machine() -> None:
    control = spinning.spin_control(torch.device("cpu"))
    with control.observing():
        time.sleep(WINDOW_S + 0.1)
    assert control.busy_at > time.monotonic() - 60


CODE = """
import torch
torch.set_num_threads(2)
from camserve_server.torch_setup.spinning import IdleTeam, _libgomp_team
def threads():
    return len(__import__("os").listdir("/proc/self/task"))
net, x = torch.nn.Conv2d(3, 64, 7).requires_grad_(False), torch.randn(4, 3, 128, 128)
spinning = net(x)
before = threads()
team = IdleTeam(3, _libgomp_team())
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
